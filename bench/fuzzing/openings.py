"""What a miner opens of its receipt: snapshots, step records, the remainder, chunks with their proofs."""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import numpy as np

from bench.fuzzing.choices import FLOATS, Choices, flipped
from bench.fuzzing.guard import declared, require
from bench.fuzzing.samples import CHEAT, ROUND, chunk_bytes, honest_group, honest_receipt
from hivetrain.averaging.messages import Batch
from hivetrain.averaging.reducing import decode_committed
from hivetrain.errors import Fault, PeerFault
from hivetrain.manifest import Manifest
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import MerkleTree, leaf_digest, verify_range
from hivetrain.verification.receipt import (
    Receipt,
    check_opening,
    decode_snapshot,
    snapshot_size_bytes,
    step_record,
)
from hivetrain.verification.remainder import RemainderBytes, check_remainder, chunk_leaves, root_of
from hivetrain.verification.sketch import NUM_BUCKETS, from_hex, sketch_distance, to_hex
from hivetrain.verification.steps import check_samples, first_wrong_step, open_steps, opens, record_size_bytes
from tests.hub_fixture import make_manifest

NUM_PARAMS = 2 * CHUNK_ELEMENTS + 10
SAMPLES = 2
MAX_STEPS = 40


def samples(step: int) -> list[tuple[int, int]]:
    """What the assignment gives a step."""
    return [(0, step), (1, step)]


def steps(data: bytes) -> None:
    """Step records: as the bytes are, or honest ones that are altered; committed to by their liar, or not."""
    choices = Choices(data)
    count = 1 + choices.below(MAX_STEPS)
    raw = b"".join(step_record(step, samples(step), 4.5) for step in range(count))
    size = record_size_bytes(SAMPLES)
    committed = choices.flag()
    if choices.flag():  # some records say something else
        for _ in range(choices.below(4)):
            at = choices.below(count)
            record = choices.take(size).ljust(size, b"\0") if choices.flag() else _record(choices, at)
            raw = raw[: at * size] + record + raw[(at + 1) * size :]
    shown = raw if committed else flipped(raw, choices)
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    root = MerkleTree([leaf_digest(piece) for piece in pieces]).root.hex()
    receipt = honest_receipt().model_copy(update={"num_steps": count, "steps_root": root, "loss": 4.5})
    try:
        records = open_steps(receipt, shown, SAMPLES)
        check_samples(records, samples)
    except PeerFault as exc:
        lies = {Fault.NOT_FINITE, Fault.WRONG_REPLAY}
        declared(exc, {Fault.REFUSED, Fault.NOT_COMMITTED} | (lies if shown == raw else set()))
        require(opens(receipt, shown, SAMPLES) == (shown == raw), "what opens is not what was committed to")
        return
    require(shown == raw, "records that nobody committed to are taken")
    require(all(math.isfinite(one.loss) for one in records), "a loss that is no number is taken")
    first_wrong_step(records, choices.below(count), [choices.pick(FLOATS)], 1e-3)


def _record(choices: Choices, at: int) -> bytes:
    flat = [choices.below(1 << 32) for _ in range(2 * SAMPLES)]
    with np.errstate(over="ignore"):
        loss = np.float32(choices.pick(FLOATS))
    return struct.pack(f"<Qf{len(flat)}I", at, loss, *flat)


def snapshot(data: bytes) -> None:
    """A snapshot, its opening, and a receipt's sketch."""
    choices = Choices(data)
    payload = bytes(snapshot_size_bytes(4))
    index, count = choices.below(5), 1 + choices.below(70)
    shown = flipped(payload, choices)
    tree = MerkleTree([leaf_digest(payload + bytes([i])) if i != index else leaf_digest(payload) for i in range(count)])
    proof = tree.range_proof(index, index + 1) if index < count else []
    altered_proof = [flipped(node, choices) for node in proof][choices.below(2) :]
    named = choices.below(80) if choices.flag() else index
    receipt = honest_receipt().model_copy(update={"snapshots_root": tree.root.hex(), "num_snapshots": count})
    is_honest = (shown, altered_proof, named) == (payload, proof, index) and index < count
    try:
        check_opening(receipt, named, shown, altered_proof)
        require(is_honest, "a snapshot that nobody committed to opens the root")
    except PeerFault as exc:
        declared(exc, {Fault.NOT_COMMITTED})
        require(not is_honest, "an honest opening is refused")
    try:
        decode_snapshot(shown, 4)
    except PeerFault as exc:
        declared(exc, {Fault.TRUNCATED, Fault.OVERSIZED})
    _sketch(choices)


def _sketch(choices: Choices) -> None:
    text = to_hex(np.ones(NUM_BUCKETS, dtype=np.float32))
    try:
        found = from_hex(flipped(text.encode(), choices).decode("latin-1"))
    except ValueError:
        return
    require(bool(np.isfinite(found).all()), "a sketch that is not finite is taken")
    require(sketch_distance(found, from_hex(text)) >= 0, "a distance below 0")


