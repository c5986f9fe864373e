"""A part's mean from whoever holds it, where its reducer does not give it."""

from __future__ import annotations

import asyncio
import logging

from hivetrain.averaging.auditing import audit
from hivetrain.averaging.group import Member, Part
from hivetrain.averaging.means import Mean
from hivetrain.averaging.messages import FetchReply
from hivetrain.averaging.peers import Peers, Unanswered
from hivetrain.averaging.results import unpack_mask
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import GaveUp, Holding, RoundState
from hivetrain.errors import Fault

logger = logging.getLogger(__name__)

POLL_S = 0.25


class Fetcher:
    """Asks the others."""

    def __init__(self, state: RoundState, signed: Signed, peers: Peers) -> None:
        self._state = state
        self._signed = signed
        self._peers = peers

    async def fetch(self, holding: Holding, rank: int, until: float) -> tuple[Mean | None, set[str]]:
        """Ask until one has given us the part, or nobody expects it from a reducer below ``rank`` any more.

        What only the reducer itself holds does not count: everyone else gave it up.

        Returns:
            The mean, certified and audited, or None; and the hotkeys of those who said that they have none.
        """
        state, clock, part = self._state, self._state.clock, holding.part
        last_resort = rank == state.plan.num_ranks
        failed = {state.plan.reducer(part.index, r).hotkey for r in range(0 if last_resort else rank)}
        asked = [member for member in state.others if member.hotkey not in failed | state.banned]
        while True:
            replies = await asyncio.gather(*(self._status(member, part, rank) for member in asked))
            said = [(member, reply) for member, reply in zip(asked, replies, strict=True) if reply is not None]
            holders = [
                (reply.rank, member)
                for member, reply in said
                if reply.status == "have" and state.plan.reducer(part.index, reply.rank) != member
            ]
            for _, holder in sorted(holders, key=lambda pair: pair[0]):
                try:
                    mean = await self._peers.take(holder, part, rank, clock.fetch_close)
                    if not last_resort:
                        await require_fair(state, mean)
                    await audit(state, self._signed, self._peers, mean, first_hand=False)
                    return mean, set()
                except GaveUp as why:
                    logger.info("part %d did not come from %s: %s", part.index, holder.hotkey, why)
                    asked.remove(holder)
            pending = any(reply.status == "pending" for _, reply in said)
            if clock.now() >= clock.fetch_close or not (holders or (pending and clock.now() < until)):
                return None, {member.hotkey for member, reply in said if reply.status == "none"}
            await asyncio.sleep(POLL_S)

    async def require_vouched(self, holding: Holding, mean: Mean) -> None:
        """Give up a mean that leaves us out, unless somebody beside its reducer holds it.

        We may have been late, and then others hold it. If it leaves out everyone, nobody will.

        Raises:
            GaveUp: nobody does.
        """
        state, clock, part = self._state, self._state.clock, holding.part
        assert mean.rank is not None
        reducer, until = state.plan.reducer(part.index, mean.rank), clock.now() + state.plan.patience_s / 2
        asked = [member for member in state.others if member != reducer]
        holding.doubted = True
        try:
            while asked:
                replies = await asyncio.gather(*(self._status(member, part, mean.rank + 1) for member in asked))
                said = [reply for reply in replies if reply is not None]
                if any(reply.status == "have" and reply.rank == mean.rank for reply in said):
                    return
                if clock.now() >= until or not any(reply.status == "pending" for reply in said):
                    raise GaveUp("it leaves us out, and nobody else holds its mean", Fault.ABSENT)
                await asyncio.sleep(POLL_S)
        finally:
            holding.doubted = False

    async def _status(self, member: Member, part: Part, rank: int) -> FetchReply | None:
        try:
            return await self._peers.status(member, part, rank)
        except Unanswered:
            return None


async def require_fair(state: RoundState, mean: Mean) -> None:
    """Give up a first reducer that leaves out more weight than it takes in, of senders that brought us our own part.

    Raises:
        GaveUp: it does.
    """
    ours = next((h.reduction for h in state.holdings.values() if h.rank == 0 and h.reduction is not None), None)
    result = mean.result
    if result is None or result.rank or ours is None:
        return
    runs = [(run.stop, unpack_mask(run.included, len(state.plan.members))) for run in result.masks]
    if all(is_in or not m.sends for _, mask in runs for is_in, m in zip(mask, state.plan.members, strict=True)):
        return
    await ours.ended.wait()
    taken = left = 0.0
    start = mean.part.start
    for stop, mask in runs:
        for is_in, member in zip(mask, state.plan.members, strict=True):
            taken += (stop - start) * member.weight * is_in
            left += (stop - start) * member.weight * (not is_in and member.hotkey in ours.present)
        start = stop
    if left > taken:
        raise GaveUp(f"it leaves out {left / (left + taken):.0%} of the weight that is here", Fault.ABSENT)
