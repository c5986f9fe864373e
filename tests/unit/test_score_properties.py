"""What must hold for any facts and any history: nobody gains by leaving, by refusing, or by another name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.errors import Fault
from hivetrain.run import Scoring
from hivetrain.scoring import (
    Bandwidth,
    CheckResult,
    MovingAverage,
    RoundFacts,
    Score,
    Unscored,
    score_facts,
    score_round,
)
from hivetrain.scoring.score import LIES

SCORING = Scoring()
FAST = Bandwidth(size_bytes=10_000_000, seconds=1.0, in_time=True)

bandwidths = st.builds(
    Bandwidth,
    size_bytes=st.integers(0, 10**8),
    seconds=st.floats(0, 100),
    in_time=st.booleans(),
    fault=st.sampled_from(["", "", "late: x"]),
)
passed = st.builds(CheckResult, distance=st.floats(0, 2), detail=st.just("window 1"))
failed = st.builds(CheckResult, fault=st.sampled_from(list(Fault)), detail=st.just("x"))
facts = st.builds(
    RoundFacts,
    tokens=st.integers(0, 10_000),
    receipt_fault=st.sampled_from(["", "no receipt yet"]),
    checks=st.lists(st.one_of(passed, failed), max_size=3),
    bandwidth=st.one_of(st.none(), bandwidths),
    measures=st.dictionaries(st.sampled_from("xyz"), bandwidths),
    cooldown_left=st.integers(0, 3),
)
groups = st.dictionaries(st.text("abcdef", min_size=1, max_size=2), facts, max_size=6)


def value(score: Score | Unscored) -> float:
    assert isinstance(score, Score)
    return score.score


@given(groups)
def test_every_part_of_every_score_is_in_the_unit_interval_with_its_reason(group: dict[str, RoundFacts]) -> None:
    for score in score_round(group, SCORING).values():
        if isinstance(score, Score):
            for part in (score.gradient, score.steps, score.bandwidth, score.score):
                assert 0 <= part <= 1
            assert set(score.reasons) == {"gradient", "steps", "bandwidth"}
            assert all(score.reasons.values())
            assert not (score.passed and (score.lied or score.refused))


@given(groups, st.randoms(use_true_random=False))
def test_the_order_of_miners_changes_no_score(group: dict[str, RoundFacts], random: object) -> None:
    names = list(group)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert score_round({name: group[name] for name in names}, SCORING) == score_round(group, SCORING)


@given(groups, st.permutations(["a", "b", "c"]))
def test_permuting_miners_permutes_scores(group: dict[str, RoundFacts], names: list[str]) -> None:
    three = dict(zip(("a", "b", "c"), list(group.values())[:3], strict=False))
    renamed = dict(zip(names, three.values(), strict=False))
    before, after = score_round(three, SCORING), score_round(renamed, SCORING)
    assert list(before.values()) == list(after.values())


@given(groups, facts, st.integers(1, 5_000))
def test_more_verified_work_never_pays_less(group: dict[str, RoundFacts], fact: RoundFacts, more: int) -> None:
    richer = dataclasses.replace(fact, tokens=fact.tokens + more)
    less, much = (score_round({**group, "me": one}, SCORING)["me"] for one in (fact, richer))
    if isinstance(less, Score) and isinstance(much, Score):
        assert much.score >= less.score


@given(groups, facts, failed)
def test_a_failed_check_pays_nothing_and_never_costs_another_miner(
    group: dict[str, RoundFacts], fact: RoundFacts, failure: CheckResult
) -> None:
    group.pop("me", None)
    fact = dataclasses.replace(fact, bandwidth=FAST)
    caught = dataclasses.replace(fact, checks=[*fact.checks, failure])
    before, after = (score_round({**group, "me": one}, SCORING) for one in (fact, caught))
    assert value(after["me"]) == 0
    for hotkey in group:
        one, other = before[hotkey], after[hotkey]
        assert isinstance(one, Unscored) == isinstance(other, Unscored)
        if isinstance(one, Score) and isinstance(other, Score):
            assert other.score >= one.score


@given(facts, st.sampled_from(sorted(LIES, key=lambda fault: fault.value)))
def test_a_lie_is_a_lie_whatever_else_was_found(fact: RoundFacts, lie: Fault) -> None:
    refused = CheckResult(fault=Fault.REFUSED, detail="x")
    found = dataclasses.replace(fact, bandwidth=FAST, checks=[refused, CheckResult(fault=lie, detail="y")])
    score = score_round({"me": found}, SCORING)["me"]
    assert isinstance(score, Score)
    assert score.lied


@given(groups, st.sets(st.text("abcdef", min_size=1, max_size=2)))
def test_what_our_own_side_missed_changes_no_average(group: dict[str, RoundFacts], missing: set[str]) -> None:
    average = MovingAverage(None, SCORING)
    average.update(0, {hotkey: scored(0.5) for hotkey in group}, set(group))
    lost = {hotkey: Unscored(why="our line") for hotkey in group if hotkey in missing}
    average.update(1, score_facts({**group, **lost}, SCORING), set(group))
    for hotkey in lost:
        assert average.value(hotkey) == SCORING.ema_alpha * 0.5


def scored(score: float, **flags: bool) -> Score:
    return Score(gradient=score, steps=score, bandwidth=score, score=score, **flags)  # type: ignore[arg-type]


# -- averages over rounds --------------------------------------------------------------------------------------

Event = tuple[str, float]
events = st.lists(
    st.tuples(st.sampled_from(["score", "score", "score", "lie", "refuse", "unscored", "away"]), st.floats(0, 1)),
    min_size=1,
    max_size=25,
)


def score_of(event: Event) -> Score | Unscored:
    kind, amount = event
    if kind == "unscored":
        return Unscored(why="ours")
    if kind in ("lie", "refuse"):
        return scored(0.0, lied=kind == "lie", refused=kind == "refuse")
    return scored(amount, passed=True)


def honest_after(average: MovingAverage, hotkey: str, first: int, num_rounds: int) -> list[float]:
    """Its average over rounds of full scores."""
    values = []
    for number in range(first, first + num_rounds):
        left = average.cooldown_left(hotkey, number)
        average.update(number, {hotkey: scored(0.0 if left else 1.0)}, {hotkey})
        values.append(average.value(hotkey))
    return values


def history(rounds: Sequence[Event], hotkey: str = "me") -> MovingAverage:
    average = MovingAverage(None, SCORING)
    for number, event in enumerate(rounds):
        gone = event[0] == "away"
        scores = {} if gone else {hotkey: scored(0.0) if average.cooldown_left(hotkey, number) else score_of(event)}
        average.update(number, scores, set() if gone else {hotkey})
    return average


@settings(deadline=None)
@given(events)
def test_leaving_and_coming_back_gains_nothing(rounds: list[Event]) -> None:
    stayed = history(rounds)
    left = MovingAverage(None, SCORING, stayed.state)
    number = len(rounds)
    stayed.update(number, {"me": scored(0.0)}, {"me"})  # a round in which it does nothing, or is away
    left.update(number, {}, set())
    for one, other in zip(
        honest_after(stayed, "me", number + 1, 15), honest_after(left, "me", number + 1, 15), strict=True
    ):
        assert other <= one


@settings(deadline=None)
@given(events)
def test_another_name_gains_nothing_however_long_the_cooldown(rounds: list[Event]) -> None:
    stayed = history(rounds)
    number = len(rounds)
    stayed.update(number, {"me": scored(0.0, lied=True)}, {"me"})  # caught
    renamed = MovingAverage(None, SCORING, stayed.state)
    renamed.update(number + 1, {"new": scored(1.0)}, {"new"})
    stayed.update(number + 1, {"me": scored(0.0)}, {"me"})
    mine, new = (honest_after(average, name, number + 2, 15) for average, name in ((stayed, "me"), (renamed, "new")))
    assert all(value <= other for value, other in zip(new, mine, strict=True))


def test_the_warm_up_is_as_long_as_the_cooldown_and_the_first_round_of_all_has_none() -> None:
    average = MovingAverage(None, SCORING)
    average.update(7, {"old": scored(1.0)}, {"old"})
    assert average.value("old") > 0
    for number in range(8, 8 + SCORING.cooldown_rounds):
        average.update(number, {"old": scored(1.0), "new": scored(1.0)}, {"old", "new"})
        assert average.value("new") == 0
        assert average.waits_until("new") == 8 + SCORING.cooldown_rounds
    average.update(8 + SCORING.cooldown_rounds, {"new": scored(1.0)}, {"old", "new"})
    assert average.value("new") == SCORING.ema_alpha


def test_an_unscored_round_of_a_newcomer_counts_for_its_warm_up() -> None:
    average = MovingAverage(None, SCORING)
    average.update(0, {"old": scored(1.0)}, {"old"})
    average.update(1, {"new": Unscored(why="ours")}, {"old", "new"})
    assert average.waits_until("new") == 1 + SCORING.cooldown_rounds


def test_who_refuses_loses_its_average_and_owes_a_check_until_it_passes_one() -> None:
    average = MovingAverage(None, SCORING)
    average.update(0, {"a": scored(1.0, passed=True)}, {"a"})
    assert not average.owes("a")
    average.update(1, {"a": scored(0.0, refused=True)}, {"a"})
    assert average.owes("a")
    assert average.value("a") == 0
    assert average.cooldown_left("a", 2) == 0
    average.update(2, {"a": Unscored(why="ours")}, {"a"})  # not checked: still owes
    assert average.owes("a")
    average.update(3, {"a": scored(0.0, refused=True)}, {"a"})
    assert average.value("a") == 0
    average.update(4, {"a": scored(1.0, passed=True)}, {"a"})
    assert not average.owes("a")
    assert average.value("a") == SCORING.ema_alpha


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_who_never_answers_earns_under_a_twentieth_of_an_honest_miner(share: float) -> None:
    """Over 400 rounds: it is paid until the coins first choose it, and then asked in every round."""
    average, paid, number = MovingAverage(None, dataclasses.replace(SCORING, check_share=share)), 0.0, 0
    for number in range(400):
        drawn = average.owes("a") or number >= 1 / share  # when the coins choose it, on average
        average.update(number, {"a": scored(0.0, refused=True) if drawn else scored(1.0)}, {"a"})
        paid += average.value("a")
    assert paid / number < 0.05
