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


@pytest.mark.parametrize("library", ["hivemind", "huggingface_hub", "wandb", "trackio"])
def test_each_heavy_library_has_one_importer(library: str) -> None:
    found = importers("hivetrain", library) | importers("template", library) | importers("neurons", library)
    assert len(found) == 1, found
