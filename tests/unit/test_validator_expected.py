"""What a validator expects of a receipt, as far as it follows from the base: who may bring a remainder along."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hivetrain.manifest import Ref
from neurons.validator import Validator
from template.config import Secrets, parse_config
from tests.failover_kit import POSITION, SCHEDULE
from tests.round_kit import World, identity, shared_world

MINER = identity("miner").hotkey


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


def expects_remainder(world: World, folder: Path, codec: str = "int4", **changes: object) -> bool:
    """Whether a remainder of the miner's may follow from an epoch 1 like that."""
    validator = Validator(parse_config(["--neuron.dir", str(folder)], "validator", {}), Secrets())
    averaging = dataclasses.replace(world.parts.recipe.averaging, codec=codec)  # type: ignore[arg-type]
    recipe = dataclasses.replace(world.parts.recipe, averaging=averaging)
    parts = dataclasses.replace(world.parts, recipe=recipe)
    validator.run_id, validator.parts, validator.recipe, validator.schedule = parts.run_id, parts, recipe, SCHEDULE
    fields = {"epoch": 1, "base_epoch": 0, "receipts": {MINER: "cd" * 32}}
    manifest = world.base.manifest.model_copy(update={**fields, **changes})
    base = Ref(epoch=1, commit="", manifest=manifest, manifest_sha256=manifest.sha256())
    expected = validator._expected(POSITION, base, MINER, 0)
    assert (expected.epoch, expected.base_manifest, expected.rank) == (1, manifest.sha256(), 0)
    return expected.feeds_back and expected.was_in


def test_who_is_in_the_base_may_bring_its_remainder(world: World, tmp_path: Path) -> None:
    assert expects_remainder(world, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"base_epoch": 1}, id="its adapter was merged: the vector that the remainder belongs to is gone"),
        pytest.param({"receipts": {}}, id="it names nobody"),
        pytest.param({"receipts": {"another": "cd" * 32}}, id="it names others"),
        pytest.param({"codec": "fp32"}, id="nothing is lost"),
    ],
)
def test_nobody_else_may(world: World, tmp_path: Path, changes: dict[str, object]) -> None:
    assert not expects_remainder(world, tmp_path, **changes)  # type: ignore[arg-type]
