"""How fast members send, as this validator measured it over rounds; from it, how large a part each one reduces.

A reducer takes its part from everyone and sends the mean to everyone: with equal parts the slowest line decides how
long a round takes. Rates are of earlier rounds, so nobody can talk itself into a part of another size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from statistics import median

from hivetrain.averaging.butterfly import LinkStats
from hivetrain.scoring.score import SMALL_BYTES

NUM_ROUNDS = 8
SMALLEST_SHARE, LARGEST_SHARE = 0.5, 2.0
"""A part is at most four times another: one bad measurement moves no more than that."""


class LinkBook:
    """The last rates of each member, in bytes per second."""

    def __init__(self) -> None:
        self._rates: dict[str, deque[float]] = {}

    def note(self, links: Iterable[LinkStats]) -> None:
        """Take one all-reduce in. Below a megabyte a rate measures latency, and is left out."""
        for link in links:
            if link.bytes_received >= SMALL_BYTES and link.seconds > 0:
                rates = self._rates.setdefault(link.hotkey, deque(maxlen=NUM_ROUNDS))
                rates.append(link.bytes_received / link.seconds)

    def forget(self, registered: Collection[str]) -> None:
        """Drop everyone who is not registered any more."""
        self._rates = {hotkey: rates for hotkey, rates in self._rates.items() if hotkey in registered}

    def shares(self) -> dict[str, float]:
        """Relative size of each member's part: its median rate over the median member's, in [0.5, 2].

        Who was not measured is not in it, and counts as 1.
        """
        rates = {hotkey: median(known) for hotkey, known in self._rates.items()}
        if not rates:
            return {}
        typical = median(rates.values())
        return {hotkey: min(LARGEST_SHARE, max(SMALLEST_SHARE, rate / typical)) for hotkey, rate in rates.items()}
