"""Questions to other members: one stream to each, opened when there is first something to ask, one question at a time.

A member that does not answer is not asked again until it is heard of: a stopped one costs one timeout, not one per
question.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import Member, Part
from hivetrain.averaging.means import Mean, Refused, receive_mean
from hivetrain.averaging.messages import (
    MAX_CONFIRM_BYTES,
    Batch,
    Confirm,
    Fetch,
    FetchReply,
    Open,
    Proof,
    ProofReply,
    Refusal,
    receive,
)
from hivetrain.averaging.signed import Key, Signed
from hivetrain.averaging.state import GaveUp, RoundState
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import PeerFault

logger = logging.getLogger(__name__)

T = TypeVar("T")
ASK_TIMEOUT_S = 5.0
ADOPTION_S = 0.5  # what waiting for a stream that is in use may take, to save another's handshake

Opening = tuple[Batch, Bytes]
"""A sender's own chunks, as they came: not checked."""


class Unanswered(Exception):
    """A member did not answer, or is not asked."""


class Peers:
    """The asking half of the requests in `messages`; `serving.Server` is the other."""

    def __init__(self, state: RoundState, signed: Signed) -> None:
        self._state = state
        self._signed = signed
        self._streams: dict[str, Stream] = {}
        self._expected: dict[str, asyncio.Event] = {}
        self._turns: dict[str, asyncio.Lock] = {m.hotkey: asyncio.Lock() for m in state.others}
        self._warnings: set[asyncio.Task[None]] = set()
        self.silent: set[str] = set()
        signed.on_proof = self.warn

    async def ask(self, peer: Member, talk: Callable[[Stream], Awaitable[T]]) -> T:
        """What ``talk`` returns on our stream to ``peer``.

        Raises:
            Unanswered: silent, not reachable, or at fault, which is recorded.
            ServiceError: our own side does not work.
        """
        state, hotkey = self._state, peer.hotkey
        async with self._turns[hotkey]:
            if hotkey in self.silent:
                raise Unanswered(hotkey)
            timeout_s = min(ASK_TIMEOUT_S, state.plan.patience_s)
            until = state.clock.deadline
            try:
                async with state.clock.patience(timeout_s, until):
                    await self._until_adopted(hotkey)
                    if hotkey in self._streams:
                        try:
                            return await talk(self._streams[hotkey])
                        except LinkLost:  # an older one may have ended long ago
                            await self._drop(hotkey)
                    opened = await state.connect(peer, until)
                    if hotkey in self._streams:  # one became ours meanwhile
                        await state.disconnect(opened)
                    else:
                        self._streams[hotkey] = opened
                    return await talk(self._streams[hotkey])
            except TimeoutError as exc:
                self.silent.add(hotkey)
                await self._drop(hotkey)
                raise Unanswered(f"{hotkey} did not answer within {timeout_s:g} s") from exc
            except LinkLost as exc:
                await self._drop(hotkey)
                raise Unanswered(exc.detail) from exc
            except PeerFault as exc:
                await self._drop(hotkey)
                state.blame(hotkey, exc.fault, exc.detail)
                raise Unanswered(exc.detail) from exc
            except BaseException:
                await self._drop(hotkey)
                raise

    async def _until_adopted(self, hotkey: str) -> None:
        """Until the stream that is on its way to us, if one is, is ours; not for long: its work may take long."""
        if hotkey not in self._streams and hotkey in self._expected:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ADOPTION_S):
                    await self._expected[hotkey].wait()

    def expect(self, hotkey: str) -> None:
        """A stream to that member is in use, and may become ours: `adopt` or `disown` follows."""
        self._expected.setdefault(hotkey, asyncio.Event())

    async def adopt(self, hotkey: str, stream: Stream) -> None:
        """Ask on this stream from now on, on which nothing is under way in either direction."""
        if hotkey in self._streams:
            await self._state.disconnect(stream)
        else:
            self._streams[hotkey] = stream
        self.disown(hotkey)

    def disown(self, hotkey: str) -> None:
        """Expect no stream any more."""
        if (expected := self._expected.pop(hotkey, None)) is not None:
            expected.set()

    async def _drop(self, hotkey: str) -> None:
        stream = self._streams.pop(hotkey, None)
        if stream is not None:
            await self._state.disconnect(stream)

    async def status(self, peer: Member, part: Part, rank: int) -> FetchReply:
        """Whether ``peer`` holds a part, or expects it from a reducer below ``rank``. Raises as `ask`."""

        async def talk(stream: Stream) -> FetchReply:
            await stream.send(Fetch(part=part.index, rank=rank, take=False).to_bytes())
            return await receive(stream, FetchReply)

        return await self.ask(peer, talk)

    async def take(self, peer: Member, part: Part, rank: int, until: float) -> Mean:
        """The mean that ``peer`` holds, certified but not audited. On a stream of its own, as it may take long.

        Raises:
            GaveUp: it did not come, or is unfit.
            ServiceError: our own side does not work.
        """
        state, plan = self._state, self._state.plan
        mean = Mean(plan, state.store, part)
        try:
            async with state.clock.patience(plan.patience_s, until) as patience:
                stream = await state.connect(peer, until)
                try:
                    await stream.send(Fetch(part=part.index, rank=rank, take=True).to_bytes())
                    if (await receive(stream, FetchReply)).status != "have":
                        raise GaveUp("it has it no more", None)
                    result = await receive_mean(stream, mean, state.link(peer), patience.feed, state.clock.now)
                finally:
                    await state.disconnect(stream)
        except (TimeoutError, LinkLost, Refused) as exc:
            raise GaveUp(f"{peer.hotkey} did not pass it on: {exc}", None) from exc
        except PeerFault as exc:
            state.blame(peer.hotkey, exc.fault, exc.detail, part.index)
            raise GaveUp(str(exc), None) from exc
        self._signed.certify(mean, result, peer)
        mean.finish(result)
        return mean

    async def open(self, peer: Member, ranges: Sequence[tuple[int, int]]) -> list[Opening]:
        """These chunks of ``peer``'s own vector, none where it does not show them. Raises as `ask`."""
        state = self._state

        async def talk(stream: Stream) -> list[Opening]:
            starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
            await stream.send(Open(starts=starts, stops=stops).to_bytes())
            openings: list[Opening] = []
            for start, stop in ranges:
                header = await receive(stream, Batch, Refusal)
                if isinstance(header, Refusal):
                    return []
                link, began = state.link(peer), state.clock.now()
                data = await stream.receive(state.plan.layout.range_bytes(start, stop))
                link.bytes_received += len(data)
                link.seconds += state.clock.now() - began
                openings.append((header, data))
            return openings

        return await self.ask(peer, talk)

    async def confirm(self, peer: Member, ours: Confirm) -> Confirm:
        """What ``peer`` holds, told what we hold. Raises as `ask`."""

        async def talk(stream: Stream) -> Confirm:
            await stream.send(ours.to_bytes())
            return await receive(stream, Confirm, max_bytes=MAX_CONFIRM_BYTES)

        return await self.ask(peer, talk)

    def warn(self, key: Key, peers: Sequence[Member] | None = None) -> None:
        """Pass evidence on, in the background: to everybody but whom it convicts, unless ``peers`` are named."""
        guilty = self._state.plan.reducer(*key)
        for peer in [m for m in self._state.others if m != guilty] if peers is None else peers:
            task = asyncio.create_task(self._offer(peer, key))
            self._warnings.add(task)
            task.add_done_callback(self._warnings.discard)

    async def _offer(self, peer: Member, key: Key) -> None:
        evidence = self._signed.proofs[key]

        async def talk(stream: Stream) -> None:
            await stream.send(Proof(part=key[0], rank=key[1]).to_bytes())
            if (await receive(stream, ProofReply)).wanted:
                await stream.send(evidence)

        try:
            await self.ask(peer, talk)
        except Unanswered as exc:
            logger.info("%s was not shown the evidence on part %d: %s", peer.hotkey, key[0], exc)
        except Exception as exc:  # a bug of ours: the round must end with it, not hang on it
            if not self._state.crash.done():
                self._state.crash.set_exception(exc)

    async def close(self) -> None:
        """Ask nothing more."""
        for task in self._warnings:
            task.cancel()
        await asyncio.gather(*self._warnings, return_exceptions=True)
