"""Blocks to phases: a pure function that covers every block exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hivetrain.progress import Phase, phase_at, phase_window
from hivetrain.run import Schedule

SCHEDULE = Schedule(start_block=10, train=5, commit=2, verify=3, all_reduce=4, publish=1)


def test_each_phase_begins_where_the_last_ends() -> None:
    starts = {phase: phase_window(0, phase, SCHEDULE) for phase in Phase}
    assert starts == {
        Phase.TRAIN: (10, 15),
        Phase.COMMIT: (15, 17),
        Phase.VERIFY: (17, 20),
        Phase.ALL_REDUCE: (20, 24),
        Phase.PUBLISH: (24, 25),
    }


def test_blocks_before_the_start_belong_to_no_round() -> None:
    position = phase_at(9, SCHEDULE)
    assert (position.round, position.phase, position.phase_end) == (-1, Phase.PUBLISH, 10)


def test_the_second_round_begins_after_the_first() -> None:
    position = phase_at(25, SCHEDULE)
    assert (position.round, position.phase, position.round_start) == (1, Phase.TRAIN, 25)


@given(st.integers(10, 100_000))
def test_a_block_lies_inside_the_window_of_its_phase(block: int) -> None:
    position = phase_at(block, SCHEDULE)
    assert phase_window(position.round, position.phase, SCHEDULE) == (position.phase_start, position.phase_end)
    assert position.phase_start <= block < position.phase_end
    assert position.round_start == phase_window(position.round, Phase.TRAIN, SCHEDULE)[0]
