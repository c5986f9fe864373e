"""Whose turn it is in a round's all-reduce, block by block: no clock, no network."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from template.validator.standby import Move, Seat, attempt_blocks, lead_at, next_move

START, END, ROUND_END, PATIENCE = 100, 108, 116, 2
LEADER = Seat(place=0, num_leaders=3, block=START, start=START, end=END, round_end=ROUND_END, patience=PATIENCE)
SECOND = dataclasses.replace(LEADER, place=1)
THIRD = dataclasses.replace(LEADER, place=2)
ALONE = dataclasses.replace(LEADER, num_leaders=1)


def moves(seat: Seat, **changes: object) -> dict[int, Move]:
    """Its move at every block from ALL_REDUCE to the next round, if nothing else changes."""
    changed = dataclasses.replace(seat, **changes)  # type: ignore[arg-type]
    return {block: next_move(dataclasses.replace(changed, block=block)) for block in range(START, ROUND_END + 1)}


def first(seat: Seat, move: Move, **changes: object) -> int | None:
    """The first block at which it makes that move."""
    return next((block for block, made in moves(seat, **changes).items() if made is move), None)


def test_the_leader_leads_at_once() -> None:
    assert next_move(LEADER) is Move.LEAD
    assert next_move(ALONE) is Move.LEAD


def test_where_nobody_calls_the_next_leads_after_its_patience_and_the_third_after_another() -> None:
    assert first(SECOND, Move.LEAD) == START + PATIENCE
    assert first(THIRD, Move.LEAD) == START + 2 * PATIENCE


def test_a_fourth_never_leads() -> None:
    fourth = dataclasses.replace(LEADER, place=3)
    assert set(moves(fourth).values()) == {Move.WAIT, Move.OVER}
    assert first(fourth, Move.OVER) == END


def test_a_leader_that_comes_back_late_leaves_the_round_to_the_next_one() -> None:
    late = moves(LEADER)
    assert [late[block] for block in (START, START + 1)] == [Move.LEAD] * 2
    assert {late[block] for block in range(START + PATIENCE, END)} == {Move.WAIT}


def test_nobody_else_leads_so_a_late_leader_does() -> None:
    assert moves(ALONE)[END - 1] is Move.LEAD
    assert moves(THIRD)[END - 1] is Move.LEAD


def test_nobody_leads_when_all_reduce_is_over() -> None:
    for seat in (LEADER, SECOND, THIRD, ALONE):
        assert next_move(dataclasses.replace(seat, block=END)) is Move.OVER


def test_an_attempt_that_would_begin_in_publish_is_none() -> None:
    slow = dataclasses.replace(SECOND, patience=END - START)
    assert first(slow, Move.LEAD) is None
    assert lead_at(slow) == END


def test_who_was_called_but_is_not_in_the_group_waits() -> None:
    assert set(moves(SECOND, heard=0).values()) == {Move.WAIT, Move.OVER}
    assert first(SECOND, Move.OVER, heard=0) == END


def test_an_attempt_that_failed_is_followed_by_the_next_leader_at_once() -> None:
    assert first(SECOND, Move.LEAD, heard=0, failed=0, failed_at=START + 5) == START + 5
    # Not before its attempt may begin: everyone would refuse it.
    assert first(SECOND, Move.LEAD, heard=0, failed=0, failed_at=START) == START + PATIENCE


def test_the_third_lets_the_second_go_first_after_a_failure() -> None:
    assert first(THIRD, Move.LEAD, heard=0, failed=0, failed_at=START + 3) == START + 3 + PATIENCE
    assert first(THIRD, Move.LEAD, heard=1, failed=1, failed_at=START + 5) == START + 5


def test_a_failed_attempt_does_not_make_a_later_one_silent_that_we_only_heard_of() -> None:
    assert first(THIRD, Move.LEAD, heard=1, failed=0, failed_at=START + 1) is None


def test_whose_turn_has_passed_leads_no_more() -> None:
    assert first(SECOND, Move.LEAD, heard=2) is None


def test_who_has_led_in_vain_waits_for_the_next_and_where_there_is_none_goes_on() -> None:
    assert next_move(dataclasses.replace(LEADER, has_led=True, failed=0, failed_at=START)) is Move.WAIT
    assert next_move(dataclasses.replace(ALONE, has_led=True, failed=0, failed_at=START)) is Move.OVER


def test_who_has_led_to_a_result_goes_on_whether_or_not_the_hub_took_it() -> None:
    assert next_move(dataclasses.replace(LEADER, has_led=True, heard=0, held=0)) is Move.OVER


def test_a_published_epoch_ends_everybodys_part() -> None:
    for seat in (LEADER, SECOND, THIRD, dataclasses.replace(SECOND, heard=0, held=0)):
        assert next_move(dataclasses.replace(seat, is_published=True)) is Move.OVER


def test_who_holds_the_result_completes_it_when_its_leader_stays_silent_in_publish() -> None:
    assert first(SECOND, Move.COMPLETE, heard=0, held=0) == END + PATIENCE
    assert first(THIRD, Move.COMPLETE, heard=0, held=0) == END + 2 * PATIENCE
    assert first(THIRD, Move.COMPLETE, heard=1, held=1) == END + PATIENCE
    assert first(SECOND, Move.LEAD, heard=0, held=0) is None  # no second exchange


def test_a_result_whose_turn_comes_after_the_round_is_left() -> None:
    tight = dataclasses.replace(THIRD, round_end=END + 2 * PATIENCE, heard=0, held=0)
    assert first(tight, Move.COMPLETE) is None
    assert first(tight, Move.OVER) == END


def test_the_result_of_a_later_attempt_is_not_ours_to_complete() -> None:
    assert first(LEADER, Move.COMPLETE, heard=1, held=1, has_led=False) is None
    assert first(SECOND, Move.COMPLETE, heard=2, held=2) is None


def test_everything_ends_with_the_round() -> None:
    assert next_move(dataclasses.replace(SECOND, heard=0, held=0, block=ROUND_END)) is Move.OVER


@given(st.integers(1, 3), st.integers(1, 8), st.integers(START, END - 1))
def test_at_no_block_do_two_validators_that_saw_the_same_begin_to_lead(
    num_leaders: int, patience: int, block: int
) -> None:
    seats = [
        dataclasses.replace(LEADER, place=place, num_leaders=num_leaders, patience=patience, block=block)
        for place in range(num_leaders)
    ]
    assert sum(next_move(seat) is Move.LEAD for seat in seats) <= 1


def test_an_exchange_leaves_time_for_the_next_one_where_there_is_one() -> None:
    assert attempt_blocks(LEADER) == END - START - PATIENCE
    assert attempt_blocks(ALONE) == END - START
    assert attempt_blocks(dataclasses.replace(THIRD, block=START + 4)) == 4
    assert attempt_blocks(dataclasses.replace(SECOND, block=END - 1)) == 1  # never less than what is left of the phase


@pytest.mark.parametrize("block", range(START, END))
def test_an_exchange_never_takes_longer_than_all_reduce(block: int) -> None:
    for seat in (LEADER, SECOND, THIRD, ALONE):
        blocks = attempt_blocks(dataclasses.replace(seat, block=block))
        assert 0 < blocks <= END - block
