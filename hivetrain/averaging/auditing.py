"""Does a mean hold what it should? Recompute a few blocks of it from what the senders themselves committed to.

Every member draws blocks with coins of its own, asks the senders that the signed mask names for their chunks, and
computes those blocks' bytes again. If they differ, the senders' openings beside the signed result are evidence that
anybody can check (`proofs`). Where openings do not come nothing is proved, but a reducer that does not even show its
own vector has failed: otherwise a lie would be safe behind it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.means import Mean
from hivetrain.averaging.peers import Peers, Unanswered
from hivetrain.averaging.proofs import pack_wrong_average
from hivetrain.averaging.reducing import check_committed, decode_sane, reduce_chunks, rounding_seed
from hivetrain.averaging.results import mask_at
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import GaveUp, RoundState, Stale
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

Block = tuple[int, int]
Shown = dict[Block, tuple[Bytes, list[bytes]]]
"""By block, a sender's encoded chunks and their proof, checked against its root."""
Openings = dict[int, tuple[Bytes, list[bytes]]]
"""Of one block, by member's index."""


async def audit(state: RoundState, signed: Signed, peers: Peers, mean: Mean, first_hand: bool) -> None:
    """Check a certified mean. With ``first_hand`` its reducer, who gave it to us, must show its own vector.

    Raises:
        GaveUp: the mean is wrong, which is recorded with its evidence, or its reducer does not show its vector.
        ServiceError: our own side does not work.
    """
    result = mean.result
    assert result is not None
    plan, part = state.plan, mean.part
    blocks = plan.blocks(part.start, part.stop)
    drawn = sorted(secrets.SystemRandom().sample(blocks, min(plan.audit_blocks, len(blocks))))
    masks = {block: mask_at(result, block[0], len(plan.members)) for block in drawn}
    wanted = {i: [b for b in drawn if masks[b][i]] for i in range(len(plan.members))}
    senders = [i for i, some in wanted.items() if some]
    shown = dict(zip(senders, await asyncio.gather(*(_ask(state, peers, i, wanted[i]) for i in senders)), strict=True))
    if signed.is_void(result):  # somebody else was quicker
        raise Stale("there is evidence against it", None)
    reducer = plan.members.index(plan.reducer(part.index, result.rank))
    for block in drawn:
        openings = {i: shown[i][block] for i, is_in in enumerate(masks[block]) if is_in and block in shown[i]}
        if len(openings) == sum(masks[block]):
            if not _agrees(state, mean, block, openings):
                _convict(state, signed, mean, block, openings)
                raise GaveUp(f"its mean of chunks [{block[0]}, {block[1]}) is wrong", None)
        elif first_hand and masks[block][reducer] and reducer not in openings:
            raise GaveUp("it does not show its own vector", Fault.ABSENT)


async def _ask(state: RoundState, peers: Peers, index: int, blocks: list[Block]) -> Shown:
    plan, sender = state.plan, state.plan.members[index]
    if sender.hotkey == state.me.hotkey:
        return _own(state, blocks)
    try:
        openings = await peers.open(sender, blocks)
    except Unanswered as exc:
        logger.info("%s does not open its chunks: %s", sender.hotkey, exc)
        return {}
    shown: Shown = {}
    for block, (header, data) in zip(blocks, openings, strict=False):
        try:
            if (header.start, header.stop) != block:
                raise PeerFault(Fault.MALFORMED, f"asked for chunks {block}, got {(header.start, header.stop)}")
            check_committed(plan, sender, header, data)
        except PeerFault as fault:
            state.blame(sender.hotkey, fault.fault, fault.detail)
            return {}
        shown[block] = (data, header.proof)
    return shown


def _own(state: RoundState, blocks: list[Block]) -> Shown:
    layout = state.plan.layout
    if state.payload is None or state.tree is None:
        return {}
    view = memoryview(state.payload)
    return {
        (start, stop): (
            view[layout.byte_offset(start) : layout.byte_offset(stop)],
            state.tree.range_proof(start, stop),
        )
        for start, stop in blocks
    }


def _agrees(state: RoundState, mean: Mean, block: Block, openings: Openings) -> bool:
    plan = state.plan
    try:
        vectors = [decode_sane(plan, *block, openings[i][0]) for i in sorted(openings)]
    except PeerFault:
        return False  # no reducer may take such values in
    weights = [plan.members[i].weight for i in sorted(openings)]
    return reduce_chunks(plan, *block, vectors, weights, rounding_seed(state.group_id)) == state.store.view(*block)


def _convict(state: RoundState, signed: Signed, mean: Mean, block: Block, openings: Openings) -> None:
    assert mean.result is not None
    part, (start, stop) = mean.part, block
    index = state.plan.block_index(part, start)
    proof = mean.tree.range_proof(index, index + 1)
    evidence = pack_wrong_average(mean.result, start, stop, state.store.view(start, stop), proof, openings)
    detail = f"chunks [{start}, {stop}) are not the mean of what the senders committed to"
    signed.convict((part.index, mean.result.rank), evidence, detail)
