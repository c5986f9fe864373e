"""The answering side: take vectors for the part that we reduce, send its mean, and pass on any mean that we hold."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import logging
from collections import Counter
from collections.abc import Callable

from hivetrain.averaging.group import Member, Part
from hivetrain.averaging.handshake import NonceLedger, finish_greeting, greet
from hivetrain.averaging.messages import (
    MAX_CONFIRM_BYTES,
    RESULT_FRAME_BYTES,
    Block,
    Confirm,
    Contribution,
    Fetch,
    FetchReply,
    Refusal,
    Result,
    blocks,
    pack_mask,
    receive,
    result_message,
)
from hivetrain.averaging.reducing import PartInbox, reduce_part
from hivetrain.averaging.state import RECONNECT_GRACE_S, Held, RoundState
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
LINGER_S = 1.5  # a member that we met and that has not got everything has this long to come and fetch it
SPARE_STREAMS = 4  # that one member may have open beside one for each part
MAX_TAKES = 3  # times that one member may take one part from us


class Status(enum.Enum):
    """Where one sender stands with us."""

    AWAITED = "awaited"  # not here, or its link broke
    SENDING = "sending"  # a stream of it is being read
    IN = "in"  # all chunks are here and checked
    OUT = "out"  # at fault: it is not in this mean


class Sender:
    """One sender of our part."""

    def __init__(self, inbox: PartInbox) -> None:
        self.inbox = inbox
        self.status = Status.AWAITED
        self.lost_at: float | None = None
        self.most_chunks = 0  # seen in any attempt


class Server:
    """Answers every stream of one round, and reduces our part."""

    def __init__(self, state: RoundState) -> None:
        self._state = state
        self._nonces = NonceLedger()
        self._closed = False  # the mean is being made: no vector comes in any more
        self._ready = asyncio.Event()
        self._changed = asyncio.Event()
        self._unconfirmed: Counter[str] = Counter()  # open streams whose signed results we await
        self._live: Counter[str] = Counter()  # open streams
        self._takes: Counter[tuple[str, int]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self.crash: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        state.on_change = self._changed.set
        part = state.own_part
        senders = [m for m in state.plan.members if m.sends] if part else []
        self._senders = {m.hotkey: Sender(PartInbox(state.plan, part, m)) for m in senders if part}

    # Reducing

    async def reduce(self, part: Part) -> None:
        """Collect our part's vectors, average them, and make the mean ready to be sent."""
        state = self._state
        await self._add_own(part)
        await self._collect()
        self._closed = True
        for hotkey, sender in self._senders.items():
            if sender.status in (Status.AWAITED, Status.SENDING):
                self._leave_out(hotkey, sender, part)
        inboxes = [sender.inbox for sender in self._senders.values() if sender.status is Status.IN]
        data = bytearray()
        if inboxes:
            for block in reduce_part(state.plan, part, inboxes):
                data += block
                await asyncio.sleep(0)
        included = [
            m.hotkey in self._senders and self._senders[m.hotkey].status is Status.IN for m in state.plan.members
        ]
        self._publish(part, bytes(data), included)
        for sender in self._senders.values():
            sender.inbox.discard()

    def _publish(self, part: Part, data: bytes, included: list[bool]) -> None:
        state, mask, digest = self._state, pack_mask(included), hashlib.sha256(data).digest()
        message = result_message(state.group_id, part.index, digest, mask, len(data))
        result = Result(
            part=part.index, included=mask, size_bytes=len(data), sha256=digest, signature=state.me.sign(message)
        )
        state.note_signed(result)
        state.hold(result, part, tuple(included), data, state.me.hotkey)
        state.settle(part)
        self._ready.set()
        self._changed.set()

    async def _add_own(self, part: Part) -> None:
        state = self._state
        sender = self._senders.get(state.me.hotkey)
        if sender is None or state.tree is None or state.payload is None:
            return
        layout, view = state.plan.layout, memoryview(state.payload)
        try:
            for start, stop in blocks(part.start, part.stop):
                block = Block(start=start, stop=stop, proof=state.tree.range_proof(start, stop))
                sender.inbox.add(block, view[layout.byte_offset(start) : layout.byte_offset(stop)])
                await asyncio.sleep(0)  # other streams go on between blocks
            sender.status = Status.IN
        except PeerFault as fault:
            self._put_out(state.me.hotkey, sender, fault, part)

    async def _collect(self) -> None:
        """Until every sender is in or out, or the send deadline. A link that broke may come back for a while."""
        while awaited := [s for s in self._senders.values() if s.status in (Status.AWAITED, Status.SENDING)]:
            wake = self._state.send_deadline
            lost = [s.lost_at for s in awaited if s.lost_at is not None]
            if len(lost) == len(awaited):
                wake = min(wake, max(lost) + RECONNECT_GRACE_S)
            if self._state.now() >= wake:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(wake):
                    await self._changed.wait()

    def _leave_out(self, hotkey: str, sender: Sender, part: Part) -> None:
        total = part.stop - part.start
        late = sender.lost_at is None and sender.status is Status.SENDING
        fault = Fault.LATE if late else Fault.ABSENT
        detail = f"{sender.most_chunks} of {total} chunks came before the send deadline"
        if sender.lost_at is not None:
            detail = f"its link broke after {sender.most_chunks} of {total} chunks"
        sender.status = Status.OUT
        sender.inbox.discard()
        self._state.blame(hotkey, fault, detail, part.index)

    def _put_out(self, hotkey: str, sender: Sender, fault: PeerFault, part: Part) -> None:
        sender.status = Status.OUT
        sender.inbox.discard()
        self._changed.set()
        self._state.blame(hotkey, fault.fault, fault.detail, part.index)

    # Answering

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
            if not self.crash.done():
                self.crash.set_exception(exc)

    async def _greet(self, stream: Stream) -> Member | None:
        state, greeting = self._state, None
        try:
            async with asyncio.timeout_at(min(state.deadline, state.now() + HANDSHAKE_TIMEOUT_S)):
                greeting = await greet(stream, state.plan, state.group_id, state.me, state.member.peer_id, self._nonces)
                asked = state.now()
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
        state.ledger.links[hotkey].answered_in(state.now() - asked)
        state.met.add(hotkey)
        return greeting.member

    async def _converse(self, stream: Stream, member: Member) -> None:
        state = self._state
        if self._live[member.hotkey] >= len(state.parts) + SPARE_STREAMS:
            return
        self._live[member.hotkey] += 1
        try:
            async with asyncio.timeout_at(state.deadline):
                request = await receive(stream, Contribution, Fetch)
                if isinstance(request, Contribution):
                    await self._serve_contribution(stream, member, request)
                while isinstance(request, Fetch):
                    await self._serve_fetch(stream, member, request)
                    request = await receive(stream, Fetch)
        except (TimeoutError, LinkLost) as exc:
            logger.debug("a stream of %s ended: %s", member.hotkey, exc)
        except PeerFault as fault:
            state.blame(member.hotkey, fault.fault, fault.detail)
        finally:
            self._live[member.hotkey] -= 1
            self._changed.set()

    async def _serve_contribution(self, stream: Stream, member: Member, request: Contribution) -> None:
        state, part = self._state, self._state.own_part
        if part is None or request.part != part.index:
            raise PeerFault(Fault.MALFORMED, f"part {request.part} is not ours to reduce")
        expected = part.stop - part.start if member.sends else 0
        if request.num_chunks != expected:
            raise PeerFault(
                Fault.WRONG_SCHEMA, f"expected {expected} chunks of part {part.index}, got {request.num_chunks}"
            )
        sender = self._senders.get(member.hotkey)
        if sender is not None and not await self._take_vector(stream, member, sender, part):
            return
        self._unconfirmed[member.hotkey] += 1
        try:
            await self._ready.wait()
            held = state.held.get(part.index)
            if held is None:
                return
            await self._send_result(stream, member, held)
            async with asyncio.timeout_at(state.confirm_close):
                confirm = await receive(stream, Confirm, max_bytes=MAX_CONFIRM_BYTES)
            state.merge_confirm(confirm, member.hotkey)
            state.content.add(member.hotkey)
        finally:
            self._unconfirmed[member.hotkey] -= 1
            self._changed.set()
        await self._all_confirmed()
        await stream.send(state.confirm().to_bytes())

    async def _take_vector(self, stream: Stream, member: Member, sender: Sender, part: Part) -> bool:
        """Whether the sender's vector for our part is in; tells it where not."""
        if sender.status is not Status.AWAITED or self._closed:
            await _refuse(stream, Fault.LATE, f"our part is {'closed' if self._closed else sender.status.value}")
            return False
        state, inbox = self._state, sender.inbox
        sender.status, sender.lost_at = Status.SENDING, None
        inbox.discard()
        link, began = state.ledger.links[member.hotkey], state.now()
        try:
            async with asyncio.timeout_at(state.send_deadline):
                while sender.status is Status.SENDING and inbox.next_block is not None:
                    block = await receive(stream, Block)
                    data = await stream.receive(inbox.check_header(block))
                    link.bytes_received += len(data)
                    if sender.status is Status.SENDING:  # not left out in the meantime
                        inbox.add(block, data)
                        sender.most_chunks = max(sender.most_chunks, block.stop - part.start)
        except TimeoutError:
            pass
        except LinkLost:
            if sender.status is Status.SENDING:
                sender.status, sender.lost_at = Status.AWAITED, state.now()
                self._changed.set()
            raise
        except PeerFault as fault:
            if sender.status is Status.SENDING:
                self._put_out(member.hotkey, sender, fault, part)
            await _refuse(stream, fault.fault, fault.detail)
            return False
        finally:
            link.seconds += state.now() - began
        if sender.status is not Status.SENDING or inbox.next_block is not None:
            await _refuse(stream, Fault.LATE, "the send deadline has passed")
            return False
        sender.status = Status.IN
        self._changed.set()
        return True

    async def _send_result(self, stream: Stream, member: Member, held: Held) -> None:
        await stream.send(held.result.to_bytes())
        view, link = memoryview(held.data), self._state.ledger.links[member.hotkey]
        for offset in range(0, len(view), RESULT_FRAME_BYTES):
            piece = view[offset : offset + RESULT_FRAME_BYTES]
            await stream.send(piece)
            link.bytes_sent += len(piece)

    async def _serve_fetch(self, stream: Stream, member: Member, request: Fetch) -> None:
        state = self._state
        held = state.held.get(request.part) if request.part not in state.disputed else None
        if held is None:
            status = FetchReply(status="pending" if request.part in state.pending else "none")
            await stream.send(status.to_bytes())
            return
        if request.take:
            self._takes[member.hotkey, request.part] += 1
            if self._takes[member.hotkey, request.part] > MAX_TAKES:
                raise PeerFault(Fault.MALFORMED, f"took part {request.part} more than {MAX_TAKES} times")
        await stream.send(FetchReply(status="have").to_bytes())
        if request.take:
            await self._send_result(stream, member, held)
            state.content.add(member.hotkey)

    # The end

    async def _all_confirmed(self) -> None:
        """Until every open stream has said which signed results it holds, so that what we answer has them all."""
        state = self._state
        await self._wait(lambda: state.all_settled.is_set() and not self._unconfirmed.total(), state.confirm_close)

    async def drain(self) -> None:
        """Until nobody needs us any more: streams have ended, and whoever lost one had time to come back."""
        state = self._state
        linger = min(state.confirm_close, state.now() + LINGER_S)
        await self._wait(lambda: not self._live.total(), state.confirm_close)
        await self._wait(lambda: state.met <= state.content or self._live.total() > 0, linger)
        await self._wait(lambda: not self._live.total(), state.confirm_close)

    async def close(self) -> None:
        """End every conversation."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def raise_bug(self) -> None:
        """Raise what went wrong in a conversation through no peer's fault."""
        if self.crash.done():
            self.crash.result()

    async def _wait(self, condition: Callable[[], bool], until: float) -> None:
        while not condition() and self._state.now() < until:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._changed.wait()


async def _refuse(stream: Stream, fault: Fault, detail: str) -> None:
    await stream.send(Refusal(fault=fault.value, detail=detail[:500]).to_bytes())
