"""Who averages what with whom, until when: the plan that the leader's AllReduce synapse carries.

Everyone who joins works from the same plan, and proves it: the group id, a hash over all of it, is in every
handshake. Weights come from the plan alone; what a sender says of itself has no effect.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.averaging.layout import PayloadLayout, Section, part_bounds
from hivetrain.averaging.robust import get_mean
from hivetrain.errors import Fault, PeerFault
from hivetrain.validation import first_problem
from hivetrain.verification.merkle import DIGEST_BYTES

AUDIT_BLOCKS = 2  # of every foreign part, that each member recomputes
MAX_MEMBERS = 256
MAX_WEIGHTED_SUM = 1e37  # of float32's 3.4e38: the sum of w * x cannot overflow below it
MAX_AUDIT_BLOCKS = 64
PIECE_CHUNKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member of a group.

    Attributes:
        hotkey: who it is.
        peer_id: its libp2p peer id, base58.
        maddrs: multiaddresses at which it can be reached.
        weight: receipted samples; 0 sends nothing and only receives (a validator, or a member that failed a check).
        reduces: whether it reduces a part.
        root: Merkle root over the chunk digests of its payload; None where it sends nothing.
        share: size of its part, relative to the other reducers.
    """

    hotkey: str
    peer_id: str
    maddrs: tuple[str, ...]
    weight: float
    reduces: bool
    root: bytes | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight of {self.hotkey} must be finite and >= 0, got {self.weight}")
        if self.weight > 0 and (self.root is None or len(self.root) != DIGEST_BYTES):
            raise ValueError(f"{self.hotkey} sends, so its root must be {DIGEST_BYTES} bytes, got {self.root!r}")
        if not (math.isfinite(self.share) and self.share > 0):
            raise ValueError(f"share of {self.hotkey} must be finite and > 0, got {self.share}")

    @property
    def sends(self) -> bool:
        """Whether its vector belongs into the mean."""
        return self.weight > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Chunks ``[start, stop)``, reduced by ``reducer``, or by the next in line where it fails."""

    index: int
    reducer: Member
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """One attempt at one round's all-reduce.

    Attributes:
        run_id, round, attempt: which.
        members: in the order in which their values are summed.
        layout: of everyone's payload.
        send_deadline_s: a sender that is not in by then is left out; seconds from the start.
        deadline_s: everything ends by then. Leave as much after the send deadline as before it: parts whose reducer
            failed are reduced again then.
        max_abs: a value past it is out of bound.
        stall_s: a sender that makes no progress for so long is given up, and a reducer that makes none for twice as
            long (it may be waiting for a sender itself); None: a quarter of ``send_deadline_s``.
        min_rate: bytes/s; who is slower than this, after ``stall_s``, is given up too. Whatever it is, a sender must be
            half as fast as its part needs to be in by the send deadline.
        audit_blocks: blocks of every foreign part that each member recomputes from the senders' own bytes.
        mean: how vectors are joined, a name in `robust`.

    Raises:
        ValueError: a plan that cannot work; names the field.
    """

    run_id: str
    round: int
    attempt: int
    members: tuple[Member, ...]
    layout: PayloadLayout
    send_deadline_s: float
    deadline_s: float
    max_abs: float
    stall_s: float | None = None
    min_rate: float = 0.0
    audit_blocks: int = AUDIT_BLOCKS
    mean: str = "mean"

    def __post_init__(self) -> None:
        for what, names in (
            ("hotkey", [m.hotkey for m in self.members]),
            ("peer id", [m.peer_id for m in self.members]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"a group names every {what} once, got {twice[0]} {names.count(twice[0])} times")
        if len(self.members) > MAX_MEMBERS:
            raise ValueError(f"a group has at most {MAX_MEMBERS} members, got {len(self.members)}")
        if not any(member.sends for member in self.members):
            raise ValueError("a group needs a member with weight > 0")
        if not any(member.reduces for member in self.members):
            raise ValueError("a group needs a member that reduces")
        if not 0 < self.send_deadline_s < self.deadline_s < math.inf:
            raise ValueError(f"need 0 < send_deadline_s < deadline_s, got {self.send_deadline_s} and {self.deadline_s}")
        if not 0 < self.max_abs < math.inf:
            raise ValueError(f"max_abs must be finite and > 0, got {self.max_abs}")
        # Equal weights count as 1 each (`robust`).
        largest = self.max_abs * max(sum(member.weight for member in self.members), len(self.members))
        if largest > MAX_WEIGHTED_SUM:
            raise ValueError(f"max_abs times all weights must be <= {MAX_WEIGHTED_SUM:g}, got {largest:g}")
        if self.stall_s is not None and not 0 < self.stall_s < math.inf:
            raise ValueError(f"stall_s must be finite and > 0, got {self.stall_s}")
        if not 0 <= self.min_rate < math.inf:
            raise ValueError(f"min_rate must be finite and >= 0, got {self.min_rate}")
        if not 0 <= self.audit_blocks <= MAX_AUDIT_BLOCKS:
            raise ValueError(f"audit_blocks must be in [0, {MAX_AUDIT_BLOCKS}], got {self.audit_blocks}")
        get_mean(self.mean)

    def member(self, hotkey: str) -> Member | None:
        """The member of that hotkey."""
        return next((member for member in self.members if member.hotkey == hotkey), None)

    def parts(self) -> list[Part]:
        """Every part, in order of its reducer; together they cover the payload. Some may be empty."""
        bounds = part_bounds(self.layout.num_chunks, [m.share if m.reduces else 0.0 for m in self.members])
        reducers = [(m, b) for m, b in zip(self.members, bounds, strict=True) if m.reduces]
        return [Part(index=i, reducer=m, start=b[0], stop=b[1]) for i, (m, b) in enumerate(reducers)]

    @property
    def num_ranks(self) -> int:
        """How many members can reduce a part, one after another."""
        return sum(member.reduces for member in self.members)

    def reducer(self, part: int, rank: int) -> Member:
        """Who reduces part ``part`` where ``rank`` others failed before: the reducers in order, from the part's own."""
        reducers = [member for member in self.members if member.reduces]
        return reducers[(part + rank) % len(reducers)]

    @property
    def patience_s(self) -> float:
        """``stall_s``, or what stands for it."""
        return self.send_deadline_s / 4 if self.stall_s is None else self.stall_s

    @property
    def block_chunks(self) -> int:
        """Chunks of a block: what is averaged at once, and audited at once."""
        return max(1, min(8, 256 // len(self.members)))

    @property
    def batch_chunks(self) -> int:
        """Chunks of a batch: what travels at once, 4 MiB of fp32 and less in large groups.

        Half of it costs 4% more CPU time in 100 MB among four, a quarter of it a fifth more; a reducer holds a few of
        every sender's.
        """
        return self.block_chunks * max(1, min(32, 128 // len(self.members)))

    def blocks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Chunks ``[start, stop)`` cut into blocks."""
        return [(first, min(first + self.block_chunks, stop)) for first in range(start, stop, self.block_chunks)]

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Chunks ``[start, stop)`` cut into runs of whole blocks that a processor's cache holds: 512 KiB of fp32.

        What has to be done with a batch's bytes is done piece by piece: past the cache each look at them is paid again.
        """
        size = self.block_chunks * max(1, PIECE_CHUNKS // self.block_chunks)
        return [(first, min(first + size, stop)) for first in range(start, stop, size)]

    def batches(self, part: Part) -> list[tuple[int, int]]:
        """A part cut into batches, each of whole blocks."""
        size = self.batch_chunks
        return [(first, min(first + size, part.stop)) for first in range(part.start, part.stop, size)]

    def is_block(self, part: Part, start: int, stop: int) -> bool:
        """Whether chunks ``[start, stop)`` are a block of ``part``, which has any size in a stranger's plan."""
        aligned = part.start <= start < part.stop and (start - part.start) % self.block_chunks == 0
        return aligned and stop == min(start + self.block_chunks, part.stop)

    def block_index(self, part: Part, chunk: int) -> int:
        """Which block of ``part`` holds ``chunk``, counted from 0."""
        return (chunk - part.start) // self.block_chunks

    def ends_batch(self, part: Part, stop: int) -> bool:
        """Whether a batch of ``part`` ends at chunk ``stop``."""
        aligned = stop == part.stop or (stop - part.start) % self.batch_chunks == 0
        return aligned and part.start < stop <= part.stop

    def group_id(self) -> str:
        """Hex sha256 over everything that the plan says."""
        packed: bytes = msgpack.packb(plan_to_dict(self))
        return hashlib.sha256(b"hivetrain-group/1\n" + packed).hexdigest()


def plan_to_dict(plan: GroupPlan) -> dict[str, object]:
    """A plain dict that msgpack can carry, in one fixed order."""
    return {
        "run_id": plan.run_id,
        "round": plan.round,
        "attempt": plan.attempt,
        "members": [
            {
                "hotkey": member.hotkey,
                "peer_id": member.peer_id,
                "maddrs": list(member.maddrs),
                "weight": float(member.weight),
                "reduces": member.reduces,
                "root": member.root,
                "share": float(member.share),
            }
            for member in plan.members
        ],
        "sections": [
            {"name": section.name, "num_elements": section.num_elements, "codec": section.codec}
            for section in plan.layout.sections
        ],
        "send_deadline_s": float(plan.send_deadline_s),
        "deadline_s": float(plan.deadline_s),
        "max_abs": float(plan.max_abs),
        "stall_s": None if plan.stall_s is None else float(plan.stall_s),
        "min_rate": float(plan.min_rate),
        "audit_blocks": plan.audit_blocks,
        "mean": plan.mean,
    }


class _Bounded(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _MemberModel(_Bounded):
    hotkey: Annotated[str, Field(min_length=1, max_length=64)]
    peer_id: Annotated[str, Field(min_length=1, max_length=128)]
    maddrs: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
    weight: float
    reduces: bool
    root: Annotated[bytes, Field(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)] | None
    share: float


class _SectionModel(_Bounded):
    name: Annotated[str, Field(min_length=1, max_length=32)]
    num_elements: Annotated[int, Field(ge=1, le=1 << 40)]
    codec: Annotated[str, Field(min_length=1, max_length=32)]


class _PlanModel(_Bounded):
    run_id: Annotated[str, Field(min_length=1, max_length=64)]
    round: Annotated[int, Field(ge=0, lt=1 << 53)]
    attempt: Annotated[int, Field(ge=0, lt=1 << 16)]
    members: Annotated[list[_MemberModel], Field(max_length=MAX_MEMBERS)]
    sections: Annotated[list[_SectionModel], Field(max_length=16)]
    send_deadline_s: Annotated[float, Field(gt=0, le=86_400)]
    deadline_s: Annotated[float, Field(gt=0, le=86_400)]
    max_abs: float
    stall_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    min_rate: Annotated[float, Field(ge=0, lt=1e12)] = 0.0
    audit_blocks: Annotated[int, Field(ge=0, le=MAX_AUDIT_BLOCKS)] = 2
    mean: Annotated[str, Field(min_length=1, max_length=32)] = "mean"


def plan_from_dict(raw: object) -> GroupPlan:
    """Parse `plan_to_dict`'s dict from a stranger.

    Raises:
        PeerFault: MALFORMED, with the first thing that is wrong.
    """
    try:
        model = _PlanModel.model_validate(raw)
        return GroupPlan(
            run_id=model.run_id,
            round=model.round,
            attempt=model.attempt,
            members=tuple(
                Member(**{**member.model_dump(), "maddrs": tuple(member.maddrs)}) for member in model.members
            ),
            layout=PayloadLayout([Section(**section.model_dump()) for section in model.sections]),
            send_deadline_s=model.send_deadline_s,
            deadline_s=model.deadline_s,
            max_abs=model.max_abs,
            stall_s=model.stall_s,
            min_rate=model.min_rate,
            audit_blocks=model.audit_blocks,
            mean=model.mean,
        )
    except ValidationError as exc:
        first = first_problem(exc)
        raise PeerFault(Fault.MALFORMED, f"not a group plan: {first.where}: {first.message}") from exc
    except ValueError as exc:
        raise PeerFault(Fault.MALFORMED, f"not a group plan: {exc}") from exc
