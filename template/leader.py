"""Who leads a round: validators drawn by stake from a block hash, the same order for everyone.

The first of the order leads attempt 0; where it is silent the next one leads attempt 1, and so on. An attempt begins
`schedule.leader_patience` blocks after the one before, at the earliest, so everyone knows when a leader is too early.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

from hivetrain.progress import Phase, attempt_start, phase_window
from hivetrain.run import Schedule

MAX_SITTING = 3
"""Validators that sit in the butterfly as reducers, and may lead: one attempt each."""

MAX_ROUNDS = 256  # orders that are kept: what a manifest of such a round may be checked against


def leader_order(seed: str, stakes: Mapping[str, float]) -> list[str]:
    """Hotkeys in the order in which they lead: drawn by stake without replacement.

    Args:
        seed: a block hash.
        stakes: stake of every permitted validator, by hotkey.

    Returns:
        The first leads, the others stand by in turn.
    """

    # The k-th smallest of Exp(1) / stake is a draw by weight without replacement, and needs no running total.
    # Source: Efraimidis and Spirakis, https://doi.org/10.1016/j.ipl.2005.11.003
    def key(hotkey: str) -> tuple[float, str]:
        digest = hashlib.sha256(f"hivetrain-leader/1\n{seed}\n{hotkey}".encode()).digest()
        uniform = (int.from_bytes(digest[:8], "big") + 1) / (2**64 + 1)
        return -math.log(uniform) / max(stakes[hotkey], 1e-12), hotkey

    return sorted(stakes, key=key)


class Leaders:
    """The orders of the rounds that this neuron saw, and what follows from them. Written by one thread, read by two."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._orders: dict[int, tuple[str, ...]] = {}

    def draw_block(self, round_number: int) -> int:
        """The block whose hash is the seed: the first of VERIFY, when every receipt is signed."""
        return phase_window(round_number, Phase.VERIFY, self._schedule)[0]

    def learn(self, round_number: int, seed: str, stakes: Mapping[str, float]) -> None:
        """Draw and keep the order of a round, with the stakes of that round."""
        orders = {**self._orders, round_number: tuple(leader_order(seed, stakes))}
        self._orders = {known: orders[known] for known in sorted(orders)[-MAX_ROUNDS:]}

    def order(self, round_number: int) -> tuple[str, ...]:
        """The order of that round; empty where it is not known."""
        return self._orders.get(round_number, ())

    def why_not(self, hotkey: str, round_number: int, attempt: int, want: str, block: int) -> str | None:
        """Why ``hotkey`` may not lead that attempt at ``block``, or None when it may.

        Args:
            want: "mean" for an exchange, within ALL_REDUCE; "state" for signatures, until the round ends.
        """
        order = self.order(round_number)[:MAX_SITTING]
        if not order:
            return f"round {round_number} has no leader yet"
        if attempt >= len(order):
            return f"round {round_number} has {len(order)} attempts, got attempt {attempt}"
        if order[attempt] != hotkey:
            return f"attempt {attempt} of round {round_number} is led by {order[attempt]}"
        last_phase = Phase.PUBLISH if want == "state" else Phase.ALL_REDUCE
        start = attempt_start(round_number, attempt, self._schedule)
        end = phase_window(round_number, last_phase, self._schedule)[1]
        # A block of grace: the leader may have seen its time come before we did.
        if not start - 1 <= block < end:
            return f"block {block} is not in attempt {attempt} of round {round_number}, blocks {start} to {end - 1}"
        return None

    def why_no_publisher(self, hotkey: str, round_number: int, attempt: int, permitted: Collection[str]) -> str | None:
        """Why a manifest of that attempt cannot be the work of ``hotkey``, or None when it can.

        Of a round that we did not see the stakes are not known any more: there any permitted validator may have led.
        """
        order = self.order(round_number)
        if not order:
            return None if hotkey in permitted else f"its leader {hotkey} is no permitted validator"
        if attempt < min(len(order), MAX_SITTING) and order[attempt] == hotkey:
            return None
        return f"attempt {attempt} of round {round_number} was not led by {hotkey}"
