"""The receipt: what a miner signs about its round, before anybody challenges it.

Everything that a later answer can open lies under one root: the snapshots that the window check replays from,
the encoded chunks that the all-reduce carries, the codec's remainder, and a record of every step. A claim that
is not an opening of this root counts nothing. The size does not depend on the model (docs/protocol.md, "Receipt").
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import Fault, PeerFault
from hivetrain.identity import Identity, Verify
from hivetrain.training.state import Snapshot
from hivetrain.validation import first_problem
from hivetrain.verification.merkle import MerkleTree, leaf_digest, verify_range
from hivetrain.verification.sketch import SKETCH_HEX_CHARS, from_hex

MAX_RECEIPT_BYTES = 32 << 10
MAX_SNAPSHOT_BYTES = 256 << 20
NO_REMAINDER = "0" * 64
"""The root of a remainder that is zero, and of every remainder where there is no error feedback."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _finite(sketch: str) -> str:
    from_hex(sketch)
    return sketch


Sketch = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{SKETCH_HEX_CHARS}}}$"), AfterValidator(_finite)]


class Receipt(BaseModel):
    """One miner's statement about one round. Digests are lowercase hex: BLAKE3 in roots, else sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)] = 1
    run_id: Sha256
    round: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]  # the base's
    base_manifest: Sha256
    base_state: Sha256
    schema_hash: Sha256
    layout_hash: Sha256
    hotkey: Annotated[str, Field(min_length=1, max_length=64)]
    rank: Annotated[int, Field(ge=0)]
    num_steps: Annotated[int, Field(ge=1, le=1_000_000)]
    num_samples: Annotated[int, Field(ge=1)]
    num_tokens: Annotated[int, Field(ge=1)]
    loss: Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)]  # mean over the steps, nats per token
    data_digests: Annotated[tuple[Sha256, ...], Field(max_length=64)]  # token bytes of each assigned row group
    steps_root: Sha256
    snapshots_root: Sha256
    num_snapshots: Annotated[int, Field(ge=1, le=100_000)]
    payload_root: Sha256
    num_chunks: Annotated[int, Field(ge=1)]
    remainder_root: Sha256 = NO_REMAINDER  # what error feedback added to the pseudo-gradient
    rest_root: Sha256 = NO_REMAINDER  # the next remainder's chunks where the mean includes this round's
    carried_root: Sha256 = NO_REMAINDER  # and where it leaves them out
    sketch: Sketch  # of the displacement, start - final: what a replay can be compared with where nothing is opened
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,128}$")] = ""

    def signed_bytes(self) -> bytes:
        """What the miner signs: every field but the signature, canonical JSON behind a tag."""
        fields = self.model_dump(mode="json", exclude={"signature"})
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return b"hivetrain-receipt/1\n" + text.encode()

    def root(self) -> str:
        """The one digest that binds all trees."""
        feedback = (self.remainder_root, self.rest_root, self.carried_root)
        parts = (self.steps_root, self.snapshots_root, self.payload_root, *feedback)
        return hashlib.sha256(b"hivetrain-root/1" + b"".join(bytes.fromhex(part) for part in parts)).hexdigest()

    def sha256(self) -> str:
        """Hex digest of the signed bytes: what a manifest names it by."""
        return hashlib.sha256(self.signed_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The bytes on the wire."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()


def sign_receipt(receipt: Receipt, identity: Identity) -> Receipt:
    """``receipt`` with its hotkey's signature."""
    return receipt.model_copy(update={"signature": identity.sign(receipt.signed_bytes()).hex()})