def proof(data: bytes) -> None:
    """A Merkle range proof, and a sender's batch of chunks."""
    choices = Choices(data)
    count = 1 + choices.below(600)
    leaves, root = _leaves(count), _tree(count).root
    start = choices.below(count)
    stop = start + 1 + choices.below(count - start)
    honest = _tree(count).range_proof(start, stop)
    shown = leaves[start:stop]
    path, at, size = list(honest), start, count
    for _ in range(choices.below(3)):
        what = choices.below(5)
        if what == 0 and path:
            place = choices.below(len(path))
            path[place] = flipped(path[place], choices)
        elif what == 1:
            path = path[: choices.below(len(path) + 1)] + [choices.take(32)] * choices.below(3)
        elif what == 2:
            at = choices.number()
        elif what == 3:
            size = choices.number()
        else:
            shown = [flipped(leaf, choices) for leaf in shown[:8]] + shown[8 + choices.below(3) :]
    held = verify_range(root, size, at, shown, path)
    is_honest = (path, at, size, shown) == (honest, start, count, leaves[start:stop])
    require(held == is_honest, f"a range proof of {count} leaves: {held}, honest: {is_honest}")
    _batch(choices)


def _batch(choices: Choices) -> None:
    group = honest_group()
    plan, sender, chunk = group.plan, choices.below(3), choices.below(3)
    honest = chunk_bytes(plan, group.payloads[sender], chunk)
    shown = flipped(honest, choices)
    path = [flipped(node, choices) for node in group.trees[sender].range_proof(chunk, chunk + 1)]
    header = Batch.model_construct(start=chunk, stop=chunk + 1, proof=path)
    try:
        values = decode_committed(plan, plan.members[sender], header, shown)
    except PeerFault as exc:
        declared(exc, {Fault.TRUNCATED, Fault.OVERSIZED, Fault.NOT_COMMITTED, Fault.NOT_FINITE, Fault.OUT_OF_BOUND})
        return
    finite = all(bool(piece.isfinite().all()) for piece in values)
    require(shown == honest and finite, "chunks that nobody committed to are taken")


@lru_cache(maxsize=1024)
def _leaves(count: int) -> list[bytes]:
    return [leaf_digest(index.to_bytes(4, "big")) for index in range(count)]


@lru_cache(maxsize=1024)
def _tree(count: int) -> MerkleTree:
    return MerkleTree(_leaves(count))


@lru_cache(maxsize=2)
def _owed(left_out: bool) -> tuple[Receipt, Manifest, RemainderBytes]:
    """A receipt that uses a remainder, the base from which it follows, and what its miner opens."""
    rest, carried = (np.full(NUM_PARAMS, value, dtype="<f4").tobytes() for value in (1.0, 2.0))
    sent = honest_receipt().model_copy(
        update={
            "round": ROUND - 1,
            "rest_root": root_of(chunk_leaves(rest)),
            "carried_root": root_of(chunk_leaves(carried)),
        }
    )
    base = make_manifest(1, {}, nonce="0" * 16).model_copy(
        update={
            "round": sent.round,
            "parent": sent.base_manifest,
            "receipts": {CHEAT.hotkey: sent.sha256()},
            "left_out": {CHEAT.hotkey: ((1, 2),)} if left_out else {},
        }
    )
    chunks = 4 * CHUNK_ELEMENTS
    values = rest[:chunks] + carried[chunks : 2 * chunks] + rest[2 * chunks :] if left_out else rest
    versions = zip(chunk_leaves(rest), chunk_leaves(carried), strict=True)
    others = b"".join((one, other)[place != 1] for place, (one, other) in enumerate(versions)) if left_out else b""
    receipt = honest_receipt().model_copy(update={"remainder_root": root_of(chunk_leaves(values))})
    return receipt, base, RemainderBytes(values=values, previous=sent.to_bytes(), others=others)


def remainder(data: bytes) -> None:
    """The remainder of error feedback, and what shows that it follows from the base."""
    choices = Choices(data)
    receipt, base, honest = _owed(choices.flag())
    values = flipped(honest.values, choices)
    committed = choices.flag() and values  # by a liar, whatever the round before left
    if committed:
        receipt = receipt.model_copy(update={"remainder_root": root_of(chunk_leaves(values))})
    shown = RemainderBytes(
        values=values, previous=flipped(honest.previous, choices), others=flipped(honest.others, choices)
    )
    opened = None if choices.below(8) == 7 else shown
    try:
        found = check_remainder(receipt, base, opened, NUM_PARAMS)
    except PeerFault as exc:
        declared(exc, {Fault.REFUSED, Fault.NOT_COMMITTED})
        require(opened != honest, "an honest remainder is refused")
        return
    require(found is not None and values == honest.values, "a remainder that does not follow from the base is taken")


__all__ = ["proof", "remainder", "snapshot", "steps"]
