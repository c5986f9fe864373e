"""What one node knows in the course of one all-reduce; shared by its opening and its answering side.

Everything runs in one event loop, so there are no locks. What a node knows of each part is a `Holding`: whose turn it
is to reduce it (the rank: how many reducers this node gave up), and the mean, once it is here, signed and audited. A
rank only goes up: who has said "none" for it never takes that reducer's late mean from the reducer itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hivetrain.averaging.clock import Clock, Signal
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan, Member, Part
from hivetrain.averaging.handshake import open_handshake
from hivetrain.averaging.means import Mean
from hivetrain.averaging.outcome import Ledger, Link
from hivetrain.averaging.store import MeanStore
from hivetrain.averaging.transport import Stream, Transport
from hivetrain.errors import Fault
from hivetrain.identity import Identity, Verify
from hivetrain.verification.merkle import MerkleTree

if TYPE_CHECKING:
    from hivetrain.averaging.reduction import Reduction

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
RECONNECT_GRACE_S = 3.0  # a peer that was here and whose link broke has this long to come back
MAX_REOPENINGS = 4
BANNING = frozenset(
    {
        Fault.LATE,
        Fault.TRUNCATED,
        Fault.OVERSIZED,
        Fault.MALFORMED,
        Fault.WRONG_SCHEMA,
        Fault.NOT_FINITE,
        Fault.OUT_OF_BOUND,
        Fault.NOT_COMMITTED,
        Fault.BAD_SIGNATURE,
        Fault.WRONG_AVERAGE,
    }
)


class GaveUp(Exception):
    """The reducer of one rank gives us no mean.

    Attributes:
        fault: what that is, if it turns out that nobody got one; None: not its fault, or recorded already.
    """

    def __init__(self, story: str, fault: Fault | None) -> None:
        super().__init__(story)
        self.fault = fault


class Stale(GaveUp):
    """What somebody passed on is void, or not whole any more: ask again, it will know by now."""


class Holding:
    """What we know of one part.

    Attributes:
        rank: of the reducer from whom we expect it now; as many as there are reducers: from nobody.
        mean: whole, signed and audited.
        reduction: our own, since it is our turn.
        parked: hotkeys that wait for our turn to come.
        given_up: by rank, why.
        settled: the mean is here, or will not come.
        doubted: a mean is here that we take only if somebody else does.
        progress_at: when the reducer that we wait for last gave us something, by `Clock.awake`; None: we do not wait.
        abandoned: set when nothing can come of the present rank; ``why`` says why.
        reopened: set when what was settled is not any more.
        changed: notified when ``mean``, ``reduction`` or ``rank`` has changed.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.rank = 0
        self.mean: Mean | None = None
        self.reduction: Reduction | None = None
        self.parked: set[str] = set()
        self.given_up: dict[int, GaveUp] = {}
        self.settled = False
        self.doubted = False
        self.progress_at: float | None = None
        self.why = GaveUp("", None)
        self.reopenings = 0
        self.abandoned = asyncio.Event()
        self.reopened = asyncio.Event()
        self.changed = Signal()

    def abandon(self, why: GaveUp) -> None:
        """Wait for the present rank no longer."""
        self.why = why
        self.abandoned.set()

    def give_up(self, rank: int, why: GaveUp) -> None:
        """Expect nothing more of that rank's reducer."""
        logger.info("part %d: rank %d given up: %s", self.part.index, rank, why)
        self.given_up[rank] = why
        self.reduction = None
        self.rank = rank + 1
        self.changed.notify()

    def take(self, mean: Mean) -> None:
        """Hold an audited mean."""
        self.mean = mean
        self.changed.notify()


