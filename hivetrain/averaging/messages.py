"""Every message of the all-reduce: small msgpack maps, each a frame of its own, with raw bytes in frames after it.

One stream carries one conversation between its opener and its acceptor (docs/protocol.md, "All-reduce"):

    Hello, HelloReply, HelloConfirm                     both prove their hotkeys
    then   Contribution, (Block, bytes)*                opener: its vector for the acceptor's part
           Result, bytes*      or Refusal               acceptor: the mean of that part
           Confirm, Confirm                             both: every signed result that they hold
    or     Fetch, FetchReply, [Result, bytes*] ...      opener: asks for any part, from whoever holds it

A block is a run of up to `BLOCK_CHUNKS` chunks with the Merkle proof that they are the ones committed, so a part
can be checked, and refused, as it arrives. A result is signed by the part's reducer, so a copy is worth as much as the
original, and two different ones are a proof of a lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, TypeVar, overload

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.averaging.group import MAX_MEMBERS
from hivetrain.averaging.transport import Stream
from hivetrain.errors import Fault, PeerFault

BLOCK_CHUNKS = 64  # 1 MiB of fp32
RESULT_FRAME_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 10
MAX_CONFIRM_BYTES = 512 << 10

Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(max_length=128)]
Hotkey = Annotated[str, Field(min_length=1, max_length=64)]
GroupId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Index = Annotated[int, Field(ge=0, lt=1 << 40)]


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
    """Opener: my vector for your part follows; 0 chunks where I send none and only receive."""

    kind: Literal["contribution"] = "contribution"
    part: Index
    num_chunks: Index


class Block(Message):
    """Opener: chunks ``[start, stop)`` follow in one frame; ``proof`` leads to my committed root."""

    kind: Literal["block"] = "block"
    start: Index
    stop: Index
    proof: Annotated[list[Digest], Field(max_length=96)]


class Result(Message):
    """The mean of a part, signed by its reducer. Its bytes follow, except inside a `Confirm`."""

    kind: Literal["result"] = "result"
    part: Index
    included: Annotated[bytes, Field(max_length=MAX_MEMBERS // 8)]  # bit i % 8 of byte i // 8: member i is in the mean
    size_bytes: Index
    sha256: Digest
    signature: Signature


class Refusal(Message):
    """Acceptor: your vector is not in the mean, and why. The mean can still be fetched."""

    kind: Literal["refusal"] = "refusal"
    fault: Annotated[str, Field(max_length=32)]
    detail: Annotated[str, Field(max_length=500)]


class Confirm(Message):
    """Every signed result that I hold; of a part with two different ones, both."""

    kind: Literal["confirm"] = "confirm"
    results: Annotated[list[Result], Field(max_length=2 * MAX_MEMBERS)]


class Fetch(Message):
    """Opener: do you hold this part's mean? With ``take``: then send it."""

    kind: Literal["fetch"] = "fetch"
    part: Index
    take: bool


class FetchReply(Message):
    """Acceptor: "have" (a `Result` and its bytes follow if asked for), "pending" (I still expect it), or "none"."""

    kind: Literal["fetch_reply"] = "fetch_reply"
    status: Literal["have", "pending", "none"]


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)


@overload
def parse(frame: bytes, kind: type[M], /) -> M: ...
@overload
def parse(frame: bytes, kind: type[M], other: type[N], /) -> M | N: ...
def parse(frame: bytes, *kinds: type[Message]) -> Message:
    """The message in ``frame``, which must be one of ``kinds``.

    Raises:
        PeerFault: MALFORMED.
    """
    return _parse(frame, kinds)


def _parse(frame: bytes, kinds: Sequence[type[Message]]) -> Message:
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
                first = exc.errors(include_url=False)[0]
                raise PeerFault(Fault.MALFORMED, f"{kind_name}: {first['loc']}: {first['msg']}") from exc
    raise PeerFault(Fault.MALFORMED, f"expected {names}, got {str(kind_name)[:32]!r}")


@overload
async def receive(stream: Stream, kind: type[M], /, *, max_bytes: int = ...) -> M: ...
@overload
async def receive(stream: Stream, kind: type[M], other: type[N], /, *, max_bytes: int = ...) -> M | N: ...
async def receive(stream: Stream, *kinds: type[Message], max_bytes: int = MAX_HEADER_BYTES) -> Message:
    """The next frame of ``stream``, parsed: one of ``kinds``.

    Raises:
        LinkLost: the stream ended.
        PeerFault: OVERSIZED or MALFORMED.
    """
    return _parse(await stream.receive(max_bytes), kinds)


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The blocks of chunks ``[start, stop)``, as they travel."""
    for first in range(start, stop, BLOCK_CHUNKS):
        yield first, min(first + BLOCK_CHUNKS, stop)


def pack_mask(included: Sequence[bool]) -> bytes:
    """One bit per member, lowest first."""
    packed = bytearray(-(-len(included) // 8))
    for index, value in enumerate(included):
        packed[index // 8] |= value << (index % 8)
    return bytes(packed)


def unpack_mask(packed: bytes, num_members: int) -> tuple[bool, ...]:
    """One bool per member.

    Raises:
        PeerFault: MALFORMED: not that many bits, or a bit past the last member.
    """
    included = tuple(bool(packed[i // 8] >> (i % 8) & 1) for i in range(min(num_members, 8 * len(packed))))
    if pack_mask(included) != packed or len(included) != num_members:
        raise PeerFault(Fault.MALFORMED, f"expected a mask of {num_members} members, got {packed.hex()}")
    return included


def result_message(group_id: str, part: int, sha256: bytes, included: bytes, size_bytes: int) -> bytes:
    """What a reducer signs to stand for its mean."""
    packed: bytes = msgpack.packb(["hivetrain-result/1", group_id, part, sha256, included, size_bytes])
    return packed
