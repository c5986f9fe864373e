"""What a reducer computes, and what an auditor computes again. No network, no clock.

A vector counts only as far as its encoded chunks hash to the root that its sender committed to. A batch of them is
averaged block by block over the senders that are in, in the plan's order whatever order they arrived in, and encoded
once, under a seed that everyone can derive.

Source: butterfly all-reduce as in Moshpit SGD, section 3, https://arxiv.org/abs/2103.03239
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import require_sane
from hivetrain.averaging.messages import Batch
from hivetrain.averaging.robust import get_mean
from hivetrain.errors import Fault, PeerFault
from hivetrain.verification.merkle import verify_range


def decode_committed(plan: GroupPlan, sender: Member, header: Batch, data: Bytes) -> Tensor:
    """Values of a sender's chunks (float32, shape [n]), checked against what it committed to.

    Raises:
        PeerFault: TRUNCATED, OVERSIZED, NOT_COMMITTED, NOT_FINITE or OUT_OF_BOUND.
    """
    check_committed(plan, sender, header, data)
    return decode_sane(plan, header.start, header.stop, data)


def check_committed(plan: GroupPlan, sender: Member, header: Batch, data: Bytes) -> None:
    """Refuse chunks that are not what the sender committed to.

    Raises:
        PeerFault: TRUNCATED, OVERSIZED or NOT_COMMITTED.
    """
    layout = plan.layout
    digests = layout.chunk_digests(data, header.start, header.stop)
    root = sender.root or b""
    if not verify_range(root, layout.num_chunks, header.start, digests, header.proof):
        raise PeerFault(
            Fault.NOT_COMMITTED, f"chunks [{header.start}, {header.stop}) are not what {sender.hotkey} committed to"
        )


def decode_sane(plan: GroupPlan, start: int, stop: int, data: Bytes) -> Tensor:
    """Values of chunks ``[start, stop)``: float32, shape [n].

    Raises:
        PeerFault: TRUNCATED, OVERSIZED, NOT_FINITE or OUT_OF_BOUND.
    """
    values = plan.layout.decode_chunks(data, start, stop)
    require_sane(values, plan.max_abs)
    return values


def reduce_chunks(
    plan: GroupPlan, start: int, stop: int, vectors: Sequence[Tensor], weights: Sequence[float], seed: int
) -> bytes:
    """Encoded mean of chunks ``[start, stop)``, which begin with a block, from vectors in the plan's order.

    Sections are joined apart: in a norm over both, second moments would vanish beside the pseudo-gradient.
    """
    combine = get_mean(plan.mean)
    pieces, position = [], 0
    for first, end in plan.blocks(start, stop):
        for span in plan.layout.spans(first, end):
            edge = position + span.num_elements
            mean = combine([vector[position:edge] for vector in vectors], weights)
            pieces.append(span.codec.encode(mean, seed + span.first_chunk))
            position = edge
    return b"".join(pieces)


def rounding_seed(group_id: str) -> int:
    """Seed under which means are encoded: everyone can recompute it."""
    return int.from_bytes(hashlib.sha256(f"hivetrain-mean-seed/1\n{group_id}".encode()).digest()[:6], "big")
