"""One part on its reducer: check what senders commit to, and average what passed. No network, no clock.

``mean = (w_0 * x_0 + w_1 * x_1 + ...) / (w_0 + w_1 + ...)`` over the senders that are in, in the plan's order
whatever order they arrived in, in float32, each multiply, add and divide an operation of its own: a fused multiply-add
rounds once where two operations round twice, and processors differ in which they use.

Source: butterfly all-reduce as in Moshpit SGD, section 3, https://arxiv.org/abs/2103.03239
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan, Member, Part
from hivetrain.averaging.layout import require_sane
from hivetrain.averaging.messages import Block, blocks
from hivetrain.errors import Fault, PeerFault
from hivetrain.verification.merkle import verify_range


class PartInbox:
    """What one sender has delivered of a part: blocks in order, each checked before it counts."""

    def __init__(self, plan: GroupPlan, part: Part, sender: Member) -> None:
        if sender.root is None:
            raise ValueError(f"{sender.hotkey} sends nothing: it has no root")
        self.sender = sender
        self._plan = plan
        self._root = sender.root
        self._due = list(blocks(part.start, part.stop))
        self._blocks: list[Tensor] = []

    @property
    def next_block(self) -> tuple[int, int] | None:
        """The chunks that come next, or None where all are in."""
        return self._due[len(self._blocks)] if len(self._blocks) < len(self._due) else None

    def check_header(self, block: Block) -> int:
        """Bytes that must follow ``block``.

        Raises:
            PeerFault: MALFORMED: it is not the block that comes next.
        """
        due = self.next_block
        if due != (block.start, block.stop):
            raise PeerFault(Fault.MALFORMED, f"expected chunks {due}, got {(block.start, block.stop)}")
        return self._plan.layout.range_bytes(block.start, block.stop)

    def add(self, block: Block, data: Bytes) -> None:
        """Check a block and keep its values.

        Raises:
            PeerFault: TRUNCATED, OVERSIZED, NOT_COMMITTED, NOT_FINITE or OUT_OF_BOUND.
        """
        layout = self._plan.layout
        digests = layout.chunk_digests(data, block.start, block.stop)
        if not verify_range(self._root, layout.num_chunks, block.start, digests, block.proof):
            raise PeerFault(
                Fault.NOT_COMMITTED, f"chunks [{block.start}, {block.stop}) are not what the sender committed to"
            )
        values = layout.decode_chunks(data, block.start, block.stop)
        require_sane(values, self._plan.max_abs)
        self._blocks.append(values)

    def values(self, index: int) -> Tensor:
        """Values of the part's block ``index``: float32, shape [n]."""
        return self._blocks[index]

    def discard(self) -> None:
        """Forget everything: the sender starts over, or is left out."""
        self._blocks.clear()


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum(w * x) / sum(w)`` in the given order: float32, the shape of each vector. At least one vector."""
    mean = np.zeros(vectors[0].shape, dtype=np.float32)
    total = np.float32(0.0)
    for vector, weight in zip(vectors, weights, strict=True):
        np.add(mean, np.multiply(vector.numpy(), np.float32(weight)), out=mean)
        total = np.float32(total + np.float32(weight))
    return torch.from_numpy(np.divide(mean, total, out=mean))


def reduce_part(plan: GroupPlan, part: Part, inboxes: Sequence[PartInbox]) -> Iterator[bytes]:
    """Encoded mean of the part, block by block, over complete inboxes in the plan's order."""
    seed = rounding_seed(plan.group_id())
    weights = [inbox.sender.weight for inbox in inboxes]
    for index, (start, stop) in enumerate(blocks(part.start, part.stop)):
        mean = weighted_mean([inbox.values(index) for inbox in inboxes], weights)
        yield plan.layout.encode_chunks(mean, start, stop, seed)


def rounding_seed(group_id: str) -> int:
    """Seed under which means are encoded: everyone can recompute it."""
    return int.from_bytes(hashlib.sha256(f"hivetrain-mean-seed/1\n{group_id}".encode()).digest()[:6], "big")
