"""Who leads: drawn by stake, the same order for everyone."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from template.leader import leader_order

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
