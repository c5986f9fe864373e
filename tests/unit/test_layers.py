"""The layering: neurons → template → hivetrain, downwards only, and one importer for each heavy dependency."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def importers(package: str, name: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / package).rglob("*.py"))
        if any(module == name or module.startswith(name + ".") for module in imports(path))
    }


@pytest.mark.parametrize(
    ("package", "above"),
    [("hivetrain", "template"), ("hivetrain", "neurons"), ("hivetrain", "bittensor"), ("template", "neurons")],
)
def test_nothing_imports_what_lies_above_it(package: str, above: str) -> None:
    assert importers(package, above) == set()


def test_only_template_imports_bittensor() -> None:
    assert importers("neurons", "bittensor") == set()
    assert importers("template", "bittensor")


# Neurons need its libp2p streams; the trainer needs its optimizer and tracker, and the DHT in a process of its own.
HIVEMIND_ADAPTERS = {
    "hivetrain/averaging/swarm.py",
    "hivetrain/trainer/averagers.py",
    "hivetrain/trainer/engine.py",
    "hivetrain/trainer/node.py",
    "hivetrain/trainer/tracker.py",
}


def test_hivemind_is_imported_by_its_adapters_alone() -> None:
    found = importers("hivetrain", "hivemind") | importers("template", "hivemind") | importers("neurons", "hivemind")
    assert found == HIVEMIND_ADAPTERS


def test_neurons_do_without_the_trainer() -> None:
    users = importers("hivetrain", "hivetrain.trainer") | importers("template", "hivetrain.trainer")
    outside = {path for path in users if not path.startswith("hivetrain/trainer/")}
    assert outside == {"hivetrain/__init__.py"}
    assert importers("neurons", "hivetrain.trainer") == set()


@pytest.mark.parametrize("library", ["huggingface_hub", "wandb", "trackio"])
def test_each_heavy_library_has_one_importer(library: str) -> None:
    found = importers("hivetrain", library) | importers("template", library) | importers("neurons", library)
    assert len(found) == 1, found
