"""What a reducer signs for its mean: who is in which chunks, and one Merkle root over its encoded chunks.

The root lets anybody check a run of chunks without the rest, which is what makes a wrong average provable in a few
hundred kilobytes (`proofs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import msgpack

from hivetrain.averaging.group import GroupPlan, Part
from hivetrain.averaging.messages import MaskRun, Result
from hivetrain.errors import Fault, PeerFault
from hivetrain.identity import Identity, Verify


def pack_mask(included: Sequence[bool]) -> bytes:
    """One bit per member, lowest first."""
    packed = bytearray(-(-len(included) // 8))
    for index, value in enumerate(included):
        packed[index // 8] |= value << (index % 8)
    return bytes(packed)


def unpack_mask(packed: bytes, num_members: int) -> tuple[bool, ...]:
    """One bool per member.

    Raises:
        PeerFault: MALFORMED: not that many bits, or a bit past the last member.
    """
    included = tuple(bool(packed[i // 8] >> (i % 8) & 1) for i in range(min(num_members, 8 * len(packed))))
    if pack_mask(included) != packed or len(included) != num_members:
        raise PeerFault(Fault.MALFORMED, f"expected a mask of {num_members} members, got {packed.hex()}")
    return included


def mask_runs(batches: Sequence[tuple[int, int]], masks: Sequence[bytes]) -> list[MaskRun]:
    """Masks per batch, as runs."""
    pairs = zip(batches, masks, strict=True)
    return [
        MaskRun(stop=[batch[1] for batch, _ in group][-1], included=mask)
        for mask, group in groupby(pairs, key=lambda pair: pair[1])
    ]


def mask_at(result: Result, chunk: int, num_members: int) -> tuple[bool, ...]:
    """Who is in the mean of that chunk, of a result that `require_sound` passed."""
    run = next(run for run in result.masks if chunk < run.stop)
    return unpack_mask(run.included, num_members)


def weight_in(result: Result, plan: GroupPlan, part: Part) -> float:
    """Weight of the members that are in a result, on average over the part's chunks."""
    start, total = part.start, 0.0
    for run in result.masks:
        included = unpack_mask(run.included, len(plan.members))
        total += (run.stop - start) * sum(m.weight for m, is_in in zip(plan.members, included, strict=True) if is_in)
        start = run.stop
    return total / (part.stop - part.start)


def result_message(group_id: str, part: int, rank: int, masks: Sequence[MaskRun], root: bytes) -> bytes:
    """What a reducer signs."""
    runs = [[run.stop, run.included] for run in masks]
    packed: bytes = msgpack.packb(["hivetrain-result/3", group_id, part, rank, runs, root])
    return packed


def sign_result(me: Identity, group_id: str, part: int, rank: int, masks: list[MaskRun], root: bytes) -> Result:
    """The signed result of our own mean."""
    signature = me.sign(result_message(group_id, part, rank, masks, root))
    return Result(part=part, rank=rank, masks=masks, root=root, signature=signature)


def is_signed(result: Result, plan: GroupPlan, group_id: str, verify: Verify) -> bool:
    """Whether the part's reducer of that rank signed this result."""
    if result.part >= plan.num_ranks or result.rank >= plan.num_ranks:  # there are as many parts as reducers
        return False
    message = result_message(group_id, result.part, result.rank, result.masks, result.root)
    return verify(plan.reducer(result.part, result.rank).hotkey, message, result.signature)


def require_sound(result: Result, plan: GroupPlan, part: Part) -> None:
    """Refuse a result that is no mean of that part, whatever its bytes are.

    Raises:
        PeerFault: WRONG_AVERAGE.
    """
    stops = [run.stop for run in result.masks]
    whole = all(plan.ends_batch(part, stop) for stop in stops)
    if stops != sorted(set(stops)) or not whole or stops[-1] != part.stop:
        raise PeerFault(Fault.WRONG_AVERAGE, f"the masks of chunks [{part.start}, {part.stop}) end at {stops[:8]}")
    for run in result.masks:
        try:
            included = unpack_mask(run.included, len(plan.members))
        except PeerFault as fault:
            raise PeerFault(Fault.WRONG_AVERAGE, fault.detail) from fault
        if not any(included):
            raise PeerFault(Fault.WRONG_AVERAGE, "a mean of nobody")
        if any(is_in and not m.sends for is_in, m in zip(included, plan.members, strict=True)):
            raise PeerFault(Fault.WRONG_AVERAGE, "the mean includes a member that sends nothing")
