"""What one node knows in the course of one all-reduce; shared by its opening and its answering side.

Everything runs in one event loop, so there are no locks. The loop's clock is the only clock: a test turns it
(`memory.run_in_virtual_time`). Times of the plan, from this node's own start:

    0 ........ send_deadline ........ fetch ....... fetch_close .. confirm_close .. deadline
      vectors                  means         missing means         signed results
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hivetrain.averaging.codecs import require_size
from hivetrain.averaging.group import GroupPlan, Member, Part
from hivetrain.averaging.handshake import open_handshake
from hivetrain.averaging.layout import require_sane
from hivetrain.averaging.messages import Confirm, Result, unpack_mask
from hivetrain.averaging.outcome import AllReduceOutcome, Ledger, Link, Runs, pack_evidence, verify_result
from hivetrain.averaging.transport import Stream, Transport
from hivetrain.errors import Fault, PeerFault, ServiceError
from hivetrain.identity import Identity, Verify
from hivetrain.verification.merkle import MerkleTree

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
RECONNECT_GRACE_S = 3.0  # a peer that was here and whose link broke has this long to come back
MEAN_BOUND_SLACK = 1.01  # a mean of values within the bound may pass it by its rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A part's mean that we hold: signed, checked, and ready to be passed on."""

    result: Result
    data: bytes
    included: tuple[bool, ...]


