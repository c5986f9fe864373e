"""The challenge: which windows of a miner's round are replayed.

It derives from a block hash that nobody knew when receipts were signed, both hotkeys, and coins to which the one who
checks committed before: so neither side can choose, and whoever knows the revealed coins can draw again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hivetrain.run import Scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Which windows of one miner's round are replayed. Window j ends at snapshot j. Empty: not drawn."""

    hotkey: str
    windows: tuple[int, ...]

    def snapshots(self, num_snapshots: int) -> tuple[int, ...]:
        """The snapshots that must be opened: both ends of each window, and the last for the link check."""
        wanted = {num_snapshots - 1}
        for window in self.windows:
            wanted.add(window)
            if window > 0:
                wanted.add(window - 1)
        return tuple(sorted(wanted))


def draw(
    *,
    block_hash: str,
    validator: str,
    miner: str,
    coins: bytes,
    num_snapshots: int,
    scoring: Scoring,
    owes: bool = False,
) -> Draw:
    """What the coins say for one miner; recomputable by anyone once they are revealed.

    Args:
        owes: it refused the last check that it was asked for: it is checked whatever the coins say.
    """
    seed = hashlib.sha256(f"hivetrain-challenge/1\n{block_hash}\n{validator}\n{miner}\n".encode() + coins).digest()
    checked, whole = (int.from_bytes(seed[i : i + 8], "big") / 2**64 for i in (0, 8))
    window = int.from_bytes(seed[16:24], "big") * num_snapshots >> 64  # in integers: a float can round up to 1
    if checked >= scoring.check_share and not owes:
        return Draw(hotkey=miner, windows=())
    if whole < scoring.whole_round_share:
        return Draw(hotkey=miner, windows=tuple(range(num_snapshots)))
    return Draw(hotkey=miner, windows=(window,))
