"""Who leads a round: validators drawn by stake from a block hash, the same order for everyone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

MAX_SITTING = 3
"""Validators that sit in the butterfly as reducers."""


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