class RoundState:
    """State of one all-reduce on one node. ``begin`` starts its clock.

    Raises:
        ValueError: the plan does not fit us: not a member, another peer id, or another payload than committed.
    """

    def __init__(
        self,
        plan: GroupPlan,
        me: Identity,
        payload: Bytes | None,
        transport: Transport,
        verify: Verify,
        tree: MerkleTree | None = None,
        memory: bytearray | None = None,
    ) -> None:
        member = plan.member(me.hotkey)
        if member is None:
            raise ValueError(f"{me.hotkey} is not a member of this group")
        if member.peer_id != transport.peer_id:
            raise ValueError(f"the plan has us at peer {member.peer_id}, our transport is {transport.peer_id}")
        self.plan = plan
        self.group_id = plan.group_id()
        self.me = me
        self.member = member
        self.transport = transport
        self.verify = verify
        self.payload = payload
        self.tree = _committed_tree(plan, member, payload, tree)
        self.clock = Clock(plan)
        self.store = MeanStore(plan.layout, memory)
        self.holdings = {part.index: Holding(part) for part in plan.parts() if part.start < part.stop}
        self.ledger = Ledger({m.hotkey: Link() for m in plan.members if m.hotkey != me.hotkey})
        self.met: set[str] = set()  # hotkeys that proved themselves on any stream
        self.banned: set[str] = set()  # disregarded for the rest of the round
        self.version = 0  # of what we hold
        self.changed = Signal()  # notified when that changes, and when somebody says what it holds
        self.crash: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # a bug of ours
        self.serving = 0  # means that we are sending, or are waited for to send
        self._streams: set[Stream] = set()

    @property
    def others(self) -> list[Member]:
        """Every member but us."""
        return [member for member in self.plan.members if member.hotkey != self.me.hotkey]

    def link(self, peer: Member) -> Link:
        """What we measure of another member."""
        return self.ledger.links[peer.hotkey]

    # Links

    async def connect(self, peer: Member, until: float) -> Stream:
        """A stream to ``peer``, on which it has proved its hotkey.

        Raises:
            LinkLost: not reachable now.
            PeerFault: it is not who the plan says.
            ServiceError: our own side does not work.
            TimeoutError: ``until`` has passed.
        """
        now = self.clock.now
        async with asyncio.timeout_at(until):
            timeout_s = max(0.01, min(OPEN_TIMEOUT_S, until - now()))
            stream = await self.transport.open(peer.peer_id, peer.maddrs, timeout_s)
            try:
                opened = now()
                await open_handshake(stream, self.plan, self.group_id, self.me, self.member.peer_id, peer, self.verify)
            except BaseException:
                await stream.close()
                raise
        self.link(peer).answered_in(now() - opened)
        self.met.add(peer.hotkey)
        self._streams.add(stream)
        return stream

    async def disconnect(self, stream: Stream) -> None:
        """End a stream that we opened."""
        self._streams.discard(stream)
        await stream.close()

    async def close_streams(self) -> None:
        """End every stream that we opened."""
        await asyncio.gather(*(stream.close() for stream in self._streams))

    # Blame

    def blame(self, hotkey: str, fault: Fault, detail: str, part: int = -1, evidence: bytes = b"") -> None:
        """Record a fault, and disregard who did it, unless it is one of silence and we ourselves had stopped."""
        if self.clock.stalled_s and fault in (Fault.ABSENT, Fault.LATE):
            logger.warning("not blaming %s as %s: this process stood still", hotkey, fault.value)
            return
        self.ledger.record(hotkey, fault, detail, part, evidence)
        if fault in BANNING and hotkey != self.me.hotkey and hotkey not in self.banned:
            self.banned.add(hotkey)
            for holding in self.holdings.values():
                if holding.reduction is not None:
                    holding.reduction.drop(hotkey)
            self.changed.notify()

    # What is settled

    @property
    def all_settled(self) -> bool:
        """Whether no part is on its way."""
        return all(holding.settled for holding in self.holdings.values())

    def settle(self, holding: Holding) -> None:
        """The part's mean is here, or will not come."""
        holding.settled = True
        self._moved()

    def reopen(self, holding: Holding, rank: int) -> None:
        """What we hold of a part is void, or not what the group holds: obtain it again, from ``rank`` on."""
        holding.reopenings += 1
        if holding.mean is not None:
            holding.mean.fail("it is void")  # whoever takes it from us must not go on: its memory is needed
        holding.mean = None
        holding.rank = max(holding.rank, rank)
        holding.abandon(Stale("there is evidence against it", None))
        if holding.settled:
            holding.settled = False
            holding.reopened.set()
        holding.changed.notify()
        self._moved()

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """While somebody takes a mean from us: we do not leave then."""
        self.serving += 1
        try:
            yield
        finally:
            self.serving -= 1
            self.changed.notify()

    def release(self) -> None:
        """Let go of what is large: the round's objects refer to each other, and would hold it until a collection."""
        self.holdings.clear()
        self.payload = self.tree = None
        del self.store

    def _moved(self) -> None:
        self.version += 1
        self.changed.notify()


def _committed_tree(
    plan: GroupPlan, member: Member, payload: Bytes | None, tree: MerkleTree | None
) -> MerkleTree | None:
    if not member.sends:
        if payload is not None:
            raise ValueError(f"{member.hotkey} has weight 0 in this plan, so it must not bring a payload")
        return None
    if payload is None:
        raise ValueError(f"{member.hotkey} has weight {member.weight:g} in this plan, so it must bring a payload")
    if len(payload) != plan.layout.size_bytes:
        raise ValueError(f"the layout has {plan.layout.size_bytes} bytes, our payload has {len(payload)}")
    if tree is None:
        tree = MerkleTree(plan.layout.chunk_digests(payload))
    if tree.root != member.root:
        root = member.root.hex() if member.root else None
        raise ValueError(f"the plan has our root as {root}, our payload's is {tree.root.hex()}")
    return tree
