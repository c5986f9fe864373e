"""Receipts in published records against the recipe and the base: what a validator should have refused is named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hivetrain.averaging.layout import PayloadLayout
from hivetrain.contribution import Terms
from hivetrain.manifest import Ref
from hivetrain.run import Averaging, Data, Inner, Recipe
from hivetrain.scoring.explain import against_recipe, compare
from hivetrain.scoring.record import RoundRecord
from hivetrain.workbench import make_layout
from tests.records_kit import MINERS, RUN_ID, SECOND, Ledger, base_ref, signed_receipt

ONE, TWO = MINERS[0].hotkey, MINERS[1].hotkey


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What the made-up receipts are of."""

    run_id: str
    schema_hash: str
    recipe: Recipe
    layout: PayloadLayout


TERMS: Terms = Agreed(
    run_id=RUN_ID,
    schema_hash="04" * 32,
    recipe=Recipe(
        data=Data(seq_len=64, batch_size=4, accumulation=1),
        inner=Inner(max_steps=50, snapshot_every=10),
        averaging=Averaging(codec="fp32"),
    ),
    layout=make_layout(5000, Averaging(codec="fp32")),
)
BASE = Ref(
    epoch=0,
    commit="c",
    manifest=base_ref().manifest.model_copy(update={"state_hash": "03" * 32}),
    manifest_sha256="07" * 32,
)
SHAPE = {"layout_hash": TERMS.layout.layout_hash, "num_chunks": TERMS.layout.num_chunks}


def recorded(**changes: object) -> RoundRecord:
    """A round whose receipts are as they should be, but for ``changes`` in the first miner's."""
    receipts = {
        one.hotkey: signed_receipt(one, 0, BASE, **{**SHAPE, "rank": rank, **(changes if rank == 0 else {})})
        for rank, one in enumerate(MINERS)
    }
    return Ledger().round(0, receipts=receipts).model_copy(update={"base_manifest": BASE.manifest_sha256})


def found(record: RoundRecord, base: Ref | None = BASE) -> list[tuple[str, str]]:
    return against_recipe(record, TERMS, base)


def with_rank(record: RoundRecord, hotkey: str, rank: int | None) -> RoundRecord:
    miner = record.miners[hotkey].model_copy(update={"rank": rank})
    return record.model_copy(update={"miners": {**record.miners, hotkey: miner}})


def test_receipts_as_the_recipe_wants_them_hold_also_where_their_base_is_gone() -> None:
    assert found(recorded()) == []
    assert found(recorded(), None) == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_tokens": 999_999}, ["num_tokens"]),
        ({"num_samples": 201}, ["num_samples"]),
        ({"num_steps": 51}, ["num_steps", "num_samples", "num_tokens", "num_snapshots"]),
        ({"num_snapshots": 4}, ["num_snapshots"]),
        ({"num_chunks": 7, "layout_hash": "05" * 32}, ["layout_hash", "num_chunks"]),
        ({"schema_hash": "0c" * 32}, ["schema_hash"]),
        ({"base_state": "0c" * 32}, ["base_state"]),
        ({"epoch": 5}, ["epoch"]),
        ({"rank": 2}, ["rank"]),
        ({"remainder_root": "0c" * 32}, ["remainder_root"]),
    ],
)
def test_everything_that_does_not_hold_is_named(changes: dict[str, object], names: list[str]) -> None:
    problems = found(recorded(**changes))
    assert [whose for whose, _ in problems] == [ONE] * len(names)
    assert all(f"receipt.{name} " in why for name, (_, why) in zip(names, problems, strict=True))


def test_a_rank_that_is_missing_without_a_slot_or_said_twice_is_found() -> None:
    (problem,) = found(with_rank(recorded(), ONE, None))
    assert problem == (ONE, "its receipt is taken, and its rank not said")
    assert "has no assignment" in found(with_rank(recorded(), ONE, 16))[0][1]
    problems = found(with_rank(recorded(rank=1), ONE, 1))
    assert problems == [(hotkey, "rank 1 is said of 2 miners") for hotkey in (ONE, TWO)]


def test_validators_that_name_different_ranks_are_compared() -> None:
    ours, theirs = Ledger().round(0), Ledger(SECOND).round(0)
    assert any("rank 0 and 3" in line for line in compare(ours, with_rank(theirs, ONE, 3), ONE))
