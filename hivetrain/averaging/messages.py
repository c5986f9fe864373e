"""Every message of the all-reduce: small msgpack maps, each a frame of its own, with raw bytes in frames after it.

One stream carries one conversation between its opener and its acceptor (docs/protocol.md, "All-reduce"):

    Hello, HelloReply, HelloConfirm                     both prove their hotkeys
    then   Contribution, (Batch, bytes)*                opener: its vector for a part that the acceptor reduces
           (MeanBatch, bytes)*, Result   or Refusal     acceptor, at the same time: the mean of that part
    or any of these requests, one after another:
           Fetch, FetchReply [, (MeanBatch, bytes)*, Result]    do you hold this part's mean? then send it
           Open, (Batch, bytes)*  or Refusal            show me these chunks of your own vector
           Proof, ProofReply [, bytes]                  a reducer lied; here is the evidence
           Confirm, Confirm                             the results that each side holds

A batch of vector chunks comes with the Merkle proof that they are the ones committed, so a part can be checked, and
refused, as it arrives. A result is signed by the reducer, so a copy is worth as much as the original, and two
different ones are a proof of a lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar, overload

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import MAX_MEMBERS
from hivetrain.averaging.transport import Stream
from hivetrain.errors import Fault, PeerFault
from hivetrain.validation import first_problem

MAX_HEADER_BYTES = 16 << 10
MAX_CONFIRM_BYTES = 1 << 20
MAX_OPEN_RANGES = 64

Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(max_length=128)]
Hotkey = Annotated[str, Field(min_length=1, max_length=64)]
GroupId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Index = Annotated[int, Field(ge=0, lt=1 << 40)]
Rank = Annotated[int, Field(ge=0, le=MAX_MEMBERS)]
Mask = Annotated[bytes, Field(max_length=MAX_MEMBERS // 8)]


class Message(BaseModel):
    """A frame that must parse exactly."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_bytes(self) -> bytes:
        """The frame."""
        packed: bytes = msgpack.packb(self.model_dump())
        return packed


class Hello(Message):
    """Opener: which group, who I am, and a nonce that I never used."""

    kind: Literal["hello/1"] = "hello/1"
    group_id: GroupId
    hotkey: Hotkey
    nonce: Digest


class HelloReply(Message):
    """Acceptor: who I am, my nonce, and my signature over both sides."""

    kind: Literal["hello_reply"] = "hello_reply"
    hotkey: Hotkey
    nonce: Digest
    signature: Signature


class HelloConfirm(Message):
    """Opener: my signature over both sides."""

    kind: Literal["hello_confirm"] = "hello_confirm"
    signature: Signature


class Contribution(Message):
    """Opener: my vector for a part follows, from batch ``first`` on; so many means of it I have already.

    Attributes:
        rank: how many reducers of this part I gave up before you.
        num_chunks: of the whole part; 0 where I send nothing and only receive.
    """

    kind: Literal["contribution"] = "contribution"
    part: Index
    rank: Rank
    first: Index
    num_chunks: Index


class Batch(Message):
    """Chunks ``[start, stop)`` of my payload follow in one frame; ``proof`` leads to my committed root."""

    kind: Literal["batch"] = "batch"
    start: Index
    stop: Index
    proof: Annotated[list[Digest], Field(max_length=224)]


class MeanBatch(Message):
    """Acceptor: the next batch of the mean follows in one frame. Bit i % 8 of byte i // 8: member i is in it."""

    kind: Literal["mean_batch"] = "mean_batch"
    rank: Rank
    included: Mask


