"""A group that hivemind has formed agrees on what it averages: on the plan of one all-reduce.

hivemind tells who is in a group. What each brings, its weight and the root of its vector, is known only when it is
ready. So everyone else opens a stream to the group's leader as soon as the group is formed, long before:

    member   Arrival     its hotkey and addresses
    member   Call        when it will be ready (may be left out)
    leader   Called      when to come: as who called first says, or now, as somebody is ready
    member   Ready       its weight and root
    leader   Settled     the plan, once everyone is ready, gone, or out of time

Steps of a training cannot be cut short: each comes at the end of that step of its own that is nearest to the time it
was called for. Peers that left the last round together have their steps end together: then nobody waits.

Who is gone is known at once, by the end of its stream. Where the leader is gone the group is broken, and hivemind looks
for another.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgpack
from pydantic import Field

from hivetrain.averaging.group import GroupPlan, Member, plan_from_dict, plan_to_dict
from hivetrain.averaging.layout import PayloadLayout
from hivetrain.averaging.messages import Digest, Hotkey, Message, receive
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import Fault, PeerFault, ServiceError
from hivetrain.trainer.lobby import Lobby

logger = logging.getLogger(__name__)

MAX_PLAN_BYTES = 1 << 20
OPEN_TIMEOUT_S = 5.0
AGAIN_S = 0.2
MAX_CALL_S = 3600.0
LARGEST_SUM = 1e36  # of weight times value, below what a plan allows
MIN_DEADLINE_S = 1.0

Seconds = Annotated[float, Field(ge=0, le=MAX_CALL_S, allow_inf_nan=False)]


class Arrival(Message):
    """Member: who I am, and where I can be reached."""

    kind: Literal["arrival/1"] = "arrival/1"
    hotkey: Hotkey
    maddrs: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
    reduces: bool
    layout: Annotated[str, Field(max_length=64)]


class Call(Message):
    """Member: I shall be ready in so many seconds."""

    kind: Literal["call"] = "call"
    in_s: Seconds


class Called(Message):
    """Leader: come in so many seconds."""

    kind: Literal["called"] = "called"
    in_s: Seconds


class Ready(Message):
    """Member: what I bring. Weight 0: nothing, I only receive."""

    kind: Literal["ready"] = "ready"
    weight: Annotated[float, Field(ge=0, lt=1e12, allow_inf_nan=False)]
    root: Digest | None


class Settled(Message):
    """Leader: the plan, packed; None: nobody brings anything."""

    kind: Literal["settled"] = "settled"
    plan: Annotated[bytes, Field(max_length=MAX_PLAN_BYTES)] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long a group waits.

    Attributes:
        absent_s: for who has not come, from when the first is ready.
        ready_s: for who has come and is not ready.
        total_s: from when the first is ready to the end of the all-reduce.
    """

    absent_s: float
    ready_s: float
    total_s: float


@dataclass(slots=True)
class _Guest:
    arrival: Arrival
    stream: Stream
    ready: Ready | None = None
    gone: bool = False