class RoundState:
    """State of one all-reduce on one node. ``begin`` starts its clock.

    Raises:
        ValueError: the plan does not fit us: not a member, another peer id, or another payload than committed.
    """

    def __init__(
        self, plan: GroupPlan, me: Identity, payload: bytes | None, transport: Transport, verify: Verify
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
        self.tree = _committed_tree(plan, member, payload)
        self.parts = plan.parts()
        self.own_part = next((p for p in self.parts if p.reducer.hotkey == me.hotkey and p.start < p.stop), None)
        self.ledger = Ledger({m.hotkey: Link() for m in plan.members if m.hotkey != me.hotkey})
        self.held: dict[int, Held] = {}
        self.disputed: set[int] = set()
        self.unsettled = {part.index for part in self.parts if part.start < part.stop}
        self.pending = set(self.unsettled)  # of those, what we still expect from its reducer
        self.all_settled = asyncio.Event()
        self.met: set[str] = set()  # hotkeys that proved themselves on any stream
        self.content: set[str] = set()  # of those, who needs nothing more from us
        self.on_change: Callable[[], None] = lambda: None  # called when what somebody waits for may have come
        self.stalled_s = 0.0
        self._signed: dict[int, list[Result]] = {}
        self._vectors = {s.name: torch.zeros(s.num_elements) for s in plan.layout.sections}
        self._streams: list[Stream] = []
        self._begin = 0.0

    # Time

    def begin(self) -> None:
        """Start the clock."""
        self._begin = self.now()

    @staticmethod
    def now() -> float:
        """The loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    @property
    def send_deadline(self) -> float:
        """Loop time after which no vector is accepted."""
        return self._begin + self.plan.send_deadline_s

    @property
    def fetch_at(self) -> float:
        """Loop time after which a mean is asked of others."""
        return self._into_window(0.5)

    @property
    def fetch_close(self) -> float:
        """Loop time after which a mean counts as missing."""
        return self._into_window(0.8)

    @property
    def confirm_close(self) -> float:
        """Loop time after which nobody is waited for."""
        return self._into_window(0.9)

    @property
    def deadline(self) -> float:
        """Loop time at which everything ends."""
        return self._into_window(1.0)

    def _into_window(self, share: float) -> float:
        window = self.plan.deadline_s - self.plan.send_deadline_s
        return self.send_deadline + share * window

    # Links

    async def connect(self, peer: Member, until: float) -> Stream:
        """A stream to ``peer``, on which it has proved its hotkey.

        Raises:
            LinkLost: not reachable now.
            PeerFault: it is not who the plan says.
            ServiceError: our own side does not work.
            TimeoutError: ``until`` has passed.
        """
        async with asyncio.timeout_at(until):
            timeout_s = max(0.01, min(OPEN_TIMEOUT_S, until - self.now()))
            stream = await self.transport.open(peer.peer_id, peer.maddrs, timeout_s)
            try:
                opened = self.now()
                await open_handshake(stream, self.plan, self.group_id, self.me, self.member.peer_id, peer, self.verify)
            except BaseException:
                await stream.close()
                raise
        self.ledger.links[peer.hotkey].answered_in(self.now() - opened)
        self.met.add(peer.hotkey)
        self._streams.append(stream)
        return stream

    async def close_streams(self) -> None:
        """End every stream that we opened."""
        await asyncio.gather(*(stream.close() for stream in self._streams))

    # Blame

    def blame(self, hotkey: str, fault: Fault, detail: str, part: int = -1) -> None:
        """Record a fault, unless it is one of silence and we ourselves had stopped."""
        if self.stalled_s and fault in (Fault.ABSENT, Fault.LATE):
            logger.warning("not blaming %s as %s: this process stood still for %.1f s", hotkey, fault, self.stalled_s)
            return
        self.ledger.record(hotkey, fault, detail, part)

    # Results

    def check_result(self, result: Result, part: Part, bearer: str) -> tuple[bool, ...] | None:
        """Who is in a result, or None where it is unfit; blames ``bearer`` or the reducer."""
        if result.part != part.index or not verify_result(result, self.plan, self.group_id, self.verify):
            self.blame(bearer, Fault.BAD_SIGNATURE, f"not a result that {part.reducer.hotkey} signed", part.index)
            return None
        self.note_signed(result)
        try:
            included = unpack_mask(result.included, len(self.plan.members))
            if any(is_in and not m.sends for is_in, m in zip(included, self.plan.members, strict=True)):
                raise PeerFault(Fault.WRONG_AVERAGE, "the mean includes a member that sends nothing")
            size = self.plan.layout.range_bytes(part.start, part.stop) if any(included) else 0
            require_size(result.size_bytes, size, f"the mean of part {part.index}")
        except PeerFault as fault:
            self.blame(part.reducer.hotkey, fault.fault, fault.detail, part.index)
            return None
        return included

    def hold(self, result: Result, part: Part, included: tuple[bool, ...], data: bytes, bearer: str) -> None:
        """Take a checked result's bytes; blames ``bearer`` or the reducer where they are unfit."""
        if hashlib.sha256(data).digest() != result.sha256 or len(data) != result.size_bytes:
            self.blame(bearer, Fault.NOT_COMMITTED, "the mean's bytes are not those that were signed", part.index)
            return
        if data:
            try:
                values = self.plan.layout.decode_chunks(data, part.start, part.stop)
                require_sane(values, self.plan.max_abs * MEAN_BOUND_SLACK)
            except PeerFault as fault:
                self.blame(part.reducer.hotkey, Fault.WRONG_AVERAGE, f"no mean: {fault.detail}", part.index)
                return
            position = 0
            for span in self.plan.layout.spans(part.start, part.stop):
                piece = values[position : position + span.num_elements]
                self._vectors[span.section.name][span.start : span.stop] = piece
                position += span.num_elements
        self.held[part.index] = Held(result=result, data=data, included=included)

    def note_signed(self, result: Result) -> None:
        """Remember a result whose signature holds; a second one that differs is a proof against its reducer."""
        known = self._signed.setdefault(result.part, [])
        said = (result.sha256, result.included, result.size_bytes)
        if any(said == (other.sha256, other.included, other.size_bytes) for other in known):
            return
        known.append(result)
        if len(known) == 2:
            self.disputed.add(result.part)
            reducer = self.parts[result.part].reducer.hotkey
            detail = f"signed two means of part {result.part}: {known[0].sha256.hex()} and {result.sha256.hex()}"
            self.ledger.record(reducer, Fault.WRONG_AVERAGE, detail, result.part, pack_evidence(*known))

    def merge_confirm(self, confirm: Confirm, bearer: str) -> None:
        """Compare a member's signed results with ours."""
        for result in confirm.results:
            known = self._signed.get(result.part, [])
            if len(known) >= 2 or any(result == other for other in known):
                continue
            if not verify_result(result, self.plan, self.group_id, self.verify):
                self.blame(bearer, Fault.BAD_SIGNATURE, f"passed on a result of part {result.part} that nobody signed")
                return
            self.note_signed(result)

    def confirm(self) -> Confirm:
        """Every signed result that we know; of a disputed part, two."""
        return Confirm(results=[result for known in self._signed.values() for result in known[:2]])

    def settle(self, part: Part) -> None:
        """The part's mean is here, or will not come."""
        self.pending.discard(part.index)
        self.unsettled.discard(part.index)
        if not self.unsettled:
            self.all_settled.set()
            self.on_change()

    def outcome(self) -> AllReduceOutcome:
        """Everything, at the end.

        Raises:
            ServiceError: our own side does not work: our transport died, or we reached none of several members.
        """
        others = len(self.plan.members) - 1
        if not self.transport.alive:
            raise ServiceError("our own transport stopped during the all-reduce")
        if others >= 2 and not self.met:
            raise ServiceError(f"reached none of the {others} other members: our own link is the likelier cause")
        digest = hashlib.sha256(f"hivetrain-mean/1\n{self.group_id}\n".encode())
        missing, chunks = [], {m.hotkey: 0 for m in self.plan.members if m.sends}
        present = 0
        for part in self.parts:
            held = self.held.get(part.index)
            if part.start == part.stop:
                continue
            if held is None or not held.data or part.index in self.disputed:
                missing.append(part.index)
                digest.update(bytes(32))
                for span in self.plan.layout.spans(part.start, part.stop):
                    self._vectors[span.section.name][span.start : span.stop] = 0.0
                continue
            digest.update(held.result.sha256 + held.result.included)
            present += part.stop - part.start
            for is_in, member in zip(held.included, self.plan.members, strict=True):
                if is_in:
                    chunks[member.hotkey] += part.stop - part.start
        links = self.ledger.stats()
        return AllReduceOutcome(
            vectors=self._vectors,
            mean_sha256=digest.hexdigest(),
            complete=not missing,
            missing_parts=tuple(missing),
            included={hotkey: count / max(present, 1) for hotkey, count in chunks.items()},
            faults=self.ledger.faults(),
            links=links,
            bytes_sent=sum(link.bytes_sent for link in links),
            bytes_received=sum(link.bytes_received for link in links),
            seconds=self.now() - self._begin,
            left_out=self._left_out(),
        )

    def _left_out(self) -> dict[str, Runs]:
        """Per sender that is in somewhere, the runs of chunks whose mean lacks it; neighbouring parts are one run."""
        runs: dict[str, list[tuple[int, int]]] = {}
        present: set[str] = set()
        for part in self.parts:
            held = self.held.get(part.index)
            if held is None or part.start == part.stop:
                continue
            for is_in, member in zip(held.included, self.plan.members, strict=True):
                if is_in:
                    present.add(member.hotkey)
                elif member.sends:
                    mine = runs.setdefault(member.hotkey, [])
                    start = mine.pop()[0] if mine and mine[-1][1] == part.start else part.start
                    mine.append((start, part.stop))
        return {hotkey: tuple(found) for hotkey, found in runs.items() if hotkey in present}


def _committed_tree(plan: GroupPlan, member: Member, payload: bytes | None) -> MerkleTree | None:
    if not member.sends:
        if payload is not None:
            raise ValueError(f"{member.hotkey} has weight 0 in this plan, so it must not bring a payload")
        return None
    if payload is None:
        raise ValueError(f"{member.hotkey} has weight {member.weight:g} in this plan, so it must bring a payload")
    if len(payload) != plan.layout.size_bytes:
        raise ValueError(f"the layout has {plan.layout.size_bytes} bytes, our payload has {len(payload)}")
    tree = MerkleTree(plan.layout.chunk_digests(payload))
    if tree.root != member.root:
        root = member.root.hex() if member.root else None
        raise ValueError(f"the plan has our root as {root}, our payload's is {tree.root.hex()}")
    return tree
