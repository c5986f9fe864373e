"""The cheats as code: each does what its name says, is found out by what it should be, and is paid by real draws."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bench.attacks.__main__ import Row, claims_of, rows_of
from bench.attacks.catalogue import CATALOGUE, make_cheat
from bench.attacks.cheat import Cheat, Kind
from bench.attacks.cost import chance
from bench.attacks.miner import IN_THE_NETWORK
from bench.attacks.miner import main as cheating_miner
from bench.attacks.outside import OUTSIDE, Outside
from bench.attacks.pay import Done, pay, play, worst
from bench.attacks.rounds import CheatRound, HonestRound, cheat_round, honest_rounds
from bench.attacks.world import World, make_world
from bench.honest import VARIANTS, Machines, Variant
from hivetrain.errors import Fault
from hivetrain.scoring import CheckResult

NUM_WINDOWS = 5
LATE = (False, False, False, False, True)
ALL = (True,) * NUM_WINDOWS
NONE = (False,) * NUM_WINDOWS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("attacks"))


@pytest.fixture(scope="module")
def honest(world: World) -> list[HonestRound]:
    return honest_rounds(world, 3, 2)


def failed(one: CheatRound) -> tuple[bool, ...]:
    return tuple(check.fault is not None for check in one.checks)


def test_every_cheat_of_the_catalogue_can_be_made_and_says_what_it_does() -> None:
    for name in CATALOGUE:
        cheat = make_cheat(name)
        assert cheat.name == name
        assert len(cheat.what) > 10
    with pytest.raises(ValueError, match="no attack 'honesty'; there are: random, "):
        make_cheat("honesty")


def test_honest_miners_pass_every_window_and_are_in_the_mean(honest: list[HonestRound]) -> None:
    for one in honest:
        assert [check.fault for checks in one.checks for check in checks] == [None] * (3 * NUM_WINDOWS)
        assert set(one.seen[1].included.values()) == {1.0}
    assert honest[1].base.epoch == 1
    assert honest[1].base.manifest.val_loss < honest[0].base.manifest.val_loss


def test_who_cheats_in_nothing_is_paid_like_everybody(world: World, honest: list[HonestRound]) -> None:
    cheat = Cheat("honest", "nothing")
    done = Done(cheat=cheat, rounds=[cheat_round(world, cheat, one) for one in honest])
    assert [failed(one) for one in done.rounds] == [NONE, NONE]
    assert done.rounds[0].work_done == 1.0
    paid, _ = pay(world.parts.recipe.scoring, honest, done, 5)
    assert (paid.relative, paid.per_work, paid.caught) == (pytest.approx(1.0), pytest.approx(1.0), 0.0)


@pytest.mark.parametrize(
    ("name", "windows", "work"),
    [
        ("random", ALL, 0.0),
        ("copy", ALL, 0.0),
        ("sign-flip", LATE, 1.0),
        ("noise-0.5", NONE, 1.0),
        ("skip-5", LATE, 0.95),
        ("skip-50", (False, False, True, True, True), 0.5),
        ("half-batch", ALL, 0.5),
        ("wrong-base", (True, False, False, False, False), 1.0),
        ("refuses", ALL, 0.0),
        ("on-demand", ALL, 0.0),
        ("pickle", ALL, 0.0),
    ],
)
def test_a_check_finds_what_was_not_done(
    world: World, honest: list[HonestRound], name: str, windows: tuple[bool, ...], work: float
) -> None:
    cheat = make_cheat(name)
    rounds = [cheat_round(world, cheat, one) for one in honest] if name == "wrong-base" else []
    found = rounds[-1] if rounds else cheat_round(world, cheat, honest[1])
    assert failed(found) == windows
    assert found.work_done == pytest.approx(work)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nan", Fault.NOT_FINITE),
        ("1e30", Fault.OUT_OF_BOUND),
        ("other-bytes", Fault.ABSENT),
        ("wrong-shape", Fault.WRONG_SCHEMA),
        ("wrong-mean", Fault.WRONG_AVERAGE),
        ("false-accusation", Fault.MALFORMED),
    ],
)
def test_the_all_reduce_blames_the_cheat_and_nobody_else(
    world: World, honest: list[HonestRound], name: str, fault: Fault
) -> None:
    found = cheat_round(world, make_cheat(name), honest[0])
    assert found.seen is not None
    outcome = found.seen[1]
    assert outcome.complete
    assert {record.hotkey for record in outcome.faults} <= {found.key.hotkey}
    assert fault in {record.fault for record in outcome.faults}
    assert all(outcome.included[key.hotkey] == 1.0 for key in honest[0].keys)


def test_an_inflated_weight_is_refused_with_its_receipt(world: World, honest: list[HonestRound]) -> None:
    found = cheat_round(world, make_cheat("inflated-weight"), honest[0])
    assert found.receipt is None
    assert "num_samples is 400, expected 40" in found.refused


def test_a_hijacker_is_left_out_and_its_victim_is_not(world: World, honest: list[HonestRound]) -> None:
    found = cheat_round(world, make_cheat("hijacked-peer"), honest[0])
    assert found.seen is not None
    assert found.seen[0].member(found.key.hotkey) is None
    assert all(found.seen[1].included[key.hotkey] == 1.0 for key in honest[0].keys)


def test_who_is_checked_in_every_round_and_lies_is_paid_nothing(world: World, honest: list[HonestRound]) -> None:
    cheat = make_cheat("zero")
    done = Done(cheat=cheat, rounds=[cheat_round(world, cheat, one) for one in honest])
    always = dataclasses.replace(world.parts.recipe.scoring, check_share=1.0)
    one = play(0, always, honest, done)
    assert (one.cheat, one.caught, one.work) == (0.0, 1, 0.0)
    assert one.honest > 0
    never = dataclasses.replace(always, check_share=0.0)
    assert play(0, never, honest, done).cheat == pytest.approx(play(0, never, honest, done).honest)


def test_a_sleeper_rests_only_after_a_challenge(world: World, honest: list[HonestRound]) -> None:
    cheat = make_cheat("sleeper")
    assert cheat.resting is not None
    awake = [cheat_round(world, Cheat("honest", ""), one) for one in honest]
    asleep = [cheat_round(world, cheat.resting, one) for one in honest]
    done = Done(cheat=cheat, rounds=awake, resting=asleep)
    scoring = dataclasses.replace(world.parts.recipe.scoring, check_share=1.0)
    assert play(0, scoring, honest, done).work == 0.5  # works, is challenged, rests, is caught
    assert play(0, dataclasses.replace(scoring, check_share=0.0), honest, done).work == 1.0


def test_the_worst_of_several_windows_counts() -> None:
    good, bad = CheckResult(distance=0.01), CheckResult(distance=0.02)
    lie = CheckResult(fault=Fault.WRONG_REPLAY, detail="no")
    assert worst([good, bad]) is bad
    assert worst([good, lie, bad]) is lie


@pytest.mark.parametrize("outside", OUTSIDE, ids=lambda one: one.name)
def test_something_stops_an_attack_without_work(world: World, honest: list[HonestRound], outside: Outside) -> None:
    assert len(outside.do(world, honest)) > 20


def test_kept_rows_are_not_measured_again(world: World, honest: list[HonestRound], tmp_path: Path) -> None:
    (first,) = rows_of(["zero"], world, honest, 4, tmp_path)
    kept = json.loads((tmp_path / "zero.json").read_text())
    (tmp_path / "zero.json").write_text(json.dumps({**kept, "pay": 123.0}))
    assert rows_of(["zero"], world, honest, 4, tmp_path)[0].pay == 123.0
    assert rows_of(["zero"], world, honest, 6, tmp_path)[0].pay != 123.0  # of another setting
    assert first.kind == "whole"


def test_a_claim_fails_where_a_cheat_is_paid(honest: list[HonestRound]) -> None:
    def row(name: str, kind: Kind, work: float, pay: float) -> Row:
        return Row(
            name=name,
            what="",
            kind=kind.value,
            work=work,
            pay=pay,
            per_work=pay / work if work else None,
            caught=1.0,
            rounds=1.0,
            others=1.0,
            evidence="",
        )

    good = [row("w", Kind.WHOLE, 0.0, 0.01), row("p", Kind.PART, 0.5, 0.4), row("x", Kind.WORKS, 1.0, 1.0)]
    assert all(claim.holds for claim in claims_of(good, honest, [("n", "w", "stopped")]))
    bad = [row("w", Kind.WHOLE, 0.0, 0.06), row("p", Kind.PART, 0.5, 0.6), row("x", Kind.WORKS, 1.0, 1.1)]
    broken = [claim for claim in claims_of(bad, honest, [("n", "w", "")]) if not claim.holds]
    assert len(broken) == 4


def test_the_chance_to_be_drawn_is_that_of_the_windows_that_are_touched() -> None:
    assert chance(0.5, 0.05, 5, 1) == pytest.approx(0.1)
    assert chance(0.5, 0.25, 5, 1) == pytest.approx(0.2)
    assert chance(0.5, 1.0, 5, 4) == pytest.approx(1 - 0.5**4)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_an_honest_miner_on_another_machine_passes(world: World, variant: Variant) -> None:
    data = world.load_data(0, 0)
    verdict = Machines(world, world.parts.recipe).check(variant, world.state, data.batch, 1, 4)
    assert verdict.worst < (0.05 if variant.precision == "bf16" else 1e-4)


def test_a_cheating_miner_needs_a_name_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cheating_miner(["--names"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == [*CATALOGUE, *IN_THE_NETWORK]
    assert cheating_miner([]) == 2
    assert cheating_miner(["--attack", "teleport", "--netuid", "1"]) == 2
    assert "no attack 'teleport'" in capsys.readouterr().err
