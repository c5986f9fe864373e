"""Identities for tests that need signatures and no chain: Ed25519 behind the `Identity` seam."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


class TestIdentity:
    """Signs with a key derived from ``seed``; the hotkey is the public key in hex, cut to the protocol's 64."""

    __test__ = False

    def __init__(self, seed: int) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed.to_bytes(32, "big"))
        self.hotkey = self._key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> bytes:
        """An Ed25519 signature."""
        return self._key.sign(message)


def verify(hotkey: str, message: bytes, signature: bytes) -> bool:
    """Whether ``hotkey`` signed ``message``."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(hotkey)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
