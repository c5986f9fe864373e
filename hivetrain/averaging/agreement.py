"""The end of a round: members tell each other what they hold, until everyone holds the same.

Who has settled every part tells everyone else, and each answers with what it holds itself. A member leaves when all
the others that it does not disregard have said the same as it. Where they say otherwise:

- two different results of one part and rank are a proof against their reducer, and void;
- a result that is void already is answered with its proof;
- of two ranks' results the one that more members hold wins (its own reducer does not count), of equal ones the one with
  more weight in it, then the lower rank. Nobody drops what it holds for what no more members say that they hold, before
  it has heard from everyone: a reducer and one other that lie together outvote nobody.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter

from hivetrain.averaging.group import Member
from hivetrain.averaging.messages import Confirm
from hivetrain.averaging.peers import Peers, Unanswered
from hivetrain.averaging.proofs import said
from hivetrain.averaging.results import weight_in
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import MAX_REOPENINGS, Holding, RoundState
from hivetrain.errors import Fault

logger = logging.getLogger(__name__)

LINGER_S = 3.0  # for whoever has not got everything: so long we can still be asked


class Agreement:
    """What everyone says that they hold."""

    def __init__(self, state: RoundState, signed: Signed, peers: Peers) -> None:
        self._state = state
        self._signed = signed
        self._peers = peers
        self._heard: dict[str, Confirm] = {}
        self._told: dict[str, int] = {}  # version of ours that a member knows
        self._gone: set[str] = set()

    def ours(self) -> Confirm:
        """What we hold."""
        held = [h.mean.result for h in self._state.holdings.values() if h.mean is not None]
        results = [result for result in held if result is not None]
        return Confirm(version=self._state.version, results=results, done=self._state.all_settled)

    def hear(self, member: Member, theirs: Confirm) -> Confirm:
        """Take note of what a member holds. Returns what to answer: what we hold."""
        self._note(member, theirs)
        self._told[member.hotkey] = self._state.version
        return self.ours()

    async def run(self) -> None:
        """Until we may leave."""
        tellers = [asyncio.create_task(self._tell(member)) for member in self._state.others]
        agreed = asyncio.create_task(self._until_agreed())
        try:
            running: set[asyncio.Task[None]] = {*tellers, agreed}
            while not agreed.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (*tellers, agreed):
                task.cancel()
            await asyncio.gather(*tellers, agreed, return_exceptions=True)

    async def _tell(self, member: Member) -> None:
        """Tell one member what we hold, and again whenever that has changed, once nothing is on its way."""
        state, hotkey = self._state, member.hotkey
        while True:
            while (
                not state.all_settled or hotkey in state.banned | self._gone or self._told.get(hotkey) == state.version
            ):
                await state.changed.wait()
            version = state.version
            try:
                theirs = await self._peers.confirm(member, self.ours())
            except Unanswered as exc:
                if self._state.member.maddrs and not member.maddrs:
                    await self._until_told(member)
                logger.info("%s does not say what it holds: %s", hotkey, exc)
                self._gone.add(hotkey)
                state.changed.notify()
                continue
            self._told[hotkey] = version
            self._note(member, theirs)

    async def _until_told(self, member: Member) -> None:
        """Until a member that cannot be dialled has told us itself: it may audit what nobody else can."""
        clock = self._state.clock
        until = min(clock.confirm_close, clock.now() + self._state.plan.patience_s)
        while clock.now() < until and not self._is_done(member) and member.hotkey not in self._state.banned:
            await self._state.changed.wait(until)

    async def _until_agreed(self) -> None:
        state, linger = self._state, math.inf
        close = state.clock.confirm_close
        while (now := state.clock.now()) < min(close, linger):
            waited = [member for member in state.others if not self._agrees(member)]
            if state.all_settled and not waited:
                return
            open_ends = [m for m in waited if m.hotkey not in state.banned and not self._is_done(m)]
            needed = not state.all_settled or open_ends or state.serving
            linger = math.inf if needed else min(linger, now + LINGER_S)
            await state.changed.wait(min(close, linger))

    def _is_done(self, member: Member) -> bool:
        heard = self._heard.get(member.hotkey)
        return heard is not None and heard.done

    def _agrees(self, member: Member) -> bool:
        """Whether a member needs nothing more from us, nor we from it."""
        if member.hotkey in self._gone or member.hotkey not in self._state.met:
            return member.hotkey in self._gone
        same = self._is_done(member) and _essence(self._heard[member.hotkey]) == _essence(self.ours())
        return same and self._told.get(member.hotkey) == self._state.version

    def _note(self, member: Member, theirs: Confirm) -> None:
        state, before = self._state, self._heard.get(member.hotkey)
        if before is not None and theirs.version < before.version:
            state.changed.notify()
            return  # its answer to us was overtaken by what it told us on another stream
        self._gone.discard(member.hotkey)
        sound = []
        for result in theirs.results:
            if not self._signed.note(result):
                detail = f"passed on a result of part {result.part} that nobody signed"
                state.blame(member.hotkey, Fault.BAD_SIGNATURE, detail)
                break
            if not self._signed.is_sound(result):
                continue
            sound.append(result)
            if self._signed.is_void(result):
                self._peers.warn((result.part, result.rank), [member])
        self._heard[member.hotkey] = theirs.model_copy(update={"results": sound})
        for holding in state.holdings.values():
            self._reconsider(holding)
        state.changed.notify()

    def _reconsider(self, holding: Holding) -> None:
        """Obtain a part again where the group holds another rank of it than we do."""
        state, part = self._state, holding.part.index
        if not holding.settled or holding.reopenings >= MAX_REOPENINGS or state.clock.now() >= state.clock.fetch_close:
            return
        mine = holding.mean.result if holding.mean is not None else None
        held = [(state.me.hotkey, mine)] if mine is not None else []
        for hotkey, theirs in self._heard.items():
            if hotkey not in state.banned:
                held += [(hotkey, result) for result in theirs.results if result.part == part]
        holders: Counter[int] = Counter()
        weights: dict[int, float] = {}
        for hotkey, result in held:
            if not self._signed.is_void(result) and state.plan.reducer(part, result.rank).hotkey != hotkey:
                holders[result.rank] += 1
                weights[result.rank] = weight_in(result, state.plan, holding.part)
        if not holders:
            return
        best = min(holders, key=lambda rank: (-holders[rank], -weights[rank], rank))
        if mine is None or (
            best != mine.rank and (holders[best] > holders[mine.rank] or all(map(self._has_spoken, state.others)))
        ):
            state.reopen(holding, state.plan.num_ranks)

    def _has_spoken(self, member: Member) -> bool:
        hotkey = member.hotkey
        return hotkey in self._heard or hotkey in self._gone or hotkey in self._state.banned


def _essence(confirm: Confirm) -> set[tuple[object, ...]]:
    return {(result.part, said(result)) for result in confirm.results}
