"""Parsers of raw bytes: the mutations are the fuzzer's own."""

from __future__ import annotations

import asyncio
import socket
from functools import lru_cache
from itertools import pairwise
from typing import Any

from bench.fuzzing.choices import Choices, flipped
from bench.fuzzing.guard import declared, require
from bench.fuzzing.samples import EXPECTED, MINERS, ROUND, SCORING, VALIDATOR, examine, honest_record, layout
from hivetrain.averaging import messages, upgrade
from hivetrain.averaging.framing import Clear, FrameStream
from hivetrain.averaging.group import plan_from_dict, plan_to_dict
from hivetrain.averaging.results import unpack_mask
from hivetrain.averaging.sealing import Sealer
from hivetrain.averaging.transport import LinkLost
from hivetrain.errors import Fault, IntegrityError, PeerFault
from hivetrain.manifest import parse_manifest
from hivetrain.scoring.record import parse_record
from hivetrain.verification.receipt import MAX_RECEIPT_BYTES, check_receipt, parse_receipt
from template import protocol
from template.handlers import parse_plan

SYNAPSES: tuple[type[protocol.Message], ...] = (
    protocol.TrainReply,
    protocol.Train,
    protocol.AllReduceReply,
    protocol.AllReduce,
    protocol.IsAliveReply,
    protocol.IsAlive,
)
MAX_REPLY_BYTES = 4 << 20
FRAMES: tuple[type[messages.Message], ...] = (
    messages.Result,
    messages.Confirm,
    messages.Batch,
    messages.MeanBatch,
    messages.Contribution,
    messages.Hello,
    messages.HelloReply,
    messages.HelloConfirm,
    messages.Refusal,
    messages.Fetch,
    messages.FetchReply,
    messages.Open,
    messages.Proof,
    messages.ProofReply,
    upgrade.Hello,
    upgrade.Offer,
    upgrade.DialBack,
    upgrade.Dialled,
    upgrade.Choice,
)
STREAM_MAX_BYTES = 4096


def _accept(*_: object) -> bool:
    """Every signature holds: what lies behind the signature is to be reached."""
    return True


def receipt(data: bytes) -> None:
    """`parse_receipt` and `check_receipt`."""
    try:
        found = parse_receipt(data, hotkey=MINERS[0].hotkey, verify=_accept)
    except PeerFault as exc:
        declared(exc, {Fault.OVERSIZED, Fault.MALFORMED, Fault.BAD_SIGNATURE})
        return
    again = found.to_bytes()
    if len(again) <= MAX_RECEIPT_BYTES:
        require(parse_receipt(again, hotkey=found.hotkey, verify=_accept) == found, "a receipt changes on the wire")
    require(len(found.root()) == len(found.sha256()) == 64, "a digest of another size")
    try:
        check_receipt(found, EXPECTED)
    except PeerFault as exc:
        declared(exc, {Fault.WRONG_SCHEMA, Fault.MALFORMED})


def synapse(data: bytes) -> None:
    """Every request and reply of the wire; the first byte says which."""
    kind = SYNAPSES[data[0] % len(SYNAPSES)] if data else SYNAPSES[0]
    try:
        found = kind.from_bytes(data[1:], MAX_REPLY_BYTES)
    except PeerFault as exc:
        declared(exc, {Fault.OVERSIZED, Fault.NOT_FINITE, Fault.MALFORMED})
        return
    require(kind.from_bytes(found.to_bytes(), MAX_REPLY_BYTES) == found, f"{kind.__name__} changes on the wire")
    if isinstance(found, protocol.AllReduce):
        plan(found.plan)


def plan(data: bytes) -> None:
    """A group plan, and what every member works out from it before it compares the layout with its own."""
    try:
        found = parse_plan(data)
    except PeerFault as exc:
        declared(exc, {Fault.MALFORMED})
        return
    require(plan_from_dict(plan_to_dict(found)).group_id() == found.group_id(), "a plan changes on the wire")
    parts = found.parts()
    require((parts[0].start, parts[-1].stop) == (0, found.layout.num_chunks), "parts do not cover the payload")
    require(all(one.stop == two.start for one, two in pairwise(parts)), "parts overlap")


def message(data: bytes) -> None:
    """Every message of the all-reduce; the first byte says which."""
    kind = FRAMES[data[0] % len(FRAMES)] if data else FRAMES[0]
    try:
        found: Any = messages.parse(data[1:], kind)
    except PeerFault as exc:
        declared(exc, {Fault.MALFORMED})
        return
    require(messages.parse(found.to_bytes(), kind) == found, f"{kind.__name__} changes on the wire")
    if isinstance(found, messages.MeanBatch):
        try:
            unpack_mask(found.included, 3)
        except PeerFault as exc:
            declared(exc, {Fault.MALFORMED})


def stream(data: bytes) -> None:
    """A connection's bytes: clear, or sealed frames that somebody on the way altered."""
    asyncio.run(_stream(data))


async def _stream(data: bytes) -> None:
    choices = Choices(data)
    sealed, frames, raw = choices.flag(), [], b""
    if sealed:
        sealer = Sealer(bytes(32))
        for _ in range(1 + choices.below(3)):
            frames.append(choices.take(choices.below(STREAM_MAX_BYTES)) or b"\0")
            header = len(frames[-1]).to_bytes(4, "big")
            record = bytearray(len(frames[-1]) + sealer.overhead)
            sealer.wrap(frames[-1], header, memoryview(record))
            raw += header + record
        raw = flipped(raw, choices)
    else:
        raw = choices.rest()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.close()
    incoming = Sealer(bytes(32)) if sealed else Clear()
    found = FrameStream("peer", ours, Clear(), incoming, early=raw)
    received: list[bytes] = []
    try:
        while True:
            received.append(await found.receive(STREAM_MAX_BYTES))
    except LinkLost:
        pass
    except PeerFault as exc:
        declared(exc, {Fault.OVERSIZED})
    finally:
        found.end()
    require(sum(map(len, received)) <= len(raw), "more bytes came out than went in")
    require(not sealed or received == frames[: len(received)], "bytes that nobody sealed came out of a sealed stream")


def record(data: bytes) -> None:
    """A validator's published checks."""
    try:
        found = parse_record(data, validator=VALIDATOR.hotkey, round_number=ROUND, verify=_accept)
    except IntegrityError:
        return
    examine(found)


def manifest(data: bytes) -> None:
    """An epoch's manifest."""
    try:
        found = parse_manifest(data)
    except IntegrityError:
        return
    require(parse_manifest(found.to_bytes()) == found, "a manifest changes on the wire")
    found.signed_bytes()


@lru_cache(maxsize=1)
def prepare() -> None:
    """Make the honest samples, so that no input is charged for them."""
    honest_record()
    layout()
    _ = SCORING


__all__ = ["FRAMES", "SYNAPSES", "manifest", "message", "plan", "prepare", "receipt", "record", "stream", "synapse"]
