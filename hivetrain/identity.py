"""Who signs: the seam between what makes sense without a chain and the hotkeys of one.

`template.chain.keys` implements it with Bittensor keypairs; tests use Ed25519 from `cryptography`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Verify = Callable[[str, bytes, bytes], bool]
"""``verify(hotkey, message, signature)``: whether that hotkey signed that message. Never raises."""


class Identity(Protocol):
    """Somebody who can sign."""

    @property
    def hotkey(self) -> str:
        """The public name (an ss58 address on Bittensor)."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Sign ``message``; the signature is at most 128 bytes."""
        ...
