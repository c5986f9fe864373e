"""Keys of those who have none: a peer of a swarm without a chain signs with one that it made when it came.

The all-reduce speaks of hotkeys. Here a hotkey says no more than that the same peer speaks, who named it on a libp2p
stream of its own.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


class SessionKey:
    """An `Identity` that ends with its process."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._hotkey = self._key.public_key().public_bytes_raw().hex()

    @property
    def hotkey(self) -> str:
        """The public key in hex."""
        return self._hotkey

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature."""
        return self._key.sign(message)


def verify(hotkey: str, message: bytes, signature: bytes) -> bool:
    """Whether the owner of that `SessionKey` signed ``message``."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(hotkey)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
