"""Scores and their moving average: hand-worked values, properties, and our own failures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.errors import ConfigError, Fault
from hivetrain.run import Scoring
from hivetrain.scoring import Bandwidth, CheckResult, MovingAverage, RoundFacts, Score, Unscored, score_round
from hivetrain.scoring.score import gradient_score

SCORING = Scoring()
FAST = Bandwidth(size_bytes=10_000_000, seconds=1.0, in_time=True)


def scored(facts: dict[str, RoundFacts]) -> dict[str, Score]:
    found = score_round(facts, SCORING)
    assert all(isinstance(score, Score) for score in found.values())
    return {hotkey: score for hotkey, score in found.items() if isinstance(score, Score)}


def test_an_honest_miner_with_the_most_tokens_scores_one() -> None:
    score = scored({"a": RoundFacts(tokens=100, checks=[CheckResult(distance=1e-5)], bandwidth=FAST)})["a"]
    assert (score.gradient, score.steps, score.bandwidth, score.score) == (1.0, 1.0, 1.0, 1.0)


def test_half_the_tokens_at_half_the_rate() -> None:
    slow = Bandwidth(size_bytes=10_000_000, seconds=80 / (SCORING.target_mbps / 2), in_time=True)
    found = scored({"a": RoundFacts(tokens=100, bandwidth=FAST), "b": RoundFacts(tokens=50, bandwidth=slow)})
    assert found["b"].score == pytest.approx(0.7 * 0.5 + 0.3 * 0.5)
    assert found["b"].reasons["gradient"] == "not drawn this round"


def test_a_failed_check_pays_nothing_and_its_tokens_do_not_set_the_best() -> None:
    lie = CheckResult(distance=1.2, fault=Fault.WRONG_REPLAY, detail="window 2: replay distance 1.2")
    found = scored(
        {
            "liar": RoundFacts(tokens=1000, checks=[lie], bandwidth=FAST),
            "honest": RoundFacts(tokens=100, bandwidth=FAST),
        }
    )
    assert (found["liar"].score, found["liar"].lied) == (0.0, True)
    assert "wrong_replay" in found["liar"].reasons["gradient"]
    assert found["honest"].score == 1.0


@pytest.mark.parametrize(
    ("measured", "value", "says"),
    [
        (Bandwidth(size_bytes=0, seconds=0.0, in_time=True), 0.0, "sent nothing"),
        (Bandwidth(size_bytes=5_000_000, seconds=1.0, in_time=False), 0.0, "late"),
        (Bandwidth(size_bytes=999_999, seconds=900.0, in_time=True), 1.0, "in time"),
        (Bandwidth(size_bytes=5_000_000, seconds=0.0, in_time=True), 1.0, "nobody waited"),
    ],
)
def test_bandwidth_of_the_missing_the_late_and_the_small(measured: Bandwidth, value: float, says: str) -> None:
    score = scored({"a": RoundFacts(tokens=1, bandwidth=measured)})["a"]
    assert score.bandwidth == value
    assert says in score.reasons["bandwidth"]


def test_without_a_measurement_of_ours_nobody_is_scored() -> None:
    assert isinstance(score_round({"a": RoundFacts(tokens=100)}, SCORING)["a"], Unscored)


def test_without_a_receipt_the_reason_is_told() -> None:
    score = scored({"a": RoundFacts(receipt_fault="unreachable: connection refused", bandwidth=None)})["a"]
    assert score.score == 0.0
    assert score.reasons["steps"] == "unreachable: connection refused"


def test_gradient_score_falls_from_one_to_zero_between_the_bounds() -> None:
    assert gradient_score(0.05, SCORING) == 1.0
    assert gradient_score(0.065, SCORING) == pytest.approx(0.5)
    assert gradient_score(0.08, SCORING) == 0.0
    assert gradient_score(float("nan"), SCORING) == 0.0


tokens = st.integers(0, 10_000)
bandwidths = st.builds(Bandwidth, size_bytes=st.integers(0, 10**8), seconds=st.floats(0, 100), in_time=st.booleans())
check_lists = st.lists(
    st.one_of(
        st.builds(CheckResult, distance=st.floats(0, 2)),
        st.builds(CheckResult, fault=st.sampled_from(list(Fault)), detail=st.just("x")),
    ),
    max_size=2,
)
facts = st.builds(RoundFacts, tokens=tokens, checks=check_lists, bandwidth=bandwidths, cooldown_left=st.integers(0, 2))


@given(st.dictionaries(st.text("abc", min_size=1), facts, max_size=5))
def test_every_score_is_in_the_unit_interval(group: dict[str, RoundFacts]) -> None:
    for score in scored(group).values():
        for value in (score.gradient, score.steps, score.bandwidth, score.score):
            assert 0 <= value <= 1


@given(facts, st.integers(1, 5_000))
def test_more_work_never_pays_less(fact: RoundFacts, more: int) -> None:
    rival = RoundFacts(tokens=5_000, bandwidth=FAST)
    richer = RoundFacts(
        tokens=fact.tokens + more, checks=fact.checks, bandwidth=fact.bandwidth, cooldown_left=fact.cooldown_left
    )
    assert scored({"a": richer, "b": rival})["a"].score >= scored({"a": fact, "b": rival})["a"].score


@given(facts)
def test_a_failed_check_never_pays_more(fact: RoundFacts) -> None:
    caught = RoundFacts(
        tokens=fact.tokens,
        checks=[*fact.checks, CheckResult(fault=Fault.WRONG_REPLAY, detail="x")],
        bandwidth=fact.bandwidth,
        cooldown_left=fact.cooldown_left,
    )
    assert scored({"a": caught})["a"].score == 0.0


@given(st.permutations(["a", "b", "c"]))
def test_permuting_miners_permutes_scores(names: list[str]) -> None:
    group = {name: RoundFacts(tokens=10 * (i + 1), bandwidth=FAST) for i, name in enumerate(("a", "b", "c"))}
    shuffled = score_round({name: group[name] for name in names}, SCORING)
    assert shuffled == score_round(group, SCORING)


def one(value: float, *, lied: bool = False) -> Score:
    return Score(gradient=value, steps=value, bandwidth=value, score=value, lied=lied)


def test_the_average_starts_at_zero_and_survives_a_restart(tmp_path: Path) -> None:
    average = MovingAverage(tmp_path / "a.json", SCORING)
    average.update(0, {"a": one(1.0)}, {"a"})
    average.update(1, {"a": one(1.0)}, {"a"})
    assert average.value("a") == pytest.approx(1 - 0.7**2)
    again = MovingAverage(tmp_path / "a.json", SCORING)
    again.load()
    assert again.value("a") == average.value("a")
    assert again.last_round == 1


def test_a_round_counts_once(tmp_path: Path) -> None:
    average = MovingAverage(tmp_path / "a.json", SCORING)
    average.update(4, {"a": one(1.0)}, {"a"})
    before = average.value("a")
    average.update(4, {"a": one(0.0)}, {"a"})
    assert average.value("a") == before


def test_our_own_failure_changes_nobodys_average(tmp_path: Path) -> None:
    average = MovingAverage(tmp_path / "a.json", SCORING)
    average.update(0, {"a": one(1.0)}, {"a"})
    before = average.value("a")
    average.update(1, {"a": Unscored(why="disk full")}, {"a"})
    assert average.value("a") == before


def test_a_proven_lie_clears_the_average_and_starts_a_cooldown_that_leaving_does_not_end(tmp_path: Path) -> None:
    average = MovingAverage(tmp_path / "a.json", SCORING)
    average.update(0, {"a": one(1.0)}, {"a"})
    average.update(1, {"a": one(0.0, lied=True)}, {"a"})
    assert average.value("a") == 0.0
    assert average.cooldown_left("a", 2) == SCORING.cooldown_rounds
    average.update(2, {}, set())
    assert average.cooldown_left("a", 3) == SCORING.cooldown_rounds - 1
    assert average.cooldown_left("a", 2 + SCORING.cooldown_rounds) == 0


def test_who_leaves_starts_again_at_zero(tmp_path: Path) -> None:
    average = MovingAverage(tmp_path / "a.json", SCORING)
    average.update(0, {"a": one(1.0), "b": one(1.0)}, {"a", "b"})
    average.update(1, {"b": one(1.0)}, {"b"})
    assert average.value("a") == 0.0
    assert average.weights() == {"b": 1.0}


@pytest.mark.parametrize("content", ["", "{", '{"entries": {"a": {"value": 7}}}', '{"entries": {"a": {"value": "x"}}}'])
def test_a_broken_file_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="move it away"):
        MovingAverage(path, SCORING).load()
    assert path.read_text() == content


def at(share: float) -> Bandwidth:
    """Of the target's rate."""
    return Bandwidth(size_bytes=10_000_000, seconds=80 / (SCORING.target_mbps * share), in_time=True)