def parse_receipt(raw: bytes, *, hotkey: str, verify: Verify) -> Receipt:
    """Parse and authenticate a receipt that ``hotkey`` is said to have signed.

    Raises:
        PeerFault: OVERSIZED, MALFORMED or BAD_SIGNATURE.
    """
    if len(raw) > MAX_RECEIPT_BYTES:
        raise PeerFault(Fault.OVERSIZED, f"receipt is {len(raw)} bytes, the limit is {MAX_RECEIPT_BYTES}")
    try:
        receipt = Receipt.model_validate_json(raw)
    except ValidationError as exc:
        first = first_problem(exc)
        raise PeerFault(Fault.MALFORMED, f"receipt field {first.where!r}: {first.message}") from exc
    if receipt.hotkey != hotkey:
        raise PeerFault(Fault.BAD_SIGNATURE, f"receipt is {receipt.hotkey}'s, expected {hotkey}'s")
    if not verify(hotkey, receipt.signed_bytes(), bytes.fromhex(receipt.signature)):
        raise PeerFault(Fault.BAD_SIGNATURE, f"receipt's signature is not {hotkey}'s")
    return receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What every honest receipt of one round must say; taken from the recipe, the base and the assignment."""

    run_id: str
    round: int
    epoch: int
    base_manifest: str
    base_state: str
    schema_hash: str
    layout_hash: str
    num_chunks: int
    rank: int
    max_steps: int
    snapshot_every: int
    samples_per_step: int
    tokens_per_step: int
    feeds_back: bool = False  # the recipe's codec is lossy, and error feedback on
    was_in: bool = False  # the base's manifest names a receipt of this hotkey, from which a remainder may follow


def check_receipt(receipt: Receipt, expected: Expected) -> None:
    """Check what can be checked without replaying.

    Raises:
        PeerFault: WRONG_SCHEMA for another run, round, base, schema or layout; MALFORMED for counts that do not add up.
    """
    for fault in receipt_faults(receipt, expected):
        raise fault


def receipt_faults(receipt: Receipt, expected: Expected) -> list[PeerFault]:
    """Everything in a receipt that is not as expected, faults as of `check_receipt`; empty for an honest one."""
    found: list[PeerFault] = []
    for name in ("run_id", "round", "epoch", "base_manifest", "base_state", "schema_hash", "layout_hash", "rank"):
        ours, theirs = getattr(expected, name), getattr(receipt, name)
        if ours != theirs:
            found.append(PeerFault(Fault.WRONG_SCHEMA, f"receipt.{name} is {theirs}, expected {ours}"))
    steps = receipt.num_steps
    sums = (
        ("num_steps", steps, min(steps, expected.max_steps)),
        ("num_chunks", receipt.num_chunks, expected.num_chunks),
        ("num_samples", receipt.num_samples, steps * expected.samples_per_step),
        ("num_tokens", receipt.num_tokens, steps * expected.tokens_per_step),
        ("num_snapshots", receipt.num_snapshots, len(snapshot_steps(steps, expected.snapshot_every))),
    )
    for name, got, want in sums:
        if got != want:
            words = f"receipt.{name} is {got}, expected {want} for {steps} steps"
            found.append(PeerFault(Fault.MALFORMED, words))
    for name in ("rest_root", "carried_root"):
        if (getattr(receipt, name) != NO_REMAINDER) != expected.feeds_back:
            wanted = "a root" if expected.feeds_back else "64 zeros"
            found.append(PeerFault(Fault.MALFORMED, f"receipt.{name} is {getattr(receipt, name)}, expected {wanted}"))
    if receipt.remainder_root != NO_REMAINDER and not (expected.feeds_back and expected.was_in):
        words = "receipt.remainder_root must be 64 zeros: no remainder follows from the base"
        found.append(PeerFault(Fault.MALFORMED, words))
    return found


def snapshot_steps(num_steps: int, every: int) -> list[int]:
    """The steps after which a snapshot is committed: every ``every`` steps, and the last one."""
    steps = list(range(every, num_steps + 1, every))
    if not steps or steps[-1] != num_steps:
        steps.append(num_steps)
    return steps


def step_record(step: int, samples: Sequence[tuple[int, int]], loss: float) -> bytes:
    """The leaf of one inner step: its number, its loss (float32), its samples as (slot, window) pairs."""
    flat = [index for pair in samples for index in pair]
    return struct.pack(f"<Qf{len(flat)}I", step, loss, *flat)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotBytes:
    """One committed snapshot: the state after ``step`` inner steps, raw float32, as it is hashed and opened."""

    step: int
    payload: bytes

    def digest(self) -> bytes:
        """Its Merkle leaf."""
        return leaf_digest(self.payload)


def encode_snapshot(snapshot: Snapshot) -> SnapshotBytes:
    """Serialise a snapshot: its step number, then vector and both moments as little-endian float32."""
    return SnapshotBytes(step=snapshot.step, payload=struct.pack("<Q", snapshot.step) + snapshot.to_bytes())


def snapshot_size_bytes(num_params: int) -> int:
    """Bytes of one snapshot of a vector of ``num_params`` elements."""
    return 8 + 12 * num_params


def decode_snapshot(payload: bytes, num_params: int) -> Snapshot:
    """The inverse of `encode_snapshot`. Values may be NaN: they are a claim, and replay judges it.

    Raises:
        PeerFault: TRUNCATED or OVERSIZED for another size.
    """
    want = snapshot_size_bytes(num_params)
    if len(payload) != want:
        fault = Fault.TRUNCATED if len(payload) < want else Fault.OVERSIZED
        raise PeerFault(fault, f"snapshot is {len(payload)} bytes, expected {want}")
    (step,) = struct.unpack_from("<Q", payload)
    return Snapshot.from_bytes(int(step), payload[8:], num_params)


def check_opening(receipt: Receipt, index: int, payload: bytes, proof: Sequence[bytes]) -> None:
    """Check that ``payload`` is the snapshot ``index`` under the receipt's root.

    Raises:
        PeerFault: NOT_COMMITTED.
    """
    root = bytes.fromhex(receipt.snapshots_root)
    if not verify_range(root, receipt.num_snapshots, index, [leaf_digest(payload)], list(proof)):
        raise PeerFault(Fault.NOT_COMMITTED, f"snapshot {index} does not open {receipt.snapshots_root[:12]}")


class SnapshotTree:
    """A miner's own snapshots of one round, ready to be opened."""

    def __init__(self, snapshots: Sequence[SnapshotBytes]) -> None:
        self.snapshots = tuple(snapshots)
        self._tree = MerkleTree([snapshot.digest() for snapshot in self.snapshots])

    @property
    def root(self) -> str:
        """Hex root over all snapshots."""
        return self._tree.root.hex()

    def open(self, index: int) -> tuple[SnapshotBytes, list[bytes]]:
        """The snapshot and its proof.

        Raises:
            IndexError: no such snapshot.
        """
        if not 0 <= index < len(self.snapshots):
            raise IndexError(f"snapshot {index} of {len(self.snapshots)}")
        return self.snapshots[index], self._tree.range_proof(index, index + 1)