class MaskRun(BaseModel):
    """Up to chunk ``stop``, these members are in the mean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stop: Index
    included: Mask


class Result(Message):
    """The mean of a part, signed by the reducer of that rank.

    Attributes:
        masks: who is in which chunks, in order.
        root: Merkle root whose leaves are the mean's encoded blocks.
        signature: over `results.result_message`.
    """

    kind: Literal["result"] = "result"
    part: Index
    rank: Rank
    masks: Annotated[list[MaskRun], Field(min_length=1, max_length=MAX_MEMBERS + 1)]
    root: Digest
    signature: Signature


class Refusal(Message):
    """Acceptor: no, and why. A mean can still be had from somebody else."""

    kind: Literal["refusal"] = "refusal"
    fault: Annotated[str, Field(max_length=32)]
    detail: Annotated[str, Field(max_length=500)]


class Fetch(Message):
    """Opener: do you hold this part's mean? With ``take``: then send it.

    ``rank`` is how many reducers I have given up: below it, nobody's result is expected here any more.
    """

    kind: Literal["fetch"] = "fetch"
    part: Index
    rank: Rank
    take: bool


class FetchReply(Message):
    """Acceptor: "have" the result of ``rank``, "pending" (I may still get one below the rank you name), or "none"."""

    kind: Literal["fetch_reply"] = "fetch_reply"
    status: Literal["have", "pending", "none"]
    rank: Rank


class Open(Message):
    """Opener: show me these chunks of your own vector. A `Batch` and its bytes follow for each ``[start, stop)``."""

    kind: Literal["open"] = "open"
    starts: Annotated[list[Index], Field(min_length=1, max_length=MAX_OPEN_RANGES)]
    stops: Annotated[list[Index], Field(min_length=1, max_length=MAX_OPEN_RANGES)]


class Proof(Message):
    """Opener: I have evidence against the result of this part and rank."""

    kind: Literal["proof"] = "proof"
    part: Index
    rank: Rank


class ProofReply(Message):
    """Acceptor: send it, or I have one myself."""

    kind: Literal["proof_reply"] = "proof_reply"
    wanted: bool


class Confirm(Message):
    """The results that I hold. ``done``: I am waiting for nothing more. ``version``: grows with what I say."""

    kind: Literal["confirm"] = "confirm"
    version: Index
    results: Annotated[list[Result], Field(max_length=MAX_MEMBERS)]
    done: bool


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)


@overload
def parse(frame: Bytes, kind: type[M], /) -> M: ...
@overload
def parse(frame: Bytes, kind: type[M], other: type[N], /) -> M | N: ...
@overload
def parse(frame: Bytes, kind: type[M], other: type[N], /, *more: type[Message]) -> Message: ...
def parse(frame: Bytes, *kinds: type[Message]) -> Message:
    """The message in ``frame``, which must be one of ``kinds``.

    Raises:
        PeerFault: MALFORMED.
    """
    return _parse(frame, kinds)


def _parse(frame: Bytes, kinds: Sequence[type[Message]]) -> Message:
    names = " or ".join(kind.__name__ for kind in kinds)
    try:
        raw = msgpack.unpackb(frame, max_map_len=16, max_array_len=2 * MAX_MEMBERS, max_ext_len=0)
    except Exception as exc:  # msgpack documents no common base for what a hostile frame can raise
        raise PeerFault(Fault.MALFORMED, f"expected {names}, got bytes that are not msgpack: {exc}") from exc
    kind_name = raw.get("kind") if isinstance(raw, dict) else None
    for kind in kinds:
        if kind.model_fields["kind"].default == kind_name:
            try:
                return kind.model_validate(raw)
            except ValidationError as exc:
                first = first_problem(exc)
                raise PeerFault(Fault.MALFORMED, f"{kind_name}: {first.where}: {first.message}") from exc
    raise PeerFault(Fault.MALFORMED, f"expected {names}, got {str(kind_name)[:32]!r}")


@overload
async def receive(stream: Stream, kind: type[M], /, *, max_bytes: int = ...) -> M: ...
@overload
async def receive(stream: Stream, kind: type[M], other: type[N], /, *, max_bytes: int = ...) -> M | N: ...
@overload
async def receive(
    stream: Stream, kind: type[M], other: type[N], /, *more: type[Message], max_bytes: int = ...
) -> Message: ...
async def receive(stream: Stream, *kinds: type[Message], max_bytes: int = MAX_HEADER_BYTES) -> Message:
    """The next frame of ``stream``, parsed: one of ``kinds``.

    Raises:
        LinkLost: the stream ended.
        PeerFault: OVERSIZED or MALFORMED.
    """
    return _parse(await stream.receive(max_bytes), kinds)
