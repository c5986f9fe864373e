"""What a reducer computes, and what an auditor computes again. No network, no clock.

A vector counts only as far as its encoded chunks hash to the root that its sender committed to. They are averaged
block by block over the senders that are in, in the plan's order whatever order they arrived in, and encoded once,
under a seed that everyone can derive.

Source: butterfly all-reduce as in Moshpit SGD, section 3, https://arxiv.org/abs/2103.03239
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

from hivetrain.averaging.codecs import Bytes, require_size
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import require_sane
from hivetrain.averaging.messages import Batch
from hivetrain.averaging.robust import BLOCKWISE, get_mean
from hivetrain.errors import Fault, PeerFault
from hivetrain.verification.merkle import verify_range


def decode_committed(plan: GroupPlan, sender: Member, header: Batch, data: Bytes) -> list[Tensor]:
    """Values of a sender's chunks by piece (float32, shape [n] each), checked against what it committed to.

    Raises:
        PeerFault: TRUNCATED, OVERSIZED, NOT_COMMITTED, NOT_FINITE or OUT_OF_BOUND.
    """
    layout, view = plan.layout, memoryview(data)
    require_size(len(view), layout.range_bytes(header.start, header.stop), f"chunks [{header.start}, {header.stop})")
    digests: list[bytes] = []
    values: list[Tensor] = []
    insane: PeerFault | None = None
    for start, stop in plan.pieces(header.start, header.stop):
        size = layout.range_bytes(start, stop)
        digests += layout.chunk_digests(view[:size], start, stop)
        try:
            values.append(decode_sane(plan, start, stop, view[:size]))
        except PeerFault as fault:
            insane = insane or fault
        view = view[size:]
    _require_committed(plan, sender, header, digests)
    if insane is not None:
        raise insane
    return values


def check_committed(plan: GroupPlan, sender: Member, header: Batch, data: Bytes) -> None:
    """Refuse chunks that are not what the sender committed to.

    Raises:
        PeerFault: TRUNCATED, OVERSIZED or NOT_COMMITTED.
    """
    _require_committed(plan, sender, header, plan.layout.chunk_digests(data, header.start, header.stop))


def _require_committed(plan: GroupPlan, sender: Member, header: Batch, digests: Sequence[bytes]) -> None:
    if not verify_range(sender.root or b"", plan.layout.num_chunks, header.start, digests, header.proof):
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
    ranges = plan.blocks(start, stop) if plan.mean in BLOCKWISE else [(start, stop)]
    pieces, position = [], 0
    for first, end in ranges:
        for span in plan.layout.spans(first, end):
            edge = position + span.num_elements
            mean = combine([vector[position:edge] for vector in vectors], weights)
            pieces.append(span.codec.encode(mean, seed + span.first_chunk))
            position = edge
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def rounding_seed(group_id: str) -> int:
    """Seed under which means are encoded: everyone can recompute it."""
    return int.from_bytes(hashlib.sha256(f"hivetrain-mean-seed/1\n{group_id}".encode()).digest()[:6], "big")
