"""The answering side: reduce the parts whose turn is ours, and answer what other members ask."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from hivetrain.averaging.agreement import Agreement
from hivetrain.averaging.group import Member
from hivetrain.averaging.handshake import NonceLedger, finish_greeting, greet
from hivetrain.averaging.means import send_mean
from hivetrain.averaging.messages import (
    MAX_CONFIRM_BYTES,
    Batch,
    Confirm,
    Contribution,
    Fetch,
    FetchReply,
    Message,
    Open,
    Proof,
    ProofReply,
    Refusal,
    receive,
)
from hivetrain.averaging.peers import Peers
from hivetrain.averaging.proofs import MAX_EVIDENCE_BYTES
from hivetrain.averaging.reduction import Status
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import GaveUp, Holding, RoundState
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
CLOSING_S = 2.0  # for the other side to read our last words and close
SPARE_STREAMS = 4  # that one member may have open beside one for each part
MAX_TAKES = 3  # times that one member may take one part from us


class Server:
    """Answers every stream of one round."""

    def __init__(self, state: RoundState, signed: Signed, peers: Peers, agreement: Agreement) -> None:
        self._state = state
        self._signed = signed
        self._peers = peers
        self._agreement = agreement
        self._nonces = NonceLedger()
        self._live: Counter[str] = Counter()  # open streams
        self._takes: Counter[tuple[str, int]] = Counter()
        self._opened: Counter[str] = Counter()  # chunks of ours that a member has been shown
        self._tasks: set[asyncio.Task[None]] = set()

    async def accept(self, stream: Stream) -> None:
        """The transport's acceptor: one stream from its first byte to its last."""
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            member = await self._greet(stream)
            if member is not None:
                await self._converse(stream, member)
        except Exception as exc:  # a bug of ours: the round must end with it, not hang on it
            self._crash(exc)

    async def close(self) -> None:
        """End every conversation."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _greet(self, stream: Stream) -> Member | None:
        state, now, greeting = self._state, self._state.clock.now, None
        try:
            async with asyncio.timeout_at(min(state.clock.deadline, now() + HANDSHAKE_TIMEOUT_S)):
                greeting = await greet(stream, state.plan, state.group_id, state.me, state.member.peer_id, self._nonces)
                asked = now()
                await finish_greeting(stream, greeting, state.verify)
        except (TimeoutError, LinkLost) as exc:
            logger.debug("a stream of peer %s ended in its handshake: %s", stream.remote_peer_id, exc)
            return None
        except PeerFault as fault:
            if greeting is None:
                state.ledger.record_outsider(stream.remote_peer_id, fault.fault, fault.detail)
            else:
                state.blame(greeting.member.hotkey, fault.fault, fault.detail)
            return None
        hotkey = greeting.member.hotkey
        if hotkey == state.me.hotkey:
            return None
        state.link(greeting.member).answered_in(now() - asked)
        state.met.add(hotkey)
        self._peers.silent.discard(hotkey)
        return greeting.member

    async def _converse(self, stream: Stream, member: Member) -> None:
        state = self._state
        if self._live[member.hotkey] >= len(state.holdings) + SPARE_STREAMS:
            return
        self._live[member.hotkey] += 1
        try:
            async with asyncio.timeout_at(state.clock.deadline):
                while True:
                    request = await receive(
                        stream, Contribution, Fetch, Open, Proof, Confirm, max_bytes=MAX_CONFIRM_BYTES
                    )
                    await self._answer(stream, member, request)
        except (TimeoutError, LinkLost) as exc:
            logger.debug("a stream of %s ended: %s", member.hotkey, exc)
        except PeerFault as fault:
            state.blame(member.hotkey, fault.fault, fault.detail)
        finally:
            self._live[member.hotkey] -= 1

    async def _answer(self, stream: Stream, member: Member, request: Message) -> None:
        if isinstance(request, Contribution):
            await self._serve_contribution(stream, member, request)
        elif isinstance(request, Fetch):
            await self._serve_fetch(stream, member, request)
        elif isinstance(request, Open):
            await self._serve_open(stream, member, request)
        elif isinstance(request, Proof):
            await self._serve_proof(stream, request)
        elif isinstance(request, Confirm):
            await stream.send(self._agreement.hear(member, request).to_bytes())

    # Parts

    async def _serve_contribution(self, stream: Stream, member: Member, request: Contribution) -> None:
        state, plan = self._state, self._state.plan
        holding = state.holdings.get(request.part)
        if (
            holding is None
            or request.rank >= plan.num_ranks
            or plan.reducer(request.part, request.rank) != state.member
        ):
            raise PeerFault(Fault.MALFORMED, f"part {request.part} is not ours to reduce at rank {request.rank}")
        part = holding.part
        expected = part.stop - part.start if member.sends else 0
        if request.num_chunks != expected:
            raise PeerFault(
                Fault.WRONG_SCHEMA, f"expected {expected} chunks of part {part.index}, got {request.num_chunks}"
            )
        if request.first > len(plan.batches(part)):
            raise PeerFault(Fault.MALFORMED, f"part {part.index} has {len(plan.batches(part))} batches")
        with state.served():
            await self._until_our_turn(holding, member, request.rank)
            read_all = False
            try:
                read_all = await self._exchange(stream, member, holding, request)
            except LinkLost:
                raise
            except PeerFault as fault:
                await stream.send(Refusal(fault=fault.fault.value, detail=fault.detail[:500]).to_bytes())
        if not read_all:
            await self._let_close(stream)

    async def _until_our_turn(self, holding: Holding, member: Member, rank: int) -> None:
        """Until we hold the part, reduce it, or gave up doing so."""
        holding.parked.add(member.hotkey)
        try:
            while holding.mean is None and holding.reduction is None and holding.rank <= rank:
                await holding.changed.wait()
        finally:
            holding.parked.discard(member.hotkey)

    async def _exchange(self, stream: Stream, member: Member, holding: Holding, request: Contribution) -> bool:
        """Take a member's vector and give it the mean. Returns whether all was read that it has sent for it."""
        state, reduction, link = self._state, holding.reduction, self._state.link(member)
        async with state.clock.patience(state.plan.patience_s, state.clock.confirm_close) as patience:
            mean = holding.mean or (reduction.mean if reduction is not None else None)
            if mean is None:
                raise PeerFault(Fault.ABSENT, f"part {request.part} is not to be had here")
            sender = None
            if reduction is not None and holding.mean is None and member.sends:
                sender = reduction.admit(member, request.first)
            if reduction is None or sender is None:
                await send_mean(stream, mean, link, patience, request.first)
                return not member.sends
            reader = asyncio.create_task(reduction.read(stream, sender, request.first))
            reader.add_done_callback(self._reader_ended)
            try:
                await send_mean(stream, reduction.mean, link, patience, request.first, lambda: sender.refusal)
            finally:
                if not reduction.has_all_of(sender):
                    reader.cancel()
                await asyncio.wait({reader})
            return sender.status is Status.IN

    def _reader_ended(self, reader: asyncio.Task[None]) -> None:
        if not reader.cancelled() and (bug := reader.exception()) is not None:
            self._crash(bug)

    async def _serve_fetch(self, stream: Stream, member: Member, request: Fetch) -> None:
        state, holding = self._state, self._state.holdings.get(request.part)
        mean = holding.mean if holding is not None else None
        if holding is None or mean is None or mean.rank is None:
            pending = holding is not None and self._is_pending(holding, member, request.rank)
            await stream.send(FetchReply(status="pending" if pending else "none", rank=0).to_bytes())
            return
        if request.take:
            self._takes[member.hotkey, request.part] += 1
            if self._takes[member.hotkey, request.part] > MAX_TAKES:
                await stream.send(FetchReply(status="none", rank=0).to_bytes())
                return
        await stream.send(FetchReply(status="have", rank=mean.rank).to_bytes())
        if request.take:
            clock = state.clock
            with state.served():
                async with clock.patience(state.plan.patience_s, clock.confirm_close) as patience:
                    await send_mean(stream, mean, state.link(member), patience)

    def _is_pending(self, holding: Holding, asker: Member, rank: int) -> bool:
        """Whether we may still get a part from a reducer below ``rank``.

        Where that one has given us nothing for long, and the next in line asks, it has given it up as well: so do we.
        """
        if holding.settled or holding.doubted or holding.rank >= rank:
            return False
        state, since = self._state, holding.progress_at
        in_line = rank < state.plan.num_ranks and state.plan.reducer(holding.part.index, rank) == asker
        if in_line and since is not None and state.clock.awake() > since + state.plan.patience_s:
            holding.abandon(GaveUp("no mean of it came for long, and the next gave it up too", Fault.LATE))
        return True

    async def _let_close(self, stream: Stream) -> None:
        """Read on until the other side closes: a socket closed over unread bytes may take our last ones with it."""
        clock = self._state.clock
        async with asyncio.timeout_at(min(clock.deadline, clock.now() + CLOSING_S)):
            while True:
                try:
                    await stream.receive(MAX_EVIDENCE_BYTES)
                except PeerFault as fault:  # a reader that was given up may have left us in mid-frame
                    raise LinkLost(fault.detail) from fault

    # Evidence

    async def _serve_open(self, stream: Stream, member: Member, request: Open) -> None:
        state, layout = self._state, self._state.plan.layout
        ranges = list(zip(request.starts, request.stops, strict=False))
        size = sum(stop - start for start, stop in ranges)
        self._opened[member.hotkey] += size
        plan = state.plan
        fit = len(request.starts) == len(request.stops) and all(
            0 <= start < stop <= min(layout.num_chunks, start + plan.block_chunks) for start, stop in ranges
        )
        most = (plan.audit_blocks + 1) * plan.block_chunks * plan.num_ranks * 4
        if not fit or self._opened[member.hotkey] > most:
            raise PeerFault(Fault.MALFORMED, f"asked for {size} chunks in all, {self._opened[member.hotkey]} so far")
        if state.payload is None or state.tree is None:
            await stream.send(Refusal(fault=Fault.ABSENT.value, detail="we send nothing in this round").to_bytes())
            return
        view = memoryview(state.payload)
        for start, stop in ranges:
            batch = Batch(start=start, stop=stop, proof=state.tree.range_proof(start, stop))
            await stream.send(batch.to_bytes(), more=True)
            data = view[layout.byte_offset(start) : layout.byte_offset(stop)]
            await stream.send(data)
            state.link(member).bytes_sent += len(data)

    async def _serve_proof(self, stream: Stream, request: Proof) -> None:
        key = (request.part, request.rank)
        wanted = key not in self._signed.proofs
        await stream.send(ProofReply(wanted=wanted).to_bytes())
        if wanted and not self._signed.consider(key, bytes(await stream.receive(MAX_EVIDENCE_BYTES))):
            raise PeerFault(Fault.MALFORMED, f"its evidence proves nothing about part {key[0]} at rank {key[1]}")

    def _crash(self, bug: BaseException) -> None:
        if not self._state.crash.done():
            self._state.crash.set_exception(bug)
