"""The opening side: see one part through, from reducer to reducer, until its mean is here.

Rank by rank: bring our vector to the reducer whose turn it is and take the mean home on the same stream, both at once.
Who is given up is not taken from any more; the next reducer first asks everyone else whether somebody has the mean, or
still expects it, and reduces again only where all say no. What comes is certified, then audited, then held.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from hivetrain.averaging.auditing import audit
from hivetrain.averaging.clock import Patience
from hivetrain.averaging.fetching import Fetcher, require_fair
from hivetrain.averaging.group import Member, Part
from hivetrain.averaging.means import Mean, Refused, receive_mean
from hivetrain.averaging.messages import Batch, Contribution
from hivetrain.averaging.peers import Peers
from hivetrain.averaging.reduction import Reduction
from hivetrain.averaging.results import unpack_mask
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import RECONNECT_GRACE_S, GaveUp, Holding, RoundState, Stale
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

MAX_STALE, STALE_PAUSE_S = 5, 0.25
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0


class Opener:
    """Obtains parts."""

    def __init__(self, state: RoundState, signed: Signed, peers: Peers) -> None:
        self._state = state
        self._signed = signed
        self._peers = peers
        self._fetcher = Fetcher(state, signed, peers)

    async def see_through(self, holding: Holding) -> None:
        """Obtain a part, and again whenever it turns out to be void. Runs until it is cancelled.

        Raises:
            ServiceError: our own side does not work.
        """
        while True:
            await self._obtain(holding)
            self._state.settle(holding)
            await holding.reopened.wait()
            holding.reopened.clear()

    async def _obtain(self, holding: Holding) -> None:
        state, plan, clock = self._state, self._state.plan, self._state.clock
        stale = 0
        while holding.rank < plan.num_ranks and clock.now() < (clock.fetch_close if holding.rank else clock.fetch_at):
            rank = holding.rank
            holding.abandoned.clear()
            try:
                mean = await _unless(holding, self._attempt(holding, rank))
                if not self._is_void(mean):
                    holding.take(mean)
                    return
                why: GaveUp = Stale("there is evidence against it", None)
            except GaveUp as exc:
                why = exc
            reducer = plan.reducer(holding.part.index, rank)
            if isinstance(why, Stale) and reducer.hotkey not in state.banned and stale < MAX_STALE:
                stale += 1
                await asyncio.sleep(STALE_PAUSE_S)
            elif holding.rank == rank:
                holding.give_up(rank, why)
        holding.rank = plan.num_ranks
        holding.changed.notify()
        last, _ = await self._fetcher.fetch(holding, plan.num_ranks, clock.fetch_close)
        if last is not None and not self._is_void(last):
            holding.take(last)

    def _is_void(self, mean: Mean) -> bool:
        return mean.result is not None and self._signed.is_void(mean.result)

    def _includes_us(self, mean: Mean) -> bool:
        members = self._state.plan.members
        us = members.index(self._state.member)
        runs = mean.result.masks if mean.result is not None else []
        return not self._state.member.sends or all(unpack_mask(run.included, len(members))[us] for run in runs)

    async def _attempt(self, holding: Holding, rank: int) -> Mean:
        """The mean through the reducer of that rank.

        Raises:
            GaveUp: it gives us none.
        """
        state, clock, part = self._state, self._state.clock, holding.part
        until = clock.now() + (clock.fetch_close - clock.now()) / 2 if rank else clock.fetch_at
        reducer = state.plan.reducer(part.index, rank)
        if rank and reducer.hotkey in state.banned:
            raise GaveUp("it is disregarded in this round", None)
        if reducer.hotkey != state.me.hotkey:
            holding.progress_at = clock.awake()
            mean = await self._bring(holding, rank, reducer, until)
            if mean.rank == rank and not self._includes_us(mean):
                await self._fetcher.require_vouched(holding, mean)
            await require_fair(state, mean)
            await audit(state, self._signed, self._peers, mean, first_hand=mean.rank == rank)
            return mean
        expected = {member.hotkey for member in state.plan.members} - state.banned
        if rank:
            held, deniers = await self._fetcher.fetch(holding, rank, clock.now() + 2 * state.plan.patience_s)
            if held is not None:
                return held
            # Who cannot be dialled may not have been asked: it comes by itself, as it has met us before.
            hidden = {m.hotkey for m in state.others if not m.maddrs and m.hotkey in state.met}
            expected = (deniers | holding.parked | hidden | {state.me.hotkey}) - state.banned
        holding.reduction = Reduction(state, part, rank, expected)
        holding.changed.notify()
        mean = await holding.reduction.run()
        if mean.unfit is not None:
            raise GaveUp(f"our own mean is unfit: {mean.unfit.detail}", None)
        assert mean.result is not None
        self._signed.note(mean.result)
        return mean

    # From the reducer

    async def _bring(self, holding: Holding, rank: int, reducer: Member, until: float) -> Mean:
        """Bring our vector to a reducer, and its mean, or the one that it holds, home: certified, not audited.

        A reducer waits with patience itself: for a sender, and before that, past rank 0, for who holds the part. So it
        has a multiple of ours for each batch, however often its link breaks in between.
        """
        state, clock, plan, part = self._state, self._state.clock, self._state.plan, holding.part
        mean, pause, grace_s = Mean(plan, state.store, part), FIRST_PAUSE_S, min(RECONNECT_GRACE_S, plan.patience_s)
        missed_at, connect_s, met = clock.awake(), grace_s if rank else plan.patience_s, False
        self._peers.expect(reducer.hotkey)
        try:
            async with clock.patience((4 if rank else 2) * plan.patience_s, until) as patience:
                while True:
                    try:
                        left = missed_at + connect_s - clock.awake()
                        stream = await state.connect(reducer, min(until, clock.now() + left))
                        is_first = not met
                        if is_first:
                            met = True
                            patience.feed()
                        kept = False
                        try:
                            free = await self._exchange(stream, holding, mean, rank, reducer, patience)
                            kept = free and is_first  # of who comes again a reducer may read nothing any more
                            return mean
                        finally:
                            if kept:
                                await self._peers.adopt(reducer.hotkey, stream)
                            else:
                                await state.disconnect(stream)
                            missed_at, connect_s = clock.awake(), grace_s
                    except LinkLost as lost:
                        story = lost.detail
                    if clock.awake() + pause >= missed_at + connect_s or clock.now() + pause >= until:
                        raise GaveUp(story, Fault.ABSENT)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)
        except TimeoutError as exc:
            cut_short = rank > 0 and clock.now() >= until
            fault = None if cut_short else Fault.LATE if met else Fault.ABSENT
            raise GaveUp("no mean of it came in time", fault) from exc
        except Refused as refused:
            if refused.stale:
                raise Stale(str(refused), None) from refused
            raise GaveUp(f"it refused us: {refused}", Fault.ABSENT) from refused
        except PeerFault as found:
            state.blame(reducer.hotkey, found.fault, found.detail, part.index)
            raise GaveUp(str(found), None) from found
        finally:
            self._peers.disown(reducer.hotkey)

    async def _exchange(
        self, stream: Stream, holding: Holding, mean: Mean, rank: int, reducer: Member, patience: Patience
    ) -> bool:
        """Fill ``mean``. Returns whether the stream is free for other questions: its reducer read all that we sent."""
        clock = self._state.clock

        def progress() -> None:
            holding.progress_at = clock.awake()
            patience.feed()

        sending = asyncio.create_task(self._deliver(stream, mean.part, rank, len(mean.masks), reducer))
        try:
            result = await receive_mean(stream, mean, self._state.link(reducer), progress, clock.now)
            delivered = sending.done() and sending.result()
        finally:
            sending.cancel()
            await asyncio.wait({sending})
        self._signed.certify(mean, result, reducer)
        mean.finish(result)
        return delivered and mean.rank == rank and self._includes_us(mean)

    async def _deliver(self, stream: Stream, part: Part, rank: int, first: int, reducer: Member) -> bool:
        """Our header, and our chunks of the part, each batch with its proof. Returns whether the stream took it all."""
        state, layout = self._state, self._state.plan.layout
        link = state.link(reducer)
        num_chunks = part.stop - part.start if state.member.sends else 0
        try:
            header = Contribution(part=part.index, rank=rank, first=first, num_chunks=num_chunks)
            batches = state.plan.batches(part)[first:] if state.payload is not None else []
            await stream.send(header.to_bytes(), more=bool(batches))
            if state.tree is None or state.payload is None:
                return True
            view = memoryview(state.payload)
            for start, stop in batches:
                batch = Batch(start=start, stop=stop, proof=state.tree.range_proof(start, stop))
                await stream.send(batch.to_bytes(), more=True)
                data = view[layout.byte_offset(start) : layout.byte_offset(stop)]
                await stream.send(data)
                link.bytes_sent += len(data)
            return True
        except LinkLost as lost:
            logger.debug("the vector for part %d was not all taken: %s", part.index, lost.detail)
        except Exception as exc:  # a bug of ours: the round must end with it, not hang on it
            if not state.crash.done():
                state.crash.set_exception(exc)
        return False


async def _unless(holding: Holding, work: Coroutine[Any, Any, Mean]) -> Mean:
    """What ``work`` returns.

    Raises:
        GaveUp: the present rank was abandoned before.
    """
    tasks = working, _ = asyncio.create_task(work), asyncio.create_task(holding.abandoned.wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise holding.why
        return working.result()
    finally:
        holding.progress_at = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
