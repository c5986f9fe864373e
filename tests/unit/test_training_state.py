"""The state: hashed over its bytes, written, read back, and refused when anything about it is off."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from hivetrain.errors import IntegrityError, SchemaMismatch
from hivetrain.model.vector import FlatVector
from hivetrain.training.state import (
    MAX_HEADER_BYTES,
    Snapshot,
    State,
    at_snapshot,
    genesis_state,
    load_state,
    state_files,
    state_hash,
)

BASE = "b" * 64


def model() -> FlatVector:
    torch.manual_seed(0)
    return FlatVector(nn.Linear(3, 2))


def some_state(flat: FlatVector, *, outer: bool = False) -> State:
    generator = torch.Generator().manual_seed(1)
    return State(
        epoch=4,
        step=200,
        vector=torch.randn(flat.size, generator=generator),
        exp_avg=torch.randn(flat.size, generator=generator),
        exp_avg_sq=torch.rand(flat.size, generator=generator),
        outer_momentum=torch.randn(flat.size, generator=generator) if outer else None,
        base_sha256=BASE,
    )


def write(folder: Path, files: dict[str, bytes]) -> dict[str, Path]:
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return {name: folder / name for name in files}


def test_genesis_is_the_model_as_it_stands_with_zero_moments() -> None:
    flat = model()
    state = genesis_state(flat, BASE, outer_momentum=True)
    assert (state.epoch, state.step, state.base_sha256) == (0, 0, BASE)
    assert torch.equal(state.vector, flat.values)
    for tensor in (state.exp_avg, state.exp_avg_sq, state.outer_momentum):
        assert tensor is not None
        assert tensor.abs().sum() == 0
    flat.values.zero_()
    assert state.vector.abs().sum() > 0
    assert genesis_state(flat, BASE).outer_momentum is None


def test_the_hash_is_sha256_over_the_little_endian_bytes_in_order() -> None:
    state = State(
        epoch=1,
        step=50,
        vector=torch.tensor([1.0, -2.0]),
        exp_avg=torch.tensor([0.5, 0.25]),
        exp_avg_sq=torch.tensor([3.0, 4.0]),
        outer_momentum=None,
        base_sha256=BASE,
    )
    expected = hashlib.sha256(
        f"hivetrain-state-bytes/1\n{BASE}\n1\n50\n".encode()
        + b"vector\n2\n"
        + struct.pack("<2f", 1, -2)
        + b"exp_avg\n2\n"
        + struct.pack("<2f", 0.5, 0.25)
        + b"exp_avg_sq\n2\n"
        + struct.pack("<2f", 3, 4)
    )
    assert state_hash(state) == expected.hexdigest()


def test_every_field_is_in_the_hash() -> None:
    state = some_state(model(), outer=True)
    changed = [
        dataclasses.replace(state, epoch=5),
        dataclasses.replace(state, step=201),
        dataclasses.replace(state, base_sha256="c" * 64),
        dataclasses.replace(state, outer_momentum=None),
        *(
            dataclasses.replace(state, **{name: torch.nextafter(getattr(state, name), torch.tensor(9.0))})
            for name in ("vector", "exp_avg", "exp_avg_sq", "outer_momentum")
        ),
    ]
    assert len({state_hash(s) for s in [state, *changed]}) == len(changed) + 1


@pytest.mark.parametrize("outer", [False, True])
def test_a_written_state_reads_back_bit_for_bit(tmp_path: Path, outer: bool) -> None:
    flat = model()
    state = some_state(flat, outer=outer)
    files = state_files(state, flat)
    assert ("outer.safetensors" in files) == outer
    assert set(load(files["adapter.safetensors"])) == {"bias", "weight"}
    assert state_hash(load_state(write(tmp_path, files), flat, BASE)) == state_hash(state)


def test_the_same_state_gives_the_same_file_bytes() -> None:
    flat = model()
    assert state_files(some_state(flat), flat) == state_files(some_state(flat), flat)


def test_a_state_of_another_base_is_refused(tmp_path: Path) -> None:
    flat = model()
    with pytest.raises(SchemaMismatch, match=r"belongs to base b+, ours is c+"):
        load_state(write(tmp_path, state_files(some_state(flat), flat)), flat, "c" * 64)


@pytest.mark.parametrize("name", ["adapter.safetensors", "moments.safetensors", "outer.safetensors"])
def test_a_missing_torn_or_oversized_file_is_refused(tmp_path: Path, name: str) -> None:
    flat = model()
    files = state_files(some_state(flat, outer=True), flat)
    paths = write(tmp_path, files)
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        load_state({key: path for key, path in paths.items() if key != name}, flat, BASE)
    paths[name].write_bytes(files[name][:-5])
    with pytest.raises(IntegrityError, match=f"{name} is not safetensors"):
        load_state(paths, flat, BASE)
    with paths[name].open("wb") as file:
        file.truncate(MAX_HEADER_BYTES + 1000)
    with pytest.raises(IntegrityError, match=f"{name} is .* bytes, the limit is"):
        load_state(paths, flat, BASE)


def poison(name: str, value: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        tensor: Tensor = getattr(state, name).clone()
        tensor[3] = value
        return dataclasses.replace(state, **{name: tensor})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison("vector", float("nan")), "vector holds 1 non-finite"),
        (poison("exp_avg", float("inf")), "exp_avg holds 1 non-finite"),
        (poison("exp_avg_sq", float("-inf")), "exp_avg_sq holds 1 non-finite"),
        (poison("exp_avg_sq", -1e-9), "exp_avg_sq holds negative"),
        (poison("outer_momentum", float("nan")), "outer_momentum holds 1 non-finite"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, change: Callable[[State], State], message: str) -> None:
    flat = model()
    files = state_files(change(some_state(flat, outer=True)), flat)
    with pytest.raises(IntegrityError, match=message):
        load_state(write(tmp_path, files), flat, BASE)


def test_moments_of_another_length_are_refused(tmp_path: Path) -> None:
    flat = model()
    files = state_files(some_state(flat), flat)
    files["moments.safetensors"] = save({"exp_avg": torch.zeros(flat.size), "exp_avg_sq": torch.zeros(flat.size - 1)})
    with pytest.raises(SchemaMismatch, match=r"exp_avg_sq must be float32 \[8\].*\[7\]"):
        load_state(write(tmp_path, files), flat, BASE)


def test_moments_without_a_name_we_know_are_refused(tmp_path: Path) -> None:
    flat = model()
    files = state_files(some_state(flat), flat)
    files["moments.safetensors"] = save({"exp_avg": torch.zeros(flat.size)})
    with pytest.raises(SchemaMismatch, match="holds no exp_avg_sq"):
        load_state(write(tmp_path, files), flat, BASE)


def test_parameters_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    flat = model()
    torch.manual_seed(0)
    other = FlatVector(nn.Linear(3, 2, bias=False))
    state = dataclasses.replace(some_state(other), vector=other.values.clone())
    with pytest.raises(SchemaMismatch, match="parameter bias"):
        load_state(write(tmp_path, state_files(state, other)), flat, BASE)


@pytest.mark.parametrize("header", [None, "{}", "not json", '{"epoch": -1, "step": 0, "outer_momentum": false}'])
def test_a_header_that_says_nothing_possible_is_refused(tmp_path: Path, header: str | None) -> None:
    flat = model()
    files = state_files(some_state(flat), flat)
    tensors = {name: tensor.clone() for name, tensor in flat.to_named(flat.values).items()}
    files["adapter.safetensors"] = save(tensors, None if header is None else {"hivetrain": header})
    with pytest.raises(IntegrityError, match="no valid header"):
        load_state(write(tmp_path, files), flat, BASE)


def test_a_snapshot_survives_its_bytes_and_refuses_another_length() -> None:
    snapshot = Snapshot(
        step=10, vector=torch.tensor([1.0, 2.0]), exp_avg=torch.tensor([3.0, 4.0]), exp_avg_sq=torch.tensor([5.0, 6.0])
    )
    raw = snapshot.to_bytes()
    assert raw == struct.pack("<6f", 1, 2, 3, 4, 5, 6)
    again = Snapshot.from_bytes(10, raw, 2)
    assert again.to_bytes() == raw
    assert again.exp_avg.tolist() == [3, 4]
    with pytest.raises(ValueError, match="24 bytes, got 23"):
        Snapshot.from_bytes(10, raw[:-1], 2)


def test_a_snapshot_stands_in_for_the_states_tensors_and_nothing_else() -> None:
    state = some_state(model(), outer=True)
    snapshot = Snapshot(step=10, vector=torch.ones(8), exp_avg=torch.ones(8), exp_avg_sq=torch.ones(8))
    moved = at_snapshot(state, snapshot)
    assert (moved.epoch, moved.step) == (4, 200)
    assert moved.vector is snapshot.vector
    assert moved.outer_momentum is state.outer_momentum
