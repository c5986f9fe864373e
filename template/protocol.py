"""The synapses: what neurons ask each other, and what they answer.

A synapse is a request; its reply is a model of its own, so that nothing a caller sends can come back as if the
peer had said it. Both travel as msgpack, bytes as bin: no base64, no pickle. Every field is bounded, unknown
fields are refused, and no float is ever NaN or infinite. Tensors go through the all-reduce, never through here.

Field order is the wire order: `tests/golden/test_wire_vectors.py` pins the bytes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hivetrain.errors import Fault, PeerFault
from hivetrain.manifest import Hotkey, Sha256
from hivetrain.validation import first_problem
from hivetrain.verification.receipt import MAX_RECEIPT_BYTES, MAX_SNAPSHOT_BYTES
from hivetrain.verification.remainder import num_chunks
from hivetrain.verification.steps import MAX_STEPS_BYTES

MAX_SEQUENCE = 4096
"""Entries of any array or map on the wire: a cheap bound that msgpack enforces before pydantic sees a value."""

_KIB, _MIB = 1 << 10, 1 << 20

Count = Annotated[int, Field(ge=0, le=2**53)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Detail = Annotated[str, Field(max_length=500)]


class Message(BaseModel):
    """Anything that crosses the wire. Immutable, strict about types, and deaf to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Encode as one msgpack map, fields in the order of their definition.

        Raises:
            ValueError: a field is out of its bounds, which `model_copy` does not look at.
        """
        fields = self.model_dump(mode="python")
        type(self).model_validate(fields)
        return cast(bytes, msgpack.packb(fields, use_bin_type=True))

    @classmethod
    def from_bytes(cls, raw: bytes, max_bytes: int) -> Self:
        """Decode what a stranger sent.

        Args:
            raw: the message, at most ``max_bytes`` long.
            max_bytes: the largest message that the caller accepts.

        Raises:
            PeerFault: OVERSIZED, NOT_FINITE or MALFORMED, with a detail of at most 300 characters.
        """
        if len(raw) > max_bytes:
            raise PeerFault(Fault.OVERSIZED, f"{cls.__name__} is {len(raw)} bytes, the limit is {max_bytes}")
        try:
            fields = _unpack(raw)
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            raise PeerFault(Fault.MALFORMED, f"{cls.__name__} is not msgpack: {str(exc)[:200]!r}") from exc
        try:
            return cls.model_validate(fields)
        except ValidationError as exc:
            raise _as_fault(cls.__name__, exc) from exc


def _unpack(raw: bytes) -> Any:
    return msgpack.unpackb(
        raw,
        raw=False,
        use_list=False,  # tuples, because strict pydantic refuses a list where a tuple is declared
        strict_map_key=True,
        max_array_len=MAX_SEQUENCE,
        max_map_len=MAX_SEQUENCE,
        ext_hook=_refuse_extension,
    )


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} of {len(data)} bytes")


def _as_fault(name: str, exc: ValidationError) -> PeerFault:
    """Name the first field that is wrong, without echoing what the peer wrote there."""
    first = first_problem(exc)
    fault = Fault.NOT_FINITE if first.kind == "finite_number" else Fault.MALFORMED
    return PeerFault(fault, f"{name}: {exc.error_count()} bad fields, first {first.where!r}: {first.message}")


R_co = TypeVar("R_co", bound=Message, covariant=True)


class Synapse(Message, Generic[R_co]):
    """A request. ``R_co`` is the type of its reply."""

    route: ClassVar[str]
    """Its path: a request travels as ``POST <route>``."""
    reply_type: ClassVar[type[Message]]
    max_request_bytes: ClassVar[int]
    """Larger requests are refused before their body is read."""
    max_reply_bytes: ClassVar[int]
    """What a caller accepts when it names no limit of its own."""

    @classmethod
    def parse_reply(cls, raw: bytes, max_bytes: int) -> R_co:
        """Decode a reply to this synapse.

        Raises:
            PeerFault: as in `Message.from_bytes`.
        """
        return cast(R_co, cls.reply_type.from_bytes(raw, max_bytes))


class IsAliveReply(Message):
    """Who is there, and where in the run it stands."""

    version: Annotated[int, Field(ge=0, le=2**31)]
    role: Word
    run_id: Sha256
    epoch: Annotated[int, Field(ge=-1, le=2**53)]  # -1: no state loaded yet
    round: Annotated[int, Field(ge=-1, le=2**53)]  # -1: before the first round
    state: Word


class IsAlive(Synapse[IsAliveReply]):
    """Ask any neuron whether it is up. Any registered hotkey may."""

    route = "/IsAlive"
    reply_type = IsAliveReply
    max_request_bytes = 1 * _KIB
    max_reply_bytes = 4 * _KIB


class Opening(Message):
    """Committed bytes, shown: one snapshot and the Merkle path from its leaf to the receipt's root."""

    index: Count
    step: Count
    payload: Annotated[bytes, Field(max_length=MAX_SNAPSHOT_BYTES)]
    proof: Annotated[tuple[Annotated[bytes, Field(max_length=64)], ...], Field(max_length=64)] = ()


