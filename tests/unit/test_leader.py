"""Who leads which attempt: drawn by stake, the same order for everyone, and each in its time."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.progress import attempt_start
from hivetrain.run import Schedule
from template.leader import MAX_ROUNDS, MAX_SITTING, Leaders, leader_order

stakes = st.dictionaries(st.text(max_size=5), st.floats(0, 1e9), max_size=6)


def test_the_order_is_this_one() -> None:
    assert leader_order("0xabc", {"a": 1.0, "b": 1.0, "c": 1.0}) == by_hand("0xabc", ["a", "b", "c"])


def by_hand(seed: str, hotkeys: list[str]) -> list[str]:
    """With equal stakes the largest draw leads."""
    draws = {h: hashlib.sha256(f"hivetrain-leader/1\n{seed}\n{h}".encode()).digest()[:8] for h in hotkeys}
    return sorted(hotkeys, key=lambda h: draws[h], reverse=True)


@given(st.text(max_size=8), stakes, st.randoms())
def test_the_order_does_not_depend_on_the_order_of_the_question(
    seed: str, group: dict[str, float], shuffler: random.Random
) -> None:
    items = list(group.items())
    shuffler.shuffle(items)
    assert leader_order(seed, dict(items)) == leader_order(seed, group)


@given(st.text(max_size=8), stakes)
def test_everyone_is_in_the_order_once(seed: str, group: dict[str, float]) -> None:
    assert sorted(leader_order(seed, group)) == sorted(group)


@pytest.mark.parametrize(("rich", "share"), [(3.0, 0.75), (1.0, 0.5), (9.0, 0.9)])
def test_a_validator_leads_as_often_as_its_stake_says(rich: float, share: float) -> None:
    num_seeds = 4000
    led = sum(leader_order(f"0x{seed:064x}", {"rich": rich, "poor": 1.0})[0] == "rich" for seed in range(num_seeds))
    # Four standard deviations of a binomial: the seeds are fixed, so this is no matter of luck.
    assert abs(led / num_seeds - share) < 4 * (share * (1 - share) / num_seeds) ** 0.5


def test_the_stand_by_is_drawn_by_stake_as_well() -> None:
    group = {"a": 6.0, "b": 3.0, "c": 1.0}
    orders = [leader_order(str(seed), group) for seed in range(4000)]
    second = [order[1] for order in orders if order[0] == "a"]
    assert abs(second.count("b") / len(second) - 0.75) < 0.04


def test_without_stake_one_leads_only_where_nobody_else_can() -> None:
    assert all(leader_order(str(seed), {"none": 0.0, "some": 1.0})[0] == "some" for seed in range(200))
    assert leader_order("x", {"none": 0.0}) == ["none"]
    assert leader_order("x", {}) == []


# -- attempts ------------------------------------------------------------------------------------------------

SCHEDULE = Schedule(start_block=0, train=5, commit=2, verify=3, all_reduce=6, publish=4, leader_patience=2)
ROUND = 1
START = SCHEDULE.round_blocks + 10  # first block of ALL_REDUCE; PUBLISH begins at START + 6 and ends at START + 10
STAKES = {f"validator-{number}": 100.0 for number in range(5)}


def leaders(*rounds: int) -> Leaders:
    made = Leaders(SCHEDULE)
    for number in rounds or (ROUND,):
        made.learn(number, "0xabc", STAKES)
    return made


ORDER = leaders().order(ROUND)


def test_the_seed_is_the_hash_of_the_first_block_of_verify() -> None:
    assert leaders().draw_block(ROUND) == SCHEDULE.round_blocks + 7


def test_attempts_begin_a_patience_apart() -> None:
    assert [attempt_start(ROUND, attempt, SCHEDULE) for attempt in range(3)] == [START, START + 2, START + 4]


@pytest.mark.parametrize(
    ("place", "attempt", "want", "block", "says"),
    [
        (0, 0, "mean", START, None),
        (0, 0, "mean", START - 1, None),  # a block of grace
        (0, 0, "mean", START - 2, "not in attempt 0"),
        (0, 0, "mean", START + 5, None),  # late, but the next one has not begun
        (0, 0, "mean", START + 6, "not in attempt 0"),
        (1, 0, "mean", START, "is led by"),
        (0, 1, "mean", START + 2, "is led by"),
        (1, 1, "mean", START, f"blocks {START + 2} to {START + 5}"),  # too early
        (1, 1, "mean", START + 1, None),
        (1, 1, "mean", START + 2, None),
        (2, 2, "mean", START + 2, "not in attempt 2"),
        (2, 2, "mean", START + 4, None),
        (3, 3, "mean", START + 5, "has 3 attempts, got attempt 3"),
        (1, 1, "state", START, "not in attempt 1"),
        (1, 1, "state", START + 9, None),
        (1, 1, "state", START + 10, "not in attempt 1"),
        (2, 1, "state", START + 8, "is led by"),
    ],
)
def test_only_the_attempts_own_leader_is_heard_and_only_in_its_time(
    place: int, attempt: int, want: str, block: int, says: str | None
) -> None:
    why = leaders().why_not(ORDER[place], ROUND, attempt, want, block)
    assert (why is None) if says is None else (why is not None and says in why)


def test_in_a_round_that_was_not_seen_nobody_leads() -> None:
    assert leaders().why_not(ORDER[0], ROUND + 1, 0, "mean", START) == f"round {ROUND + 1} has no leader yet"


def test_with_one_validator_there_is_one_attempt() -> None:
    made = Leaders(SCHEDULE)
    made.learn(ROUND, "0xabc", {"only": 1.0})
    assert made.why_not("only", ROUND, 0, "mean", START) is None
    assert "has 1 attempts" in (made.why_not("only", ROUND, 1, "mean", START + 2) or "")


@pytest.mark.parametrize("attempt", range(MAX_SITTING))
def test_a_manifest_of_a_round_that_we_saw_is_of_the_attempts_own_leader(attempt: int) -> None:
    made = leaders()
    assert made.why_no_publisher(ORDER[attempt], ROUND, attempt, STAKES) is None
    for other in set(STAKES) - {ORDER[attempt]}:
        refused = made.why_no_publisher(other, ROUND, attempt, STAKES)
        assert refused == f"attempt {attempt} of round {ROUND} was not led by {other}"


def test_a_manifest_of_an_attempt_that_nobody_leads_is_refused() -> None:
    assert leaders().why_no_publisher(ORDER[MAX_SITTING], ROUND, MAX_SITTING, STAKES) is not None


def test_a_manifest_of_a_round_that_we_did_not_see_is_of_a_permitted_validator() -> None:
    made = leaders()
    assert made.why_no_publisher(ORDER[4], ROUND + 1, 0, STAKES) is None
    assert "no permitted validator" in str(made.why_no_publisher("miner", ROUND + 1, 0, STAKES))


def test_only_so_many_orders_are_kept() -> None:
    made = leaders(*range(MAX_ROUNDS + 3))
    assert [bool(made.order(number)) for number in (0, 2, 3, MAX_ROUNDS + 2)] == [False, False, True, True]
