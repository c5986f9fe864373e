"""The manifest: what one published epoch says of itself, and who stands for it.

One JSON file beside the state's files. Its canonical bytes (sorted keys, no spaces, without signatures) are
what leader and members sign; the sha256 of the whole file is what goes on chain.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import IntegrityError
from hivetrain.identity import Verify
from hivetrain.run import MAX_MINERS
from hivetrain.validation import first_problem

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hotkey = Annotated[str, Field(min_length=1, max_length=64)]
MAX_RUNS = 64
Chunk = Annotated[int, Field(ge=0, lt=1 << 40)]
Runs = Annotated[tuple[tuple[Chunk, Chunk], ...], Field(max_length=MAX_RUNS)]
"""Runs of chunks ``[start, stop)`` of the payload."""


class FileEntry(BaseModel):
    """One file of the epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]


class FaultEntry(BaseModel):
    """Who did what wrong in the all-reduce, as seen by whom."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    hotkey: Hotkey
    fault: Annotated[str, Field(max_length=32)]
    detail: Annotated[str, Field(max_length=500)]


class Manifest(BaseModel):
    """One epoch. See `docs/protocol.md`, "Manifest"."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Annotated[int, Field(ge=1, le=1)] = 1
    run_id: Sha256
    epoch: Annotated[int, Field(ge=0)]
    round: Annotated[int, Field(ge=-1)]  # -1: genesis
    attempt: Annotated[int, Field(ge=0)] = 0
    parent: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]  # sha256 of the parent's manifest file; "" at genesis
    schema_hash: Sha256
    state_hash: Sha256
    base_epoch: Annotated[int, Field(ge=0)] = 0  # the epoch whose tag holds recipe, tokenizer, index and base model
    files: dict[str, FileEntry]
    members: tuple[Hotkey, ...] = ()  # senders whose vector is in the mean
    weights: dict[Hotkey, Annotated[float, Field(ge=0)]] = {}  # receipted samples of each sender
    receipts: Annotated[dict[Hotkey, Sha256], Field(max_length=MAX_MINERS)] = {}  # digests of the members' receipts
    left_out: Annotated[dict[Hotkey, Runs], Field(max_length=MAX_MINERS)] = {}  # of those: chunks whose mean lacks them
    faults: tuple[FaultEntry, ...] = ()
    val_loss: float  # held-out loss of this state, nats per token
    samples: Annotated[int, Field(ge=0)] = 0  # receipted samples in this epoch's mean
    total_samples: Annotated[int, Field(ge=0)] = 0  # the same, summed over the run
    allreduce_seconds: float = 0.0
    allreduce_bytes: Annotated[int, Field(ge=0)] = 0
    block: Annotated[int, Field(ge=0)]
    nonce: Annotated[str, Field(min_length=16, max_length=64)]  # makes the bytes of every publish unique
    leader: Hotkey
    leader_signature: str = ""
    signatures: dict[Hotkey, str] = {}  # members' hex signatures over `state_message`

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return _canonical(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """Hex digest of the file: what is committed on chain."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def signed_bytes(self) -> bytes:
        """What the leader signs: everything but its own signature."""
        return b"hivetrain-manifest/1\n" + _canonical(self.model_dump(mode="json", exclude={"leader_signature"}))

    def is_signed(self, verify: Verify) -> bool:
        """Whether the leader that it names signed it; that this one may lead is for the caller to say."""
        try:
            signature = bytes.fromhex(self.leader_signature)
        except ValueError:  # whatever a stranger wrote there
            return False
        return verify(self.leader, self.signed_bytes(), signature)


def state_message(run_id: str, round_number: int, attempt: int, state_hash: str) -> bytes:
    """What a member signs to say "this is the state that I hold after this round"."""
    return f"hivetrain-state/1\n{run_id}\n{round_number}\n{attempt}\n{state_hash}".encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Parse a manifest from the hub.

    Raises:
        IntegrityError: too large, not JSON, or not a manifest.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"manifest is {len(raw)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as exc:
        first = first_problem(exc)
        raise IntegrityError(f"not a manifest: {exc.error_count()} errors, first: {first.message}") from exc


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """A published epoch on the hub.

    Attributes:
        epoch: its number.
        commit: the hub's commit sha.
        manifest: its parsed manifest.
        manifest_sha256: digest of the manifest's bytes as they lie on the hub.
    """

    epoch: int
    commit: str
    manifest: Manifest
    manifest_sha256: str = field(default="")

    def __post_init__(self) -> None:
        if not self.manifest_sha256:
            object.__setattr__(self, "manifest_sha256", self.manifest.sha256())


def epoch_tag(epoch: int) -> str:
    """``epoch-000042``."""
    return f"epoch-{epoch:06d}"


__all__ = [
    "MANIFEST_NAME",
    "FaultEntry",
    "FileEntry",
    "Manifest",
    "Ref",
    "epoch_tag",
    "parse_manifest",
    "state_message",
]
