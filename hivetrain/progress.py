"""Where a block lies in its round: a pure function, so that every neuron agrees without talking.

Blocks are the only clock that neurons share. A round is a fixed number of blocks, cut into five phases; a
failed round is skipped, never waited for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from hivetrain.run import Schedule


class Phase(enum.Enum):
    """The five phases of a round, in their order."""

    TRAIN = "train"  # miners take inner steps on their assigned data
    COMMIT = "commit"  # miners hand in signed receipts
    VERIFY = "verify"  # validators challenge and replay a sample
    ALL_REDUCE = "all_reduce"  # the group averages
    PUBLISH = "publish"  # the leader publishes the next epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where one block lies.

    Attributes:
        block: the block that was asked about.
        round: counted from 0 at ``schedule.start_block``; -1 before it.
        phase: the phase that the block belongs to.
        round_start: the round's first block.
        phase_start: the phase's first block.
        phase_end: the first block *after* the phase.
    """

    block: int
    round: int
    phase: Phase
    round_start: int
    phase_start: int
    phase_end: int


def phase_at(block: int, schedule: Schedule) -> Position:
    """The position of ``block``. Before the start, every block counts as PUBLISH of round -1."""
    if block < schedule.start_block:
        return Position(
            block=block, round=-1, phase=Phase.PUBLISH, round_start=0, phase_start=0, phase_end=schedule.start_block
        )
    round_number, offset = divmod(block - schedule.start_block, schedule.round_blocks)
    round_start = block - offset
    start = round_start
    for phase, num_blocks in zip(Phase, schedule.phase_blocks, strict=True):
        end = start + num_blocks
        if block < end:
            return Position(
                block=block, round=round_number, phase=phase, round_start=round_start, phase_start=start, phase_end=end
            )
        start = end
    raise AssertionError("the phases cover the round")


def phase_window(round_number: int, phase: Phase, schedule: Schedule) -> tuple[int, int]:
    """``(first block, first block after)`` of one phase of one round."""
    start = schedule.start_block + round_number * schedule.round_blocks
    for candidate, num_blocks in zip(Phase, schedule.phase_blocks, strict=True):
        if candidate is phase:
            return start, start + num_blocks
        start += num_blocks
    raise AssertionError("every phase is in the enum")


def attempt_start(round_number: int, attempt: int, schedule: Schedule) -> int:
    """First block at which that attempt at the round's all-reduce may begin; it may lie past ALL_REDUCE."""
    return phase_window(round_number, Phase.ALL_REDUCE, schedule)[0] + attempt * schedule.leader_patience
