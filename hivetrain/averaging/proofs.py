"""Evidence against a reducer that a third party checks alone, from the plan and the members' keys.

Two kinds: two different results that it signed for one part; and one signed result beside everything that one of its
blocks was made of: the senders' own committed bytes, whose mean is not what was signed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgpack
from pydantic import BaseModel, ConfigDict, Field

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import MAX_MEMBERS, GroupPlan
from hivetrain.averaging.messages import Batch, Digest, Index, Result
from hivetrain.averaging.reducing import check_committed, decode_sane, reduce_chunks, rounding_seed
from hivetrain.averaging.results import is_signed, mask_at, require_sound
from hivetrain.averaging.transport import MAX_FRAME_BYTES
from hivetrain.errors import PeerFault
from hivetrain.identity import Verify
from hivetrain.verification.merkle import leaf_digest, verify_range

MAX_EVIDENCE_BYTES = MAX_FRAME_BYTES

Proven = Annotated[list[Digest], Field(max_length=96)]


class _Opening(BaseModel):
    """A sender's own chunks of the block."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    member: Annotated[int, Field(ge=0, lt=MAX_MEMBERS)]
    data: bytes
    proof: Proven


class _WrongBlock(BaseModel):
    """A signed result, one block of its bytes, and the openings of everyone in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    result: Result
    start: Index
    stop: Index
    data: bytes
    proof: Proven
    openings: Annotated[list[_Opening], Field(min_length=1, max_length=MAX_MEMBERS)]


def pack_two_averages(first: Result, second: Result) -> bytes:
    """Two results as one proof."""
    packed: bytes = msgpack.packb([first.to_bytes(), second.to_bytes()])
    return packed


def proves_two_averages(
    evidence: bytes, plan: GroupPlan, verify: Verify, about: tuple[int, int] | None = None
) -> str | None:
    """The hotkey that signed two different means of one part; None where nothing is proved. Never raises.

    With ``about``: None, too, where it is another (part, rank).
    """
    try:
        raw = msgpack.unpackb(evidence, max_array_len=2, max_map_len=0)
        first, second = (Result.model_validate(msgpack.unpackb(item)) for item in raw)
    except Exception:  # bytes from a stranger: whatever does not parse proves nothing
        return None
    group_id, turn = plan.group_id(), (first.part, first.rank)
    if turn != (second.part, second.rank) or about not in (None, turn) or said(first) == said(second):
        return None
    if not all(is_signed(result, plan, group_id, verify) for result in (first, second)):
        return None
    return plan.reducer(first.part, first.rank).hotkey


def said(result: Result) -> tuple[object, ...]:
    """What a result says, whatever its signature."""
    return result.root, tuple((run.stop, run.included) for run in result.masks)


def pack_wrong_average(
    result: Result,
    start: int,
    stop: int,
    data: Bytes,
    proof: Sequence[bytes],
    openings: Mapping[int, tuple[Bytes, Sequence[bytes]]],
) -> bytes:
    """One block as a proof: its signed bytes, and per member's index its opening."""
    packed: bytes = msgpack.packb(
        {
            "result": result.model_dump(),
            "start": start,
            "stop": stop,
            "data": bytes(data),
            "proof": list(proof),
            "openings": [
                {"member": index, "data": bytes(piece), "proof": list(path)}
                for index, (piece, path) in openings.items()
            ],
        }
    )
    return packed


def proves_wrong_average(
    evidence: bytes, plan: GroupPlan, verify: Verify, about: tuple[int, int] | None = None
) -> str | None:
    """The hotkey that signed something else than the mean; None where nothing is proved. Never raises.

    Also proved: a mean that includes values which are not finite or past the plan's bound. With ``about``: None, too,
    where it is another (part, rank).
    """
    try:
        if len(evidence) > MAX_EVIDENCE_BYTES:
            return None
        wrong = _WrongBlock.model_validate(msgpack.unpackb(evidence, max_array_len=4 * MAX_MEMBERS, max_map_len=16))
        turn = (wrong.result.part, wrong.result.rank)
        return _check_wrong_block(wrong, plan, verify) if about in (None, turn) else None
    except Exception:  # bytes from a stranger: whatever does not parse proves nothing
        return None


def _check_wrong_block(wrong: _WrongBlock, plan: GroupPlan, verify: Verify) -> str | None:
    result, group_id = wrong.result, plan.group_id()
    if not is_signed(result, plan, group_id, verify):
        return None
    part = plan.parts()[result.part]
    require_sound(result, plan, part)
    if not plan.is_block(part, wrong.start, wrong.stop):
        return None
    index, num_blocks = plan.block_index(part, wrong.start), plan.block_index(part, part.stop - 1) + 1
    if not verify_range(result.root, num_blocks, index, [leaf_digest(wrong.data)], wrong.proof):
        return None
    included = mask_at(result, wrong.start, len(plan.members))
    openings = {opening.member: opening for opening in wrong.openings}
    if len(openings) != len(wrong.openings) or set(openings) != {i for i, is_in in enumerate(included) if is_in}:
        return None
    reducer = plan.reducer(result.part, result.rank).hotkey
    vectors, weights = [], []
    for index in sorted(openings):
        opening, member = openings[index], plan.members[index]
        header = Batch(start=wrong.start, stop=wrong.stop, proof=opening.proof)
        check_committed(plan, member, header, opening.data)  # else it proves nothing
        try:
            vectors.append(decode_sane(plan, wrong.start, wrong.stop, opening.data))
        except PeerFault:
            return reducer  # no reducer may take such bytes in
        weights.append(member.weight)
    mean = reduce_chunks(plan, wrong.start, wrong.stop, vectors, weights, rounding_seed(group_id))
    return None if mean == wrong.data else reducer
