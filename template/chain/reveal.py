"""Opening timelocked weights once their beacon round is signed.

The chain itself watches drand's quicknet; the embedded chain has no network, so a commit stays stored until
somebody who knows the round's signature calls `reveal_commits`.
"""

from __future__ import annotations

import logging

import bittensor_core
from bittensor.keyfiles import Keypair

from hivetrain.errors import ChainError
from template.chain.calls import store_weights
from template.chain.faults import DispatchError
from template.chain.ledger import LocalLedger

logger = logging.getLogger(__name__)


def reveal_commits(ledger: LocalLedger, netuid: int, reveal_round: int, signature_hex: str) -> int:
    """Open every stored commit of one beacon round and set its weights; what does not open is dropped.

    Args:
        ledger: the chain.
        netuid: the subnet.
        reveal_round: the drand round.
        signature_hex: its BLS signature, 48 bytes in hex.

    Returns:
        How many commits took effect.

    Raises:
        ChainError: no such subnet.
        ValueError: not that round's signature; nothing is touched.
    """
    probe, _ = bittensor_core.encrypt_at_round(b"probe", reveal_round)
    try:
        bittensor_core.decrypt_with_signature(probe, signature_hex)
    except ValueError as exc:
        raise ValueError(f"not the signature of round {reveal_round}: {exc}") from exc
    num_applied = 0
    with ledger.write() as state:
        subnet = state.subnet(netuid)
        if subnet is None:
            raise ChainError(f"subnet {netuid} does not exist")
        rows = state.execute(
            "SELECT id, hotkey, ciphertext FROM weight_commits WHERE netuid = ? AND reveal_round = ? ORDER BY id",
            (netuid, reveal_round),
        ).fetchall()
        for commit_id, hotkey, ciphertext in rows:
            try:
                uids, values, version_key = _open(ciphertext, reveal_round, signature_hex, hotkey)
                neuron = state.neuron(netuid, hotkey)
                if neuron is None:
                    raise DispatchError("HotKeyNotRegisteredInSubNet", f"{hotkey} has left the subnet")
                store_weights(state, subnet, neuron, uids, values, version_key)
                num_applied += 1
            except (DispatchError, ValueError) as exc:
                logger.warning("weights committed by %s for round %d are dropped: %s", hotkey, reveal_round, exc)
            state.execute("DELETE FROM weight_commits WHERE id = ?", (commit_id,))
    return num_applied


def _open(ciphertext: bytes, reveal_round: int, signature_hex: str, hotkey: str) -> tuple[list[int], list[int], int]:
    """Decrypt one commit: SCALE of (hotkey's public key, uids, values, version_key).

    Raises:
        ValueError: not decryptable, not that layout, or somebody else's.
    """
    envelope = _compact(len(ciphertext)) + ciphertext + reveal_round.to_bytes(8, "little")
    payload = bytes(bittensor_core.decrypt_with_signature(envelope, signature_hex))
    reader = _Reader(payload)
    committer = reader.take(reader.length())
    uids = [reader.uint(2) for _ in range(reader.length())]
    values = [reader.uint(2) for _ in range(reader.length())]
    version_key = reader.uint(8)
    if committer != bytes(Keypair(ss58_address=hotkey).public_key):
        raise ValueError("the payload names another hotkey than its sender")
    return uids, values, version_key


def _compact(value: int) -> bytes:
    """SCALE compact encoding of a length below 2^30."""
    if value < 1 << 6:
        return bytes([value << 2])
    if value < 1 << 14:
        return (value << 2 | 1).to_bytes(2, "little")
    return (value << 2 | 2).to_bytes(4, "little")


class _Reader:
    """Reads SCALE integers from bytes, refusing to run past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        if self._at + size > len(self._data):
            raise ValueError(f"payload ends after {len(self._data)} bytes")
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def length(self) -> int:
        first = self.take(1)
        width = {0: 1, 1: 2, 2: 4}.get(first[0] & 3)
        if width is None:
            raise ValueError("a length of 2^30 or more")
        return int.from_bytes(first + self.take(width - 1), "little") >> 2