MAX_PARAMS = MAX_SNAPSHOT_BYTES // 12  # a snapshot holds three float32 vectors


class RemainderOpening(Message):
    """The remainder that a receipt commits to, and what shows that it follows from the base (`RemainderBytes`)."""

    values: Annotated[bytes, Field(max_length=4 * MAX_PARAMS)]
    previous: Annotated[bytes, Field(max_length=MAX_RECEIPT_BYTES)]
    others: Annotated[bytes, Field(max_length=32 * num_chunks(MAX_PARAMS))] = b""


class TrainReply(Message):
    """How far a miner is, what it committed, and what it opens.

    ``loss`` is in nats per token. ``receipt`` is the signed receipt's own encoding; its signature is checked by
    `hivetrain.verification`, not here.
    """

    run_id: Sha256
    round: Count
    status: Word  # training, committed, idle, not_in_round, ...
    epoch: Annotated[int, Field(ge=-1, le=2**53)]
    step: Count
    num_steps: Count
    loss: float | None = None
    tokens_per_second: Amount | None = None
    receipt: Annotated[bytes, Field(max_length=64 * _KIB)] | None = None
    openings: Annotated[tuple[Opening, ...], Field(max_length=64)] = ()
    detail: Detail = ""
    remainder: RemainderOpening | None = None  # with the opening of the last snapshot, where one was used
    steps: Annotated[bytes, Field(max_length=MAX_STEPS_BYTES)] = b""  # every step record, with any opening


class Train(Synapse[TrainReply]):
    """Ask a miner for its progress, its receipt, or openings of what the receipt commits to.

    ``snapshots`` are the indexes to open, each at most once; ``coins`` are the challenge coins that the validator
    committed to before and reveals now.
    """

    route = "/Train"
    reply_type = TrainReply
    max_request_bytes = 4 * _KIB
    max_reply_bytes = 128 * _KIB  # a report or a receipt; whoever asks for openings names the limit

    run_id: Sha256
    round: Count
    want: Literal["report", "receipt", "open"] = "report"
    snapshots: Annotated[tuple[Count, ...], Field(max_length=64)] = ()
    coins: Annotated[bytes, Field(max_length=64)] = b""

    @field_validator("snapshots")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        # A repeated index would make a request of 100 bytes cost the miner 64 times the largest payload.
        if len(set(value)) != len(value):
            raise ValueError("an index is asked for twice")
        return value


class MemberFault(Message):
    """What one member saw another do wrong in the all-reduce."""

    hotkey: Hotkey
    fault: Word
    detail: Detail = ""


class Link(Message):
    """What one member measured of another's line. A time of 0 with 0 bytes: nothing came."""

    hotkey: Hotkey
    bytes_received: Count
    seconds: Amount
    first_byte_s: Amount


class AllReduceReply(Message):
    """What the all-reduce gave on this member.

    ``state_signature`` is hex, over `hivetrain.manifest.state_message`; ``included`` maps each sender to the share
    of chunks whose mean it is in.
    """

    run_id: Sha256
    round: Count
    attempt: Count
    accepted: bool
    completed: bool
    state_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    state_signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,128}$")] = ""
    included: Annotated[dict[Hotkey, Amount], Field(max_length=1024)] = {}
    faults: Annotated[tuple[MemberFault, ...], Field(max_length=1024)] = ()
    bytes_sent: Count = 0
    bytes_received: Count = 0
    seconds: Amount = 0.0
    links: Annotated[tuple[Link, ...], Field(max_length=1024)] = ()
    detail: Detail = ""


class AllReduce(Synapse[AllReduceReply]):
    """Ask a member to join the averaging group that ``plan`` (msgpack) describes, or to sign what it holds already.

    ``want="state"``: no exchange; the member signs ``state_hash`` for ``attempt``, if it holds that state after an
    earlier attempt at this round. ``plan`` is empty then.
    """

    route = "/AllReduce"
    reply_type = AllReduceReply
    max_request_bytes = 1 * _MIB + 4 * _KIB
    max_reply_bytes = 2 * _MIB

    run_id: Sha256
    round: Count
    attempt: Count
    plan: Annotated[bytes, Field(max_length=_MIB)]
    base_manifest: Sha256
    want: Literal["mean", "state"] = "mean"
    state_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


__all__ = [
    "AllReduce",
    "AllReduceReply",
    "IsAlive",
    "IsAliveReply",
    "Link",
    "MemberFault",
    "Message",
    "Opening",
    "RemainderOpening",
    "Synapse",
    "Train",
    "TrainReply",
]
