"""What a validator does next in a round's all-reduce: wait, lead, complete what a silent leader left, or go on.

Pure: the newest block and what happened here go in, one move comes out; so every validator that sees the same acts in
its turn, and a test needs no clock. The leader of attempt k is the k-th of the round's order.

- Nobody has called by the block at which attempt k begins: its leader leads.
- An exchange that this validator sat in ended without a state: the next leader leads at once, the one after it
  `patience` blocks later.
- This validator holds the result of an attempt, and PUBLISH has lasted `patience` blocks without an epoch: the leader
  is silent. The next one asks the members to sign the very state that they hold, and publishes it.
- A leader that was silent itself and comes back when the next one may lead leaves the round to it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Move(enum.Enum):
    """What to do now."""

    WAIT = "wait"  # look again at the next block
    LEAD = "lead"  # name a group and exchange
    COMPLETE = "complete"  # have the result that we hold signed, and publish it
    OVER = "over"  # nothing is left to do for this round's epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where one validator stands in one round.

    Attributes:
        place: its place in the leader order: the attempt that it may lead.
        num_leaders: how many of the order may lead.
        block: the newest.
        start, end, round_end: first block of ALL_REDUCE, of PUBLISH, and of the next round.
        patience: blocks of silence after which the next one leads.
        heard: the highest attempt whose leader called here; -1: none.
        held: the newest attempt whose whole result we hold; -1: none.
        failed: the newest attempt that ended here without a state; -1: none.
        failed_at: the newest block when it did.
        has_led: whether we led our attempt, or completed another's.
        is_published: whether the round's epoch is anchored.
    """

    place: int
    num_leaders: int
    block: int
    start: int
    end: int
    round_end: int
    patience: int
    heard: int = -1
    held: int = -1
    failed: int = -1
    failed_at: int = -1
    has_led: bool = False
    is_published: bool = False


def next_move(seat: Seat) -> Move:
    """What the validator in ``seat`` does now."""
    if seat.is_published or seat.block >= seat.round_end:
        return Move.OVER
    others_may_lead = seat.place + 1 < seat.num_leaders
    if seat.has_led and (seat.held >= 0 or not others_may_lead):
        return Move.OVER
    if seat.held >= 0:
        return _holding(seat)
    if seat.block >= seat.end:
        return Move.OVER
    if seat.has_led or seat.place >= seat.num_leaders or seat.heard > seat.place:
        return Move.WAIT  # another may call us, until ALL_REDUCE is over
    if seat.heard < 0 and others_may_lead and seat.block >= lead_at(seat) + seat.patience:
        return Move.WAIT  # too late: the next one leads by now
    return Move.LEAD if seat.block >= lead_at(seat) else Move.WAIT


def _holding(seat: Seat) -> Move:
    """With a result in hand: its leader publishes, or the next one after a while in PUBLISH, or the one after that."""
    complete_at = seat.end + (seat.place - seat.held) * seat.patience
    if seat.place >= seat.num_leaders or seat.place <= seat.held or complete_at >= seat.round_end:
        return Move.WAIT if seat.block < seat.end else Move.OVER
    return Move.COMPLETE if seat.block >= complete_at else Move.WAIT


def lead_at(seat: Seat) -> int:
    """First block at which this validator leads; ``seat.end`` where it does not."""
    own_start = seat.start + seat.place * seat.patience
    if own_start >= seat.end:
        return seat.end
    if seat.heard < 0:
        return own_start
    if seat.failed < seat.heard:
        return seat.end  # somebody leads, and we are not in its group: it is not silent
    return max(own_start, seat.failed_at + (seat.place - seat.failed - 1) * seat.patience)


def attempt_blocks(seat: Seat) -> int:
    """How many blocks an exchange that we lead now may take.

    It ends `patience` blocks before PUBLISH where another validator could lead after us, so that it has time to.
    """
    left = seat.end - seat.block
    reserve = seat.patience if seat.place + 1 < seat.num_leaders else 0
    return left - reserve if left > reserve else left


__all__ = ["Move", "Seat", "attempt_blocks", "lead_at", "next_move"]