def bandwidth_score(ours: Bandwidth | None, **measures: Bandwidth) -> tuple[float, str]:
    fact = RoundFacts(tokens=10, bandwidth=ours, measures=measures)
    score = score_round({"a": fact}, SCORING)["a"]
    assert isinstance(score, Score)
    return score.bandwidth, score.reasons["bandwidth"]


def test_the_median_of_what_validators_published_decides_how_fast_a_miner_was() -> None:
    value, why = bandwidth_score(at(0.9), one=at(0.2), two=at(0.5), three=at(0.4))
    assert value == pytest.approx(0.4)
    assert why == "median of what 3 validators published of the round before: 0.200, 0.400, 0.500"
    assert bandwidth_score(at(0.9), one=at(0.2), two=at(0.4))[0] == pytest.approx(0.3)
    assert bandwidth_score(at(0.9), one=at(0.2))[0] == pytest.approx(0.9)  # one alone: ours


@pytest.mark.parametrize("lie", [at(1000), at(1e-6), Bandwidth(size_bytes=0, seconds=0.0, in_time=False, fault="x")])
def test_one_validators_lie_stays_between_what_honest_ones_measured(lie: Bandwidth) -> None:
    assert 0.3 <= bandwidth_score(at(0.5), one=at(0.3), two=at(0.4), liar=lie)[0] <= 0.4 + 1e-9


@pytest.mark.parametrize(
    "ours",
    [
        Bandwidth(size_bytes=0, seconds=0.0, in_time=True),
        Bandwidth(size_bytes=5_000_000, seconds=1.0, in_time=False),
        Bandwidth(size_bytes=5_000_000, seconds=1.0, in_time=True, fault="late: x"),
    ],
)
def test_who_does_not_send_in_this_round_is_not_paid_for_the_one_before(ours: Bandwidth) -> None:
    assert bandwidth_score(ours, one=at(1), two=at(1))[0] == 0
