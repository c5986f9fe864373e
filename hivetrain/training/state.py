"""The state of a run at one epoch: what every node must hold, bit for bit, to train, replay and average.

AdamW's moments belong to it (`docs/architecture.md`): a miner that started from its own could not be replayed.

Files, written by the leader and read by everyone:

    adapter.safetensors   the trainable parameters by name, and the header: epoch, step, base's hash
    moments.safetensors   "exp_avg" and "exp_avg_sq", each [P] in the vector's order
    outer.safetensors     "momentum" [P]; only where the outer step has one

Shapes: P = trainable parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from hivetrain.errors import IntegrityError, SchemaMismatch
from hivetrain.model.vector import FlatVector, little_endian

ADAPTER_NAME = "adapter.safetensors"
MOMENTS_NAME = "moments.safetensors"
OUTER_NAME = "outer.safetensors"
HEADER_KEY = "hivetrain"
MAX_HEADER_BYTES = 16 << 20
"""Bound of what a file may hold beside its tensors: names, shapes and our header."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """One published step of the model. Every tensor is float32 on the CPU, and never written to.

    Attributes:
        epoch: counted from 0 at genesis.
        step: inner steps that lie behind it; drives the learning rate and AdamW's bias correction.
        vector: [P] trainable parameters.
        exp_avg: [P] AdamW's first moment.
        exp_avg_sq: [P] AdamW's second moment, >= 0.
        outer_momentum: [P], or None where the outer step has none.
        base_sha256: of the frozen base that the vector belongs to.
        base: that base's tensors by name, where it is not yet under the model (`hivetrain.training.base`); else None.
    """

    epoch: int
    step: int
    vector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    outer_momentum: Tensor | None
    base_sha256: str
    base: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """Where a miner stood after ``step`` inner steps of the round. Tensors are float32 [P] on the CPU."""

    step: int
    vector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def to_bytes(self) -> bytes:
        """Vector, first and second moment, little endian: 12 * P bytes. What a Merkle root covers."""
        return b"".join(bytes(little_endian(t)) for t in (self.vector, self.exp_avg, self.exp_avg_sq))

    @classmethod
    def from_bytes(cls, step: int, raw: bytes, num_params: int) -> Snapshot:
        """The inverse of `to_bytes`. Values may be NaN: they are a claim, and replay judges it.

        Raises:
            ValueError: not 12 * P bytes.
        """
        if len(raw) != 12 * num_params:
            raise ValueError(f"a snapshot of {num_params} parameters is {12 * num_params} bytes, got {len(raw)}")
        # A copy, since torch must own what it may write to, and `raw` may be a view into a message.
        vector, exp_avg, exp_avg_sq = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(3, num_params)
        return cls(step=step, vector=vector, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def genesis_state(flat: FlatVector, base_sha256: str, *, outer_momentum: bool = False) -> State:
    """The state of epoch 0: the model as it stands, with moments of zero."""
    vector = flat.values.detach().to("cpu", copy=True)
    return State(
        epoch=0,
        step=0,
        vector=vector,
        exp_avg=torch.zeros_like(vector),
        exp_avg_sq=torch.zeros_like(vector),
        outer_momentum=torch.zeros_like(vector) if outer_momentum else None,
        base_sha256=base_sha256,
    )


def at_snapshot(state: State, snapshot: Snapshot) -> State:
    """``state`` with the snapshot's vector and moments: where a replay of a later window of its round starts.

    Its ``step`` stays the round's: `InnerLoop.run` adds ``first_step``.
    """
    return dataclasses.replace(state, vector=snapshot.vector, exp_avg=snapshot.exp_avg, exp_avg_sq=snapshot.exp_avg_sq)


def state_hash(state: State) -> str:
    """Hex sha256 over base, epoch, step and every tensor's little-endian bytes."""
    head = f"hivetrain-state-bytes/1\n{state.base_sha256}\n{state.epoch}\n{state.step}\n"
    digest = hashlib.sha256(head.encode())
    for name, tensor in _tensors(state):
        digest.update(f"{name}\n{tensor.numel()}\n".encode())
        digest.update(little_endian(tensor))
    return digest.hexdigest()


