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
from collections.abc import Collection

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
        self.inbox: deque[Tensor] = deque()
        self.delivered = 0  # batches, those already averaged included
        self.lost_at: float | None = None  # by `Clock.awake`
        self.size_bytes, self.seconds = 0, 0.0  # read, and waited for
        self.refusal: PeerFault | None = None


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
        self.mean = Mean(state.plan, state.store, part, rank)
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
        state, seed = self._state, rounding_seed(self._state.group_id)
        for index, (start, stop) in enumerate(self.mean.batches):
            await self._gather(index)
            present = [sender for sender in self._senders.values() if sender.status is not Status.OUT]
            if not present:
                self.mean.fail("nobody's vector is in")
                raise GaveUp("nobody's vector is in", None)
            vectors = [sender.inbox.popleft() for sender in present]
            weights = [sender.member.weight for sender in present]
            data = reduce_chunks(state.plan, start, stop, vectors, weights, seed)
            del vectors
            hotkeys = {sender.member.hotkey for sender in present}
            self.mean.add(pack_mask([m.hotkey in hotkeys for m in state.plan.members]), data)
            await asyncio.sleep(0)
        runs = mask_runs(self.mean.batches, self.mean.masks)
        root = self.mean.tree.root
        self.mean.finish(sign_result(state.me, state.group_id, self._part.index, self._rank, runs, root))
        return self.mean

    # Waiting

    async def _gather(self, index: int) -> None:
        """Until every sender that is still in has brought batch ``index``."""
        clock = self._state.clock
        self._load_own(index)
        while waited := [s for s in self._senders.values() if s.status is not Status.OUT and s.delivered <= index]:
            now = clock.now()
            due = {sender.member.hotkey: self._wait_until(sender) for sender in waited}
            for sender in waited:
                if due[sender.member.hotkey] <= now:
                    self._leave_out(sender)
            if min(due.values()) > now:
                await self._arrived.wait(min(due.values()))

    def _wait_until(self, sender: Sender) -> float:
        """Loop time. A sender whose stream is being read has its reader's patience."""
        clock = self._state.clock
        if sender.status is Status.SENDING:
            return self._deadline
        if sender.lost_at is not None:
            since, seconds = sender.lost_at, min(RECONNECT_GRACE_S, self._state.plan.patience_s)
        else:
            since, seconds = self._opened, self._patience_s
        return min(self._deadline, clock.now() + since + seconds - clock.awake())

    def _leave_out(self, sender: Sender) -> None:
        total = len(self.mean.batches)
        detail = f"{sender.delivered} of {total} batches came in time"
        fault = Fault.LATE if sender.status is Status.SENDING else Fault.ABSENT
        if sender.lost_at is not None:
            detail = f"its link broke after {sender.delivered} of {total} batches"
        self._put_out(sender, PeerFault(fault, detail))

    def _put_out(self, sender: Sender, fault: PeerFault) -> None:
        if sender.status is Status.OUT:
            return
        sender.status, sender.refusal = Status.OUT, fault
        sender.inbox.clear()
        self._state.blame(sender.member.hotkey, fault.fault, fault.detail, self._part.index)
        self._arrived.notify()
        self.mean.grown.notify()

    def drop(self, hotkey: str) -> None:
        """Disregard a sender from here on."""
        sender = self._senders.get(hotkey)
        if sender is not None and sender.status is not Status.OUT:
            sender.status, sender.refusal = Status.OUT, PeerFault(Fault.LATE, "banned for this round")
            sender.inbox.clear()
            self._arrived.notify()
            self.mean.grown.notify()

    def _load_own(self, index: int) -> None:
        state = self._state
        sender = self._senders.get(state.me.hotkey)
        if sender is None or sender.status is Status.OUT or state.payload is None:
            return
        start, stop = self.mean.batches[index]
        data = memoryview(state.payload)[self._layout.byte_offset(start) : self._layout.byte_offset(stop)]
        try:
            sender.inbox.append(decode_sane(state.plan, start, stop, data))
            sender.delivered = index + 1
        except PeerFault as fault:
            self._put_out(sender, fault)

    # Reading

    def admit(self, member: Member, first: int) -> Sender | None:
        """Let a sender begin, or come back after its link broke, from batch ``first`` on. None: nothing is missing.

        Raises:
            PeerFault: not now, or not any more.
        """
        sender = self._senders[member.hotkey]
        if sender.status is Status.OUT:
            raise sender.refusal or PeerFault(Fault.LATE, "its turn is over")
        if sender.status is Status.IN:
            return None
        if sender.status is Status.SENDING:
            raise PeerFault(Fault.LATE, "another stream of it is being read")
        if first > sender.delivered:
            raise PeerFault(Fault.MALFORMED, f"it goes on at batch {first}, {sender.delivered} have come")
        sender.status = Status.SENDING
        return sender

    async def read(self, stream: Stream, sender: Sender, first: int) -> None:
        """Take the sender's batches as they come, until all are here or it is out.

        Raises:
            Nothing that is the sender's fault: that is recorded, and `refusal` then says what to tell it.
        """
        clock, plan = self._state.clock, self._state.plan
        try:
            async with clock.patience(plan.patience_s, self._deadline) as patience:
                for index in range(first, len(self.mean.batches)):
                    patience.hold()
                    while index >= len(self.mean.masks) + WINDOW and sender.status is Status.SENDING:
                        await self.mean.grown.wait()
                    patience.feed()
                    await self._read_batch(stream, sender, index)
                    if sender.status is not Status.SENDING:
                        return
                sender.status = Status.IN
        except TimeoutError:
            if sender.status is Status.SENDING:
                self._leave_out(sender)
        except LinkLost:
            pass
        except PeerFault as fault:
            self._put_out(sender, fault)
        finally:
            if sender.status is Status.SENDING:
                sender.status, sender.lost_at = Status.AWAITED, clock.awake()
            self._arrived.notify()

    async def _read_batch(self, stream: Stream, sender: Sender, index: int) -> None:
        clock, link = self._state.clock, self._state.link(sender.member)
        due, began = self.mean.batches[index], clock.now()
        header = await receive(stream, Batch)
        if (header.start, header.stop) != due:
            raise PeerFault(Fault.MALFORMED, f"expected chunks {due}, got {(header.start, header.stop)}")
        data = await stream.receive(self._layout.range_bytes(*due))
        seconds = clock.now() - began
        link.seconds += seconds
        link.bytes_received += len(data)
        sender.seconds += seconds
        sender.size_bytes += len(data)
        self._require_rate(sender)
        if sender.status is not Status.SENDING or index < sender.delivered:
            return
        sender.inbox.append(decode_committed(self._state.plan, sender.member, header, data))
        sender.delivered += 1
        self._arrived.notify()

    def _require_rate(self, sender: Sender) -> None:
        plan = self._state.plan
        in_time = self._layout.range_bytes(self._part.start, self._part.stop) / plan.send_deadline_s
        floor = max(plan.min_rate, in_time / 2)
        if sender.size_bytes < floor * (sender.seconds - plan.patience_s):
            rate = sender.size_bytes / sender.seconds
            raise PeerFault(Fault.LATE, f"{rate:.0f} bytes/s, at least {floor:.0f} are needed")
