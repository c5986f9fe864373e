"""From what a validator saw to scores, and from averages to weights on a real (local) chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.averaging.butterfly import AllReduceOutcome, FaultRecord, LinkStats
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.errors import Fault
from hivetrain.run import Scoring
from hivetrain.scoring import CheckResult, MovingAverage, Score, Unscored, score_facts
from hivetrain.verification.receipt import Receipt
from template.chain.client import Chain
from template.validator.collect import Collected
from template.validator.reward import gather_facts, measured, round_weights, score_miners
from template.validator.weights import set_weights
from tests.chain_fixture import LocalChain, local_chain

SCORING = Scoring()
ROUND = 7
LIE = CheckResult(distance=1.0, fault=Fault.WRONG_REPLAY, detail="window 0")
PASSED = CheckResult(distance=1e-5)


def receipt(hotkey: str, num_steps: int = 10) -> Receipt:
    return Receipt(
        run_id="01" * 32,
        round=ROUND,
        epoch=5,
        base_manifest="02" * 32,
        base_state="03" * 32,
        schema_hash="04" * 32,
        layout_hash="05" * 32,
        hotkey=hotkey,
        rank=0,
        num_steps=num_steps,
        num_samples=num_steps * 4,
        num_tokens=num_steps * 64,
        loss=4.5,
        data_digests=(),
        steps_root="08" * 32,
        sketch="00" * 1024,
        snapshots_root="09" * 32,
        num_snapshots=1,
        payload_root="0a" * 32,
        num_chunks=1,
    )


def collected(*hotkeys: str, refused: dict[str, str] | None = None, ours: dict[str, str] | None = None) -> Collected:
    return Collected(receipts={hotkey: receipt(hotkey) for hotkey in hotkeys}, refused=refused or {}, ours=ours or {})


def outcome_of(bytes_received: dict[str, int], included: dict[str, float] | None = None) -> AllReduceOutcome:
    return AllReduceOutcome(
        vectors={},
        mean_sha256="",
        complete=True,
        missing_parts=(),
        included=dict.fromkeys(bytes_received, 1.0) if included is None else included,
        faults=(),
        links=tuple(
            LinkStats(hotkey=hotkey, bytes_sent=1, bytes_received=size, seconds=0.5, first_byte_s=0.1)
            for hotkey, size in bytes_received.items()
        ),
        bytes_sent=0,
        bytes_received=0,
        seconds=1.0,
    )


def plan_of(*hotkeys: str) -> GroupPlan:
    return GroupPlan(
        run_id="01" * 32,
        round=ROUND,
        attempt=0,
        members=tuple(
            Member(hotkey=hotkey, peer_id=hotkey, maddrs=(), weight=1.0, reduces=True, root=bytes(32))
            for hotkey in hotkeys
        ),
        layout=PayloadLayout([Section(name="delta", num_elements=10, codec="fp32")]),
        send_deadline_s=1.0,
        deadline_s=2.0,
        max_abs=1.0,
    )


@pytest.fixture
def average(tmp_path: Path) -> MovingAverage:
    return MovingAverage(tmp_path / "averages.json", SCORING)


def scores_of(
    average: MovingAverage,
    found: Collected,
    checks: dict[str, CheckResult | None] | None = None,
    miners: tuple[str, ...] = ("a", "b"),
    sat: tuple[str, ...] | None = ("a", "b"),
    outcome: AllReduceOutcome | None = None,
    before: AllReduceOutcome | None = None,
) -> dict[str, Score | Unscored]:
    """With ``sat`` None no all-reduce took place here; ``before`` is what an attempt before it gave."""
    if sat is not None and outcome is None:
        outcome = outcome_of(dict.fromkeys(sat, 1000))
    return score_miners(
        miners=miners,
        collected=found,
        checks=checks or {},
        seen=[(plan_of(*sat), one) for one in (before, outcome) if one is not None] if sat is not None else [],
        average=average,
        round_number=ROUND,
        scoring=SCORING,
    )


def score(found: dict[str, Score | Unscored], hotkey: str) -> Score:
    one = found[hotkey]
    assert isinstance(one, Score), one
    return one


def test_honest_miners_that_were_checked_or_not_score_one(average: MovingAverage) -> None:
    found = scores_of(average, collected("a", "b"), {"a": PASSED})
    assert (score(found, "a").score, score(found, "b").score) == (1.0, 1.0)


def test_whom_our_side_could_not_ask_is_not_scored(average: MovingAverage) -> None:
    found = scores_of(average, collected("b", refused={"a": "timeout"}, ours={"a": "no route"}))
    assert found["a"] == Unscored(why="no route")
    assert score(found, "b").score == 1.0


def test_whose_check_our_side_could_not_do_is_not_scored(average: MovingAverage) -> None:
    found = scores_of(average, collected("a", "b"), {"a": None})
    assert isinstance(found["a"], Unscored)
    assert score(found, "b").score == 1.0


def test_without_an_all_reduce_here_who_worked_is_not_scored(average: MovingAverage) -> None:
    found = scores_of(average, collected("a", refused={"b": "unreachable"}), sat=None)
    assert isinstance(found["a"], Unscored)
    assert score(found, "b").score == 0.0


def test_an_all_reduce_that_could_not_run_here_leaves_workers_unscored(average: MovingAverage) -> None:
    found = score_miners(
        miners=("a",),
        collected=collected("a"),
        checks={},
        seen=[],
        average=average,
        round_number=ROUND,
        scoring=SCORING,
    )
    assert isinstance(found["a"], Unscored)


def test_a_failed_check_scores_zero_even_without_an_all_reduce(average: MovingAverage) -> None:
    one = score(scores_of(average, collected("a"), {"a": LIE}, miners=("a",), sat=None), "a")
    assert (one.score, one.lied) == (0.0, True)


def test_without_a_receipt_the_score_is_zero_though_it_sent_and_says_why(average: MovingAverage) -> None:
    one = score(scores_of(average, collected("b", refused={"a": "bad_signature: forged"})), "a")
    assert (one.score, one.reasons["steps"]) == (0.0, "bad_signature: forged")


def test_a_miner_out_of_the_plan_has_no_bandwidth(average: MovingAverage) -> None:
    one = score(scores_of(average, collected("a", "b"), sat=("b",)), "a")
    assert (one.bandwidth, one.score) == (0.0, SCORING.steps_weight)


def test_a_sender_that_is_only_partly_in_the_mean_was_late(average: MovingAverage) -> None:
    outcome = outcome_of({"a": 1000, "b": 1000}, included={"a": 0.5, "b": 1.0})
    found = scores_of(average, collected("a", "b"), outcome=outcome)
    assert (score(found, "a").bandwidth, score(found, "b").bandwidth) == (0.0, 1.0)
    assert "late" in score(found, "a").reasons["bandwidth"]


def test_what_we_measured_is_our_own_link_and_nothing_that_anybody_says() -> None:
    seen = [(plan_of("a", "b"), outcome_of({"a": 5_000_000}))]
    found = measured(seen, "a")
    assert found is not None
    assert (found.size_bytes, found.in_time) == (5_000_000, True)
    absent = measured(seen, "b")
    assert absent is not None
    assert (absent.size_bytes, absent.in_time) == (0, False)


def fault_of(hotkey: str, kind: Fault = Fault.ABSENT) -> FaultRecord:
    return FaultRecord(hotkey=hotkey, fault=kind, detail="nobody holds the mean of part 1", part=1)


def test_whom_we_saw_at_fault_earns_no_bandwidth_though_it_sent_everything(average: MovingAverage) -> None:
    outcome = dataclasses.replace(outcome_of({"a": 1000, "b": 1000}), faults=(fault_of("b"), fault_of("")))
    found = scores_of(average, collected("a", "b"), outcome=outcome)
    assert score(found, "b").reasons["bandwidth"] == (
        "at fault in the all-reduce: absent: nobody holds the mean of part 1"
    )
    assert [score(found, hotkey).score for hotkey in "ab"] == [1.0, pytest.approx(SCORING.steps_weight)]


def test_silence_towards_us_costs_nothing_where_the_mean_holds_the_sender(average: MovingAverage) -> None:
    outcome = dataclasses.replace(outcome_of({"a": 1000, "b": 1000}), faults=(fault_of("a"),))  # part 1 is b's
    assert score(scores_of(average, collected("a", "b"), outcome=outcome), "a").bandwidth == 1.0


def test_where_every_sender_went_silent_it_is_our_line(average: MovingAverage) -> None:
    cut_off = dataclasses.replace(
        outcome_of({"a": 0, "b": 0}, included={"a": 0.1, "b": 0.1}),
        complete=False,
        faults=(fault_of("a"), fault_of("b")),
    )
    found = scores_of(average, collected("a", "b"), outcome=cut_off)
    assert all(isinstance(found[hotkey], Unscored) for hotkey in "ab")


def test_a_fault_in_an_attempt_that_failed_counts_though_the_next_one_went_well(average: MovingAverage) -> None:
    failed = dataclasses.replace(
        outcome_of({"a": 1000, "b": 1000}), complete=False, missing_parts=(1,), faults=(fault_of("b"),)
    )
    found = scores_of(average, collected("a", "b"), outcome=outcome_of({"a": 1000, "b": 1000}), before=failed)
    assert [score(found, hotkey).bandwidth for hotkey in "ab"] == [1.0, 0.0]


def test_the_attempt_that_gave_a_whole_mean_is_the_one_that_is_measured() -> None:
    whole = outcome_of({"a": 1000})
    broken = dataclasses.replace(outcome_of({"a": 7}, included={"a": 0.1}), complete=False)
    plan = plan_of("a")
    for seen in ([(plan, broken), (plan, whole)], [(plan, whole), (plan, broken)]):
        found = measured(seen, "a")
        assert found is not None
        assert (found.size_bytes, found.in_time) == (1000, True)


def test_one_reducers_word_that_a_sender_was_late_costs_it_nothing(average: MovingAverage) -> None:
    outcome = outcome_of({"a": 1000, "b": 1000}, included={"a": 0.75, "b": 1.0})
    assert score(scores_of(average, collected("a", "b"), outcome=outcome), "a").bandwidth == 1.0


@pytest.mark.parametrize(
    "outcome",
    [
        outcome_of({"a": 0, "b": 1000}),  # it is in the mean, but we reduced nothing, or had stopped
        outcome_of({"a": 0, "b": 0}, included={"a": 0.0, "b": 0.0}),  # no mean came here at all
    ],
)
def test_what_our_own_side_did_not_see_costs_nobody(average: MovingAverage, outcome: AllReduceOutcome) -> None:
    assert isinstance(scores_of(average, collected("a", "b"), outcome=outcome)["a"], Unscored)


def test_in_cooldown_nothing_is_paid(average: MovingAverage) -> None:
    average.update(ROUND - 1, scores_of(average, collected("a", "b"), {"a": LIE}), {"a", "b"})
    found = scores_of(average, collected("a", "b"), {"a": PASSED})
    assert (score(found, "a").score, score(found, "b").score) == (0.0, 1.0)
    assert "cooldown" in score(found, "a").reasons["gradient"]


# -- weights in the mean -------------------------------------------------------------------------------------


def test_a_vector_counts_by_its_receipted_samples(average: MovingAverage) -> None:
    receipts = {"a": receipt("a", 10), "b": receipt("b", 5)}
    assert round_weights(receipts, {"a": PASSED}, average, ROUND) == {"a": 40.0, "b": 20.0}


def test_after_a_failed_check_a_vector_counts_nothing(average: MovingAverage) -> None:
    assert round_weights({"a": receipt("a")}, {"a": LIE}, average, ROUND) == {"a": 0.0}


def test_a_check_that_our_side_could_not_do_takes_no_weight(average: MovingAverage) -> None:
    assert round_weights({"a": receipt("a")}, {"a": None}, average, ROUND) == {"a": 40.0}


def test_in_cooldown_a_vector_counts_nothing_until_it_is_over(average: MovingAverage) -> None:
    average.update(ROUND, scores_of(average, collected("a", "b"), {"a": LIE}), {"a", "b"})
    weights = [
        round_weights({"a": receipt("a")}, {}, average, ROUND + later)["a"]
        for later in range(1, SCORING.cooldown_rounds + 2)
    ]
    assert weights == [0.0] * SCORING.cooldown_rounds + [40.0]


# -- weights on chain ----------------------------------------------------------------------------------------

RATE_LIMIT = 3


@pytest.fixture
def net(tmp_path: Path) -> Iterator[LocalChain]:
    with local_chain(tmp_path, tempo=10, weights_rate_limit=RATE_LIMIT) as made:
        made.register("validator", stake=5000)
        made.register("miner")
        made.register("miner-2")
        made.produce(RATE_LIMIT + 2)
        yield made


def put(net: LocalChain, chain: Chain, shares: dict[str, float]) -> dict[int, float] | None:
    return set_weights(chain, chain.metagraph(), 0, {net.hotkey(name): share for name, share in shares.items()})


def test_shares_go_on_chain_by_uid(net: LocalChain) -> None:
    chain = net.client("validator")
    assert put(net, chain, {"miner": 0.75, "miner-2": 0.25}) == {1: 0.75, 2: 0.25}
    net.produce()
    assert chain.weights()[0] == pytest.approx({1: 0.75, 2: 0.25}, abs=1e-4)


def test_within_the_rate_limit_weights_wait_for_a_later_round(
    net: LocalChain, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    chain = net.client("validator")
    assert put(net, chain, {"miner": 1.0}) is not None
    net.produce(RATE_LIMIT)
    assert put(net, chain, {"miner-2": 1.0}) is None
    assert "weights wait" in caplog.text
    assert set(chain.weights()[0]) == {1}
    net.produce(2)
    assert put(net, chain, {"miner-2": 1.0}) == {2: 1.0}
    net.produce()
    assert set(chain.weights()[0]) == {2}


def test_nobody_weighs_itself_or_who_has_left(net: LocalChain) -> None:
    chain = net.client("validator")
    assert put(net, chain, {"validator": 0.5, "gone": 0.25, "miner": 0.25}) == {1: 0.25}


@pytest.mark.parametrize("shares", [{}, {"validator": 1.0}, {"gone": 1.0}])
def test_without_a_miner_to_pay_nothing_is_set(net: LocalChain, shares: dict[str, float]) -> None:
    chain = net.client("validator")
    assert put(net, chain, shares) is None
    net.produce()
    assert chain.weights().get(0, {}) == {}


def test_a_refusal_of_the_chain_is_logged_and_tried_again_next_round(
    net: LocalChain, caplog: pytest.LogCaptureFixture
) -> None:
    miner = net.client("miner")  # holds no permit
    shares = {net.hotkey("miner-2"): 1.0}
    assert set_weights(miner, miner.metagraph(), 1, shares) is None
    assert "trying again next round" in caplog.text


def test_what_is_proved_beside_the_rounds_checks_counts_though_we_could_not_ask(average: MovingAverage) -> None:
    two = CheckResult(fault=Fault.DOUBLE_COMMIT, detail="signed two receipts for round 6")
    facts = gather_facts(
        miners=["a", "b", "c"],
        collected=collected("b", "c", ours={"a": "no route"}),
        checks={"b": None, "c": PASSED},
        seen=(),
        average=average,
        round_number=ROUND,
        proven=dict.fromkeys(["a", "b", "c", "a validator"], two),
    )
    found = score_facts(facts, SCORING)
    assert set(found) == {"a", "b", "c"}
    for hotkey in found:
        one = score(found, hotkey)
        assert (one.score, one.lied) == (0.0, True)
        assert one.reasons["gradient"] == "double_commit: signed two receipts for round 6"


def test_words_of_any_length_are_cut_before_they_are_scored(average: MovingAverage) -> None:
    facts = gather_facts(
        miners=["a", "b"],
        collected=collected(refused={"a": "x" * 9000}, ours={"b": "y" * 9000}),
        checks={},
        seen=(),
        average=average,
        round_number=ROUND,
    )
    assert all(len(str(facts[hotkey])) < 1000 for hotkey in facts)