def _tensors(state: State) -> list[tuple[str, Tensor]]:
    named = [("vector", state.vector), ("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)]
    if state.outer_momentum is not None:
        named.append(("outer_momentum", state.outer_momentum))
    return named


class _Header(BaseModel):
    """What `adapter.safetensors` says beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Annotated[int, Field(ge=1, le=1)] = 1
    epoch: Annotated[int, Field(ge=0, le=2**53)]
    step: Annotated[int, Field(ge=0, le=2**53)]
    base_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    outer_momentum: bool


def state_files(state: State, flat: FlatVector) -> dict[str, bytes]:
    """The state's files by name; the same state gives the same bytes.

    Raises:
        SchemaMismatch: the state's vector is not ``flat``'s.
    """
    from safetensors.torch import save

    header = _Header(
        epoch=state.epoch,
        step=state.step,
        base_sha256=state.base_sha256,
        outer_momentum=state.outer_momentum is not None,
    )
    # One key: safetensors writes several in no fixed order.
    metadata = {HEADER_KEY: json.dumps(header.model_dump(), sort_keys=True)}
    files = {
        ADAPTER_NAME: save(_contiguous(flat.to_named(state.vector)), metadata),
        MOMENTS_NAME: save({"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}),
    }
    if state.outer_momentum is not None:
        files[OUTER_NAME] = save({"momentum": state.outer_momentum})
    return files


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share storage, which views of one vector do.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def load_state(paths: Mapping[str, Path], flat: FlatVector, base_sha256: str) -> State:
    """Read a state from files that are not ours: bounded, parsed, schema-checked and finite, in that order.

    Args:
        paths: local files by their published name, as in `state_files`.
        flat: our trainable vector, whose names and shapes the files must have.
        base_sha256: of the base that we hold.

    Raises:
        IntegrityError: a file is missing, oversized, not safetensors, not finite, or has an impossible header.
        SchemaMismatch: it is a state of another model; names the first difference.
    """
    tensors, header_json = _read(paths, ADAPTER_NAME, flat.size)
    try:
        header = _Header.model_validate_json(header_json)
    except ValidationError as exc:
        raise IntegrityError(f"{ADAPTER_NAME} has no valid header: {exc.errors()[0]['msg']}") from exc
    if header.base_sha256 != base_sha256:
        raise SchemaMismatch(f"the state belongs to base {header.base_sha256}, ours is {base_sha256}")
    vector = flat.from_named(tensors)
    moments, _ = _read(paths, MOMENTS_NAME, 2 * flat.size)
    exp_avg = _whole(moments, MOMENTS_NAME, "exp_avg", flat.size)
    exp_avg_sq = _whole(moments, MOMENTS_NAME, "exp_avg_sq", flat.size)
    outer_momentum = None
    if header.outer_momentum:
        outer, _ = _read(paths, OUTER_NAME, flat.size)
        outer_momentum = _whole(outer, OUTER_NAME, "momentum", flat.size)
    state = State(
        epoch=header.epoch,
        step=header.step,
        vector=vector,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        outer_momentum=outer_momentum,
        base_sha256=base_sha256,
    )
    for name, tensor in _tensors(state):
        if not bool(torch.isfinite(tensor).all()):
            raise IntegrityError(f"the state's {name} holds {int((~torch.isfinite(tensor)).sum())} non-finite values")
    if bool((exp_avg_sq < 0).any()):
        raise IntegrityError("the state's exp_avg_sq holds negative values")
    return state


def _read(paths: Mapping[str, Path], name: str, num_elements: int) -> tuple[dict[str, Tensor], str]:
    """Tensors and our header ("" without one) of one file of at most ``num_elements`` float32."""
    from safetensors import SafetensorError, safe_open

    path = paths.get(name)
    if path is None or not path.is_file():
        raise IntegrityError(f"the state's {name} is missing")
    limit = 4 * num_elements + MAX_HEADER_BYTES
    if path.stat().st_size > limit:
        raise IntegrityError(f"{name} is {path.stat().st_size} bytes, the limit is {limit}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned out of the file's mapping, which a later download may replace.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as exc:
        raise IntegrityError(f"{name} is not safetensors: {exc}") from exc
    return tensors, str(metadata.get(HEADER_KEY, ""))


def _whole(tensors: Mapping[str, Tensor], file: str, name: str, num_params: int) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise SchemaMismatch(f"{file} holds no {name}, only {sorted(tensors)[:4]}")
    if tensor.shape != (num_params,) or tensor.dtype is not torch.float32:
        raise SchemaMismatch(f"{file}: {name} must be float32 [{num_params}], got {tensor.dtype} {list(tensor.shape)}")
    return tensor