class Meeting:
    """One member's part in it.

    Args:
        group: hivemind's id of the group.
        peer_ids: its members, in the order of the plan.
        leader: one of them, whom the others can reach.
        lobby: started.
        arrival: what we say of ourselves.
        layout: of everyone's payload.
        times: the same for everyone.
        on_called: called at most once, with the seconds in which to come.
    """

    def __init__(
        self,
        group: bytes,
        peer_ids: Sequence[str],
        leader: str,
        lobby: Lobby,
        arrival: Arrival,
        layout: PayloadLayout,
        times: Times,
        on_called: Callable[[float], None] = lambda in_s: None,
    ) -> None:
        self.group, self.lobby, self.layout = group, lobby, layout
        self._peer_ids, self._leader, self._arrival = tuple(peer_ids), leader, arrival
        self._times, self._on_called = times, on_called
        self._room = lobby.room(group, "meet")
        self.broken = asyncio.Event()
        self._guests: dict[str, _Guest] = {}
        self._changed = asyncio.Event()
        self._first_ready: float | None = None
        self._due: float | None = None
        self._arrived, self._may_call, self._wanted = False, True, math.inf
        self._stream: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
        self._settled: asyncio.Future[GroupPlan | None] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def _leads(self) -> bool:
        return self._leader == self.lobby.transport.peer_id

    def start(self) -> None:
        """Expect the others, or go to the leader."""
        if self._leads:
            others = {peer_id for peer_id in self._peer_ids if peer_id != self._leader}
            self._room.set_acceptor(self._host, others)
        else:
            self._spawn(self._visit())

    async def close(self) -> None:
        """Leave. Safe to call twice."""
        if self._leads:
            await self._room.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for guest in self._guests.values():
            await guest.stream.close()
        if self._stream.done() and self._stream.exception() is None:
            await self._stream.result().close()

    async def call(self, in_s: float) -> None:
        """Have everyone come in so many seconds, unless they were called before. Else they are when we are ready."""
        if self._leads:
            self._call(in_s)
            return
        self._wanted = asyncio.get_running_loop().time() + min(in_s, MAX_CALL_S)
        if self._arrived:
            await self._say_call(self._stream.result())

    async def _say_call(self, stream: Stream) -> None:
        if self._may_call and self._due is None and self._wanted < math.inf:
            self._may_call = False
            await _tell(stream, Call(in_s=max(0.0, self._wanted - asyncio.get_running_loop().time())))

    async def settle(self, weight: float, root: bytes | None) -> GroupPlan | None:
        """Say what we bring, and learn what is averaged.

        Args:
            weight: of our vector; 0: we have none.
            root: its Merkle root.

        Returns:
            The plan, with us in it; None where nobody brings anything.

        Raises:
            ServiceError: the group fell apart, or went on without us.
        """
        ready = Ready(weight=weight, root=root if weight > 0 else None)
        if self._leads:
            return await self._settle_for_all(ready)
        try:
            async with asyncio.timeout(self._times.absent_s + self._times.ready_s):
                stream = await asyncio.shield(self._stream)
                self._may_call = False  # after Ready nothing is said
                await stream.send(ready.to_bytes())
                plan = await asyncio.shield(self._settled)
        except TimeoutError as exc:
            raise ServiceError(f"peer {self._leader} did not settle what the group averages") from exc
        except PeerFault as exc:
            raise ServiceError(f"peer {self._leader}, who leads the group: {exc}") from exc
        if plan is not None:
            self._require_ours(plan, ready)
        return plan

    def _require_ours(self, plan: GroupPlan, ready: Ready) -> None:
        member = plan.member(self._arrival.hotkey)
        if plan.run_id != self.group.hex() or plan.layout != self.layout:
            raise ServiceError(f"peer {self._leader} settled on a plan for another group")
        if member is None or (member.weight, member.root) != (ready.weight, ready.root):
            raise ServiceError(f"peer {self._leader} settled on a plan without us: did we come too late?")

    # A member

    async def _visit(self) -> None:
        until, loop = asyncio.get_running_loop().time() + self._times.absent_s, asyncio.get_running_loop()
        try:
            while True:
                try:
                    stream = await self._room.open(self._leader, (), OPEN_TIMEOUT_S)
                    break
                except LinkLost:
                    if loop.time() >= until:
                        raise
                    await asyncio.sleep(AGAIN_S)
            self._stream.set_result(stream)
            await stream.send(self._arrival.to_bytes())
            self._arrived = True
            await self._say_call(stream)
            message = await receive(stream, Called, Settled, max_bytes=2 * MAX_PLAN_BYTES)
            if isinstance(message, Called):
                self._call(message.in_s)
                message = await receive(stream, Settled, max_bytes=2 * MAX_PLAN_BYTES)
            self._settled.set_result(_unpack(message.plan))
        except (PeerFault, ServiceError) as exc:
            for future in (self._stream, self._settled):
                if not future.done():
                    future.set_exception(exc)
                    future.exception()  # whether or not anybody asks
            self.broken.set()

    # The leader

    async def _host(self, stream: Stream) -> None:
        peer_id = stream.remote_peer_id
        try:
            arrival = await receive(stream, Arrival)
        except PeerFault as exc:
            logger.debug("averaging: %s does not say who it is: %s", peer_id, exc)
            return
        if arrival.layout != self.layout.layout_hash or peer_id in self._guests:
            return
        guest = self._guests[peer_id] = _Guest(arrival, stream)
        try:
            if self._due is not None:
                await stream.send(self._called().to_bytes())
            message = await receive(stream, Call, Ready)
            if isinstance(message, Call):
                self._call(message.in_s)
                message = await receive(stream, Ready)
            guest.ready = message
            self._is_ready()
            self._notify()
            await stream.receive(0)  # nothing more is said: this is how its end is noticed
        except PeerFault as exc:
            logger.debug("averaging: %s has left the group: %s", peer_id, exc)
        finally:
            guest.gone = True
            if all(other.gone for other in self._guests.values()) and len(self._guests) == len(self._peer_ids) - 1:
                self.broken.set()
            self._notify()

    def _call(self, in_s: float) -> None:
        if self._due is None:
            in_s = min(in_s, self._times.ready_s)
            self._due = asyncio.get_running_loop().time() + in_s
            self._on_called(in_s)
            for guest in self._guests.values():
                if guest.ready is None and not guest.gone:
                    self._spawn(_tell(guest.stream, self._called()))

    def _called(self) -> Called:
        return Called(in_s=max(0.0, (self._due or 0.0) - asyncio.get_running_loop().time()))

    def _is_ready(self) -> None:
        if self._first_ready is None:
            self._first_ready = asyncio.get_running_loop().time()
            self._call(0.0)

    async def _settle_for_all(self, ready: Ready) -> GroupPlan | None:
        self._is_ready()
        await self._until_ready()
        bring = {self._leader: (self._arrival, ready)}
        for peer_id, guest in self._guests.items():
            if guest.ready is not None and not guest.gone:
                bring[peer_id] = guest.arrival, guest.ready
        if len(bring) < 2:
            raise ServiceError("nobody else in the group is ready")
        plan = self._plan(bring) if any(said.weight for _, said in bring.values()) else None
        packed = None if plan is None else msgpack.packb(plan_to_dict(plan))
        told = [
            _tell(self._guests[peer_id].stream, Settled(plan=packed)) for peer_id in bring if peer_id in self._guests
        ]
        await asyncio.gather(*told)
        return plan

    async def _until_ready(self) -> None:
        clock = asyncio.get_running_loop().time
        began = clock() if self._first_ready is None else self._first_ready
        others = [peer_id for peer_id in self._peer_ids if peer_id != self._leader]
        while True:
            known = [self._guests.get(peer_id) for peer_id in others]
            if any(guest is not None and guest.ready is None and not guest.gone for guest in known):
                until = began + self._times.ready_s
            elif None in known:
                until = began + self._times.absent_s
            else:
                return
            try:
                async with asyncio.timeout_at(until):
                    await self._changed.wait()
            except TimeoutError:
                return

    def _plan(self, bring: dict[str, tuple[Arrival, Ready]]) -> GroupPlan:
        """What is averaged, in the group's order. Half of the time that is left is for vectors, half for repairs."""
        members = [
            Member(
                hotkey=bring[peer_id][0].hotkey,
                peer_id=peer_id,
                maddrs=tuple(bring[peer_id][0].maddrs),
                weight=bring[peer_id][1].weight,
                reduces=bring[peer_id][0].reduces,
                root=bring[peer_id][1].root,
            )
            for peer_id in self._peer_ids
            if peer_id in bring
        ]
        waited = asyncio.get_running_loop().time() - (self._first_ready or 0.0)
        deadline_s = max(MIN_DEADLINE_S, 0.9 * self._times.total_s - waited)
        try:
            return GroupPlan(
                run_id=self.group.hex(),
                round=0,
                attempt=0,
                members=tuple(members),
                layout=self.layout,
                send_deadline_s=deadline_s / 2,
                deadline_s=deadline_s,
                audit_blocks=0,  # friends take each other's word; it saves a round trip
                max_abs=LARGEST_SUM / max(1.0, sum(member.weight for member in members)),
            )
        except ValueError as exc:
            raise ServiceError(f"the group cannot average: {exc}") from exc

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _tell(stream: Stream, message: Message) -> None:
    try:
        await stream.send(message.to_bytes())
    except LinkLost as lost:
        logger.debug("averaging: a message did not arrive: %s", lost.detail)


def _unpack(packed: bytes | None) -> GroupPlan | None:
    if packed is None:
        return None
    try:
        raw = msgpack.unpackb(packed)
    except Exception as exc:  # msgpack documents no common base for what a hostile frame can raise
        raise PeerFault(Fault.MALFORMED, f"a plan that is not msgpack: {exc}") from exc
    return plan_from_dict(raw)
