"""A BLAKE3 Merkle tree over ordered leaves, with proofs for contiguous ranges: no network, no clock.

A node has `ARITY` children, the last of a level fewer; one that would have a single child is that child (a duplicated
one lets two leaf lists share a root, CVE-2012-2459). Leaves, inner nodes and the root are hashed under keys of their
own, so none can be passed off as another. The root also binds the number of leaves, from which the shape follows.

BLAKE3 because every byte of an all-reduce is hashed about twice: 16 KiB at a time it is three to four times as fast as
sha256 in hardware. Eight children because a call costs as much as the hash of a few nodes, and proofs stay short.

Sources: RFC 9162, section 2.1 (leaf and node apart); the BLAKE3 paper, section 2 (keyed mode).
Sizes: every digest is 32 raw bytes; a range proof holds at most 14 digests per level.
"""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

DIGEST_BYTES = 32
ARITY = 8
_LEAF, _NODE, _ROOT = (f"hivetrain-merkle/1 {kind}".encode().ljust(32, b"\0") for kind in ("leaf", "node", "root"))


def leaf_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest under which ``data`` is a leaf."""
    return blake3(data, key=_LEAF).digest()


def leaf_digests(data: memoryview, leaf_bytes: int) -> list[bytes]:
    """The digests of ``data`` cut into leaves of ``leaf_bytes``; the last one may be shorter."""
    hasher = blake3(key=_LEAF)  # measured: to reset it takes a quarter of the time less than to make one per leaf
    update, digest, reset = hasher.update, hasher.digest, hasher.reset
    digests = []
    for at in range(0, len(data), leaf_bytes):
        update(data[at : at + leaf_bytes])
        digests.append(digest())
        reset()
    return digests


class MerkleTree:
    """The whole tree over ``leaf_digests``, kept so that ranges can be proved.

    Raises:
        ValueError: no leaves, or one that is not 32 bytes.
    """

    def __init__(self, leaf_digests: Sequence[bytes]) -> None:
        if not leaf_digests:
            raise ValueError("a Merkle tree needs at least one leaf")
        if wrong := {*map(len, leaf_digests)} - {DIGEST_BYTES}:
            raise ValueError(f"leaves must be {DIGEST_BYTES} bytes, got {sorted(wrong)}")
        self._levels = [list(leaf_digests)]
        while len(self._levels[-1]) > 1:
            self._levels.append(_parents(self._levels[-1]))
        self.root: bytes = _root(len(leaf_digests), self._levels[-1][0])

    @property
    def num_leaves(self) -> int:
        """How many leaves the root commits to."""
        return len(self._levels[0])

    def range_proof(self, start: int, stop: int) -> list[bytes]:
        """What a verifier needs beside leaves ``[start, stop)``: per level from the leaves up, the siblings to the left
        of the range, then those to its right.

        Raises:
            ValueError: the range is empty or outside the tree.
        """
        if not 0 <= start < stop <= self.num_leaves:
            raise ValueError(f"range must lie in [0, {self.num_leaves}) and not be empty, got [{start}, {stop})")
        proof: list[bytes] = []
        for level in self._levels[:-1]:
            first, last = _families(start, stop, len(level))
            proof += level[first:start] + level[stop:last]
            start, stop = first // ARITY, -(-last // ARITY)
        return proof


def verify_range(
    root: bytes, num_leaves: int, start: int, leaf_digests: Sequence[bytes], proof: Sequence[bytes]
) -> bool:
    """Whether ``leaf_digests`` are leaves ``start, start + 1, ...`` of the tree of ``num_leaves`` under ``root``.

    Never raises: a proof that is too short, too long or not made of digests is simply refused.
    """
    stop = start + len(leaf_digests)
    if not 0 <= start < stop <= num_leaves:
        return False
    if not {*map(len, leaf_digests), *map(len, proof)} <= {DIGEST_BYTES}:
        return False
    nodes, used, size = list(leaf_digests), 0, num_leaves
    while size > 1:
        first, last = _families(start, stop, size)
        left, right = used + start - first, used + (start - first) + (last - stop)
        if right > len(proof):
            return False
        nodes, used = _parents([*proof[used:left], *nodes, *proof[left:right]]), right
        start, stop, size = first // ARITY, -(-last // ARITY), -(-size // ARITY)
    return used == len(proof) and _root(num_leaves, nodes[0]) == root


def _families(start: int, stop: int, size: int) -> tuple[int, int]:
    """The nodes ``[first, last)`` of a level that share a parent with one of ``[start, stop)``."""
    return start // ARITY * ARITY, min(size, -(-stop // ARITY) * ARITY)


def _parents(nodes: Sequence[bytes]) -> list[bytes]:
    """Of nodes that begin with a first child. One left alone is its own parent."""
    families = [nodes[first : first + ARITY] for first in range(0, len(nodes), ARITY)]
    return [blake3(b"".join(some), key=_NODE).digest() if len(some) > 1 else some[0] for some in families]


def _root(num_leaves: int, top: bytes) -> bytes:
    return blake3(num_leaves.to_bytes(8, "big") + top, key=_ROOT).digest()
