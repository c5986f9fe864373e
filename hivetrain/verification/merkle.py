"""A sha256 Merkle tree over ordered leaves, with proofs for contiguous ranges: no network, no clock.

Leaves, inner nodes and the root are hashed under tags of their own (0x00, 0x01, 0x02), so none can be passed off
as another. An odd last node is promoted, never duplicated (a duplicated one lets two leaf lists share a root,
CVE-2012-2459). The root also binds the number of leaves, without which trees of 3 and 4 leaves share proofs.

Source: RFC 9162, section 2.1 (the tags of leaf and node).
Sizes: every digest is 32 raw bytes; a range proof holds at most two digests per level.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DIGEST_BYTES = 32
_LEAF, _NODE, _ROOT = b"\x00", b"\x01", b"\x02"


def leaf_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest under which ``data`` is a leaf."""
    digest = hashlib.sha256(_LEAF)
    digest.update(data)
    return digest.digest()


class MerkleTree:
    """The whole tree over ``leaf_digests``, kept so that ranges can be proved.

    Raises:
        ValueError: no leaves, or one that is not 32 bytes.
    """

    def __init__(self, leaf_digests: Sequence[bytes]) -> None:
        if not leaf_digests:
            raise ValueError("a Merkle tree needs at least one leaf")
        for index, digest in enumerate(leaf_digests):
            if len(digest) != DIGEST_BYTES:
                raise ValueError(f"leaf {index} must be {DIGEST_BYTES} bytes, got {len(digest)}")
        self._levels = [list(leaf_digests)]
        while len(self._levels[-1]) > 1:
            self._levels.append(_parents(self._levels[-1]))
        self.root: bytes = _root(len(leaf_digests), self._levels[-1][0])

    @property
    def num_leaves(self) -> int:
        """How many leaves the root commits to."""
        return len(self._levels[0])

    def range_proof(self, start: int, stop: int) -> list[bytes]:
        """What a verifier needs beside leaves ``[start, stop)``: per level from the leaves up, left before right.

        Raises:
            ValueError: the range is empty or outside the tree.
        """
        if not 0 <= start < stop <= self.num_leaves:
            raise ValueError(f"range must lie in [0, {self.num_leaves}) and not be empty, got [{start}, {stop})")
        proof: list[bytes] = []
        for level in self._levels[:-1]:
            if start % 2:
                proof.append(level[start - 1])
            if stop % 2 and stop < len(level):
                proof.append(level[stop])
            start, stop = start // 2, (stop + 1) // 2
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
    if any(len(digest) != DIGEST_BYTES for digest in (*leaf_digests, *proof)):
        return False
    nodes, remaining, size = list(leaf_digests), list(reversed(proof)), num_leaves
    while size > 1:
        if start % 2:
            if not remaining:
                return False
            nodes.insert(0, remaining.pop())
            start -= 1
        if stop % 2 and stop < size:
            if not remaining:
                return False
            nodes.append(remaining.pop())
        nodes = _parents(nodes)
        start, stop, size = start // 2, (stop + 1) // 2, (size + 1) // 2
    return not remaining and _root(num_leaves, nodes[0]) == root


def _parents(nodes: Sequence[bytes]) -> list[bytes]:
    parents = [hashlib.sha256(_NODE + nodes[i] + nodes[i + 1]).digest() for i in range(0, len(nodes) - 1, 2)]
    if len(nodes) % 2:
        parents.append(nodes[-1])
    return parents


def _root(num_leaves: int, top: bytes) -> bytes:
    return hashlib.sha256(_ROOT + num_leaves.to_bytes(8, "big") + top).digest()
