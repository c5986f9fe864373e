"""One part on its reducer: batches of vectors in, batches of the mean out, in bounded memory.

A batch is reduced as soon as every sender that is still in has brought it; a reader runs at most `WINDOW` batches
ahead of that, and then leaves its sender to the transport's back pressure. Whoever fails in between is in the batches
before and out of those after; the masks say so.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from hivetrain.averaging.clock import Signal
from hivetrain.averaging.group import Member, Part
from hivetrain.averaging.means import Mean
from hivetrain.averaging.messages import Batch, receive
from hivetrain.averaging.reducing import decode_committed, decode_sane, reduce_chunks, rounding_seed
from hivetrain.averaging.results import mask_runs, pack_mask, sign_result
from hivetrain.averaging.state import RECONNECT_GRACE_S, GaveUp, RoundState
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

logger = logging.getLogger(__name__)

WINDOW = 2  # batches


class Status(enum.Enum):
    """Where one sender stands with us."""

    AWAITED = "awaited"  # not here, or its link broke
    SENDING = "sending"  # a stream of it is being read
    IN = "in"  # all batches are here and checked
    OUT = "out"  # given up or at fault: it is in no batch from here on


class Sender:
    """One sender of the part."""

    def __init__(self, member: Member, status: Status = Status.AWAITED) -> None:
        self.member = member
        self.status = status
        self.inbox: deque[tuple[list[Tensor], bytearray]] = deque()  # pieces, and memory that they may share
        self.delivered = 0  # batches, those already averaged included
        self.lost_at: float | None = None  # by `Clock.awake`
        self.size_bytes, self.seconds = 0, 0.0  # read, and waited for
        self.refusal: PeerFault | None = None  # why it gets nothing from us; who is only late gets the mean


class Reduction:
    """Our turn at a part.

    Args:
        rank: how many reducers failed at it before us.
        expected: senders to wait for; whoever else comes is refused.
    """

    def __init__(self, state: RoundState, part: Part, rank: int, expected: Collection[str]) -> None:
        self._state = state
        self._part = part
        self._rank = rank
        self._layout = state.plan.layout
        self._opened = state.clock.awake() if rank else state.clock.begin_awake
        self._patience_s = min(RECONNECT_GRACE_S, state.plan.patience_s) if rank else state.plan.patience_s
        self._deadline = self._vectors_until()
        self._arrived = Signal()
        self.ended = asyncio.Event()
        self.mean = Mean(state.plan, state.store, part, rank)
        self._batch_bytes = max(self._layout.range_bytes(*batch) for batch in self.mean.batches)
        self._spare: list[bytearray] = []  # used before: fresh pages would cost as much as what is done with them
        members = [m for m in state.plan.members if m.sends]
        self._senders = {m.hotkey: Sender(m, Status.AWAITED if m.hotkey in expected else Status.OUT) for m in members}

    def _vectors_until(self) -> float:
        clock = self._state.clock
        if not self._rank:
            return clock.send_deadline
        return clock.now() + max(0.0, clock.fetch_close - clock.now()) / 2

    async def run(self) -> Mean:
        """Reduce the part, batch by batch, and sign it.

        Raises:
            GaveUp: nobody's vector is in.
        """
        try:
            return await self._run()
        finally:
            self.ended.set()

    @property
    def present(self) -> set[str]:
        """Hotkeys of the senders that are not given up."""
        return {hotkey for hotkey, sender in self._senders.items() if sender.status is not Status.OUT}

    async def _run(self) -> Mean:
        state = self._state
        for index in range(len(self.mean.batches)):
            await self._gather(index)
            present = [sender for sender in self._senders.values() if sender.status is not Status.OUT]
            if not present:
                self.mean.fail("nobody's vector is in")
                raise GaveUp("nobody's vector is in", None)
            taken = [sender.inbox.popleft() for sender in present]
            hotkeys, weights = {sender.member.hotkey for sender in present}, [s.member.weight for s in present]
            means = self._means(index, [values for values, _ in taken], weights)
            self.mean.add(pack_mask([m.hotkey in hotkeys for m in state.plan.members]), means)
            self._spare += [buffer for _, buffer in taken]
            del taken, means
            await asyncio.sleep(0)
        runs = mask_runs(self.mean.batches, self.mean.masks)
        root = self.mean.tree.root
        self.mean.finish(sign_result(state.me, state.group_id, self._part.index, self._rank, runs, root))
        return self.mean

    def _means(self, index: int, vectors: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> Iterator[bytes]:
        plan, seed = self._state.plan, rounding_seed(self._state.group_id)
        for place, piece in enumerate(plan.pieces(*self.mean.batches[index])):
            yield reduce_chunks(plan, *piece, [pieces[place] for pieces in vectors], weights, seed)

    # Waiting

    async def _gather(self, index: int) -> None:
        """Until every sender that is still in has brought batch ``index``, or had its time for it.

        That time is the same whatever a sender does: who comes and goes, or sends a byte now and then, gets no more.
        """
        clock, began = self._state.clock, self._state.clock.awake() if index or self._rank else self._opened
        self._load_own(index)
        while waited := [s for s in self._senders.values() if s.status is not Status.OUT and s.delivered <= index]:
            now, awake = clock.now(), clock.awake()
            due = [min(self._deadline, now + self._gives_up(sender, began) - awake) for sender in waited]
            for sender, until in zip(waited, due, strict=True):
                if until <= now:
                    self._leave_out(sender)
            if min(due) > now:
                await self._arrived.wait(min(due))

    def _gives_up(self, sender: Sender, began: float) -> float:
        """Until when a sender is waited for, by `Clock.awake`, where waiting for this batch began then."""
        plan_s = self._state.plan.patience_s
        if sender.lost_at is not None and sender.status is Status.AWAITED:
            return min(began + plan_s, sender.lost_at + RECONNECT_GRACE_S)
        return began + (self._patience_s if sender.status is Status.AWAITED else plan_s)

    def _leave_out(self, sender: Sender) -> None:
        total = len(self.mean.batches)
        detail = f"{sender.delivered} of {total} batches came in time"
        fault = Fault.LATE if sender.status is Status.SENDING else Fault.ABSENT
        if sender.lost_at is not None and sender.status is Status.AWAITED:
            detail = f"its link broke after {sender.delivered} of {total} batches"
        if fault is Fault.ABSENT and self._rank:  # it may have the part from elsewhere by now
            self.drop(sender.member.hotkey)
        else:
            self._put_out(sender, PeerFault(fault, detail))

    def _put_out(self, sender: Sender, fault: PeerFault) -> None:
        if sender.status is Status.OUT:
            return
        sender.status = Status.OUT
        sender.refusal = None if fault.fault in (Fault.LATE, Fault.ABSENT) else fault
        sender.inbox.clear()
        self._state.blame(sender.member.hotkey, fault.fault, fault.detail, self._part.index)
        self._arrived.notify()
        self.mean.grown.notify()

    def drop(self, hotkey: str) -> None:
        """Disregard a sender from here on."""
        sender = self._senders.get(hotkey)
        if sender is not None and sender.status is not Status.OUT:
            sender.status = Status.OUT
            sender.inbox.clear()
            self._arrived.notify()
            self.mean.grown.notify()

    def _load_own(self, index: int) -> None:
        state = self._state
        sender = self._senders.get(state.me.hotkey)
        if sender is None or sender.status is Status.OUT or state.payload is None:
            return
        start, stop = self.mean.batches[index]
        buffer, data = self._buffer(start, stop)
        payload, base = memoryview(state.payload)[self._layout.byte_offset(start) :], self._layout.byte_offset(start)
        try:
            values = []
            for first, end in state.plan.pieces(start, stop):
                own = slice(self._layout.byte_offset(first) - base, self._layout.byte_offset(end) - base)
                data[own] = payload[own]
                values.append(decode_sane(state.plan, first, end, data[own]))
            sender.inbox.append((values, buffer))
            sender.delivered = index + 1
        except PeerFault as fault:
            self._put_out(sender, fault)

    def _buffer(self, start: int, stop: int) -> tuple[bytearray, memoryview]:
        """Memory for any batch, and the piece of it that chunks ``[start, stop)`` take."""
        buffer = self._spare.pop() if self._spare else bytearray(self._batch_bytes)
        return buffer, memoryview(buffer)[: self._layout.range_bytes(start, stop)]

    # Reading

    def admit(self, member: Member, first: int) -> Sender | None:
        """Let a sender begin, or come back after its link broke, from batch ``first`` on.

        Returns:
            None where nothing is missing, or it comes too late: it only gets the mean.

        Raises:
            LinkLost: a stream of it that is still open here goes first; it may try again.
            PeerFault: we do not serve it.
        """
        sender = self._senders[member.hotkey]
        if sender.refusal is not None:
            raise sender.refusal
        if sender.status in (Status.IN, Status.OUT):
            return None
        if sender.status is Status.SENDING:
            # Its link may have broken without our notice: it comes again, and a twin of it gets nothing.
            raise LinkLost("another stream of it is being read")
        if first > sender.delivered:
            raise PeerFault(Fault.MALFORMED, f"it goes on at batch {first}, {sender.delivered} have come")
        sender.status = Status.SENDING
        return sender

    def has_all_of(self, sender: Sender) -> bool:
        """Whether every batch of it is here: then whoever reads them ends by itself."""
        return sender.delivered == len(self.mean.batches)

    async def read(self, stream: Stream, sender: Sender, first: int) -> None:
        """Take the sender's batches as they come, until all are here or it is out.

        Raises:
            Nothing that is the sender's fault: that is recorded, and `refusal` then says what to tell it.
        """
        try:
            for index in range(first, len(self.mean.batches)):
                while index >= len(self.mean.masks) + WINDOW and sender.status is Status.SENDING:
                    await self.mean.grown.wait()
                if sender.status is not Status.SENDING:
                    return
                await self._read_batch(stream, sender, index)
            if sender.status is Status.SENDING:
                sender.status = Status.IN
        except LinkLost:
            pass
        except PeerFault as fault:
            self._put_out(sender, fault)
        finally:
            if sender.status is Status.SENDING:
                sender.status, sender.lost_at = Status.AWAITED, self._state.clock.awake()
            self._arrived.notify()

    async def _read_batch(self, stream: Stream, sender: Sender, index: int) -> None:
        clock, link = self._state.clock, self._state.link(sender.member)
        due, began = self.mean.batches[index], clock.now()
        header = await receive(stream, Batch)
        if (header.start, header.stop) != due:
            raise PeerFault(Fault.MALFORMED, f"expected chunks {due}, got {(header.start, header.stop)}")
        buffer, data = self._buffer(*due)
        await stream.receive_into(data)
        seconds = clock.now() - began
        link.seconds += seconds
        link.bytes_received += len(data)
        sender.seconds += seconds
        sender.size_bytes += len(data)
        self._require_rate(sender)
        if sender.status is not Status.SENDING or index < sender.delivered:
            return
        sender.inbox.append((decode_committed(self._state.plan, sender.member, header, data), buffer))
        sender.delivered += 1
        self._arrived.notify()

    def _require_rate(self, sender: Sender) -> None:
        plan = self._state.plan
        in_time = self._layout.range_bytes(self._part.start, self._part.stop) / plan.send_deadline_s
        floor = max(plan.min_rate, in_time / 2)
        if sender.size_bytes < floor * (sender.seconds - plan.patience_s):
            rate = sender.size_bytes / sender.seconds
            raise PeerFault(Fault.LATE, f"{rate:.0f} bytes/s, at least {floor:.0f} are needed")
