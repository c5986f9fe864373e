"""What a group that hivemind has formed does: one all-reduce of hivetrain's, of one flat vector.

Everyone who ends it holds the same bits, whatever the codec. Where all bring the same bits already, as they do when
peers that went through the same rounds average their states, there is nothing to send.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.butterfly import all_reduce
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.errors import ServiceError
from hivetrain.identity import Identity
from hivetrain.trainer.keys import verify
from hivetrain.trainer.meeting import Meeting
from hivetrain.verification.merkle import MerkleTree

SECTION = "values"
LOSSLESS = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaged:
    """What became of a group's vectors.

    Attributes:
        mean: float32, shape [n], valid until the next exchange; None: what we brought is the mean.
        weights: per peer id of the group, its weight, times the share of the mean that it is in.
        sent_bytes: that we sent, without framing.
    """

    mean: Tensor | None
    weights: Mapping[str, float]
    sent_bytes: int


class Vector:
    """Tensors as one flat vector, and memory that is kept from round to round.

    Args:
        tensors: of any float type; their shapes and places stay. Cut from one flat float32 vector, as `cut_from_one`
            makes them, they travel from where they are; others are copied first.
        codec: under which they travel.
    """

    def __init__(self, tensors: Sequence[Tensor], codec: str) -> None:
        self._sizes = [tensor.numel() for tensor in tensors]
        self._lossless = codec == LOSSLESS
        self.layout = PayloadLayout([Section(name=SECTION, num_elements=sum(self._sizes), codec=codec)])
        self._shared = _flat_of(tensors)
        self._flat = torch.empty(sum(self._sizes)) if self._shared is None else self._shared
        self.memory = bytearray(self.layout.size_bytes)

    @torch.no_grad()
    def encode(self, tensors: Sequence[Tensor], seed: bytes) -> tuple[Bytes, MerkleTree]:
        """The payload, and the tree over its chunks; ``seed`` is what its codec rounds by.

        The payload may be the tensors' own memory: they must not change while it is in use.
        """
        if self._shared is None:
            for piece, tensor in zip(torch.split(self._flat, self._sizes), tensors, strict=True):
                piece.copy_(tensor.reshape(-1))
        payload: Bytes
        if self._lossless and sys.byteorder == "little":
            payload = self._flat.numpy().view(np.uint8).data
        else:
            number = int.from_bytes(hashlib.sha256(seed).digest()[:6], "big")
            payload = self.layout.encode({SECTION: self._flat}, number)
        return payload, MerkleTree(self.layout.chunk_digests(payload))

    @torch.no_grad()
    def copy_into(self, mean: Tensor, tensors: Sequence[Tensor]) -> None:
        """Put the mean where the tensors were."""
        if self._shared is not None:
            self._shared.copy_(mean)
            return
        for piece, tensor in zip(torch.split(mean, self._sizes), tensors, strict=True):
            tensor.copy_(piece.view_as(tensor))


def cut_from_one(shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Float32 zeros of these shapes, one after another in shared memory."""
    flat = torch.zeros(sum(shape.numel() for shape in shapes))
    flat.share_memory_()  # type: ignore[no-untyped-call]
    pieces = torch.split(flat, [shape.numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _flat_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The vector that ``tensors`` were cut from, if they were."""
    if not tensors or any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in tensors):
        return None
    start = place = int(tensors[0].storage_offset())
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr():
            return None
        if tensor.storage_offset() != place:
            return None
        place += tensor.numel()
    return tensors[0].detach().as_strided((place - start,), (1,), start)


async def average(
    meeting: Meeting,
    me: Identity,
    weight: float,
    payload: Bytes,
    tree: MerkleTree,
    memory: bytearray | None = None,
) -> Averaged:
    """Average our payload with the group's.

    Args:
        meeting: started; the caller closes it.
        me: whose hotkey our `Arrival` named.
        weight: 0: our payload does not count, we only receive.
        payload, tree: as `Vector.encode` makes them.
        memory: see `all_reduce`.

    Raises:
        ServiceError: there is no mean, or not all of it.
    """
    plan = await meeting.settle(weight, tree.root)
    if plan is None:
        return Averaged(mean=None, weights={}, sent_bytes=0)
    if _all_equal(plan):
        return Averaged(mean=None, weights={member.peer_id: member.weight for member in plan.members}, sent_bytes=0)
    ours, tree_ = (payload, tree) if weight > 0 else (None, None)
    room = meeting.lobby.room(meeting.group, "reduce")
    try:
        outcome = await all_reduce(plan, me, ours, room, verify, tree_, memory)
    except ValueError as exc:
        raise ServiceError(f"the group's plan does not suit us: {exc}") from exc
    if not outcome.complete:
        faults = ", ".join(sorted({record.fault.value for record in outcome.faults}))
        raise ServiceError(f"{len(outcome.missing_parts)} parts of the mean are missing ({faults})")
    return Averaged(
        mean=outcome.vectors[SECTION],
        weights={member.peer_id: member.weight * outcome.included.get(member.hotkey, 0.0) for member in plan.members},
        sent_bytes=outcome.bytes_sent,
    )


def _all_equal(plan: GroupPlan) -> bool:
    """Whether everyone brings the same bits. Under a lossy codec tensors may differ where payloads do not."""
    roots = {member.root for member in plan.members}
    lossless = all(section.codec == LOSSLESS for section in plan.layout.sections)
    return lossless and len(roots) == 1 and None not in roots
