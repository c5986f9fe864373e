"""The weight that base and adapter make: against dense definitions, the live forward, and plain float arithmetic."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from hivetrain import run
from hivetrain.model import (
    FlatVector,
    adapted_layers,
    attach_adapter,
    base_sha256,
    base_tensors,
    load_base,
    tensors_sha256,
)
from hivetrain.model.draws import uniform
from hivetrain.model.weights import row_norms

Kind = Literal["dora", "dora_linear", "lora"]
KINDS: tuple[Kind, ...] = ("dora", "dora_linear", "lora")
TINY = run.Model(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=80, vocab_size=128)


def llama() -> Any:
    return load_base(TINY, None, 128)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=1, n_head=2))


def stirred(build: Any, kind: Kind) -> tuple[nn.Module, FlatVector]:
    model = attach_adapter(build(), run.Adapter(kind=kind), 0)
    flat = FlatVector(model)
    flat.values.add_(0.05 * torch.randn(flat.size, generator=torch.Generator().manual_seed(1)))
    return model, flat


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_what_the_live_layer_multiplies_with(build: Any, kind: Kind) -> None:
    model, flat = stirred(build, kind)
    named, base = flat.to_named(flat.values), base_tensors(model)
    layers = adapted_layers(model)
    assert layers
    for layer in layers:
        weight = layer.weight(layer.oriented(base[layer.weight_name]), named)
        rows: Tensor = layer.module(torch.eye(weight.shape[1])) - layer.module(torch.zeros(1, weight.shape[1]))
        torch.testing.assert_close(rows.T, weight.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_under_an_adapter_has_the_hash_of_the_base_alone(build: Any, kind: Kind) -> None:
    base = build()
    before = base_sha256(base)
    assert tensors_sha256(base_tensors(attach_adapter(base, run.Adapter(kind=kind), 0))) == before


def test_full_training_has_no_adapted_layers() -> None:
    assert adapted_layers(attach_adapter(llama(), run.Adapter(kind="full"), 0)) == ()


@pytest.mark.parametrize("num_columns", [1, 2, 3, 7, 64, 80])
def test_row_norms_are_norms(num_columns: int) -> None:
    matrix = torch.randn(4, num_columns, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_norms(matrix), torch.linalg.norm(matrix.double(), dim=1), rtol=1e-14, atol=0)


def test_row_norms_are_summed_halves_onto_halves() -> None:
    """In float64 the order shows: whoever sums otherwise gets another last bit."""
    row = torch.randn(1, 5, generator=torch.Generator().manual_seed(3))
    s = [float(value) ** 2 for value in row[0].double()]
    assert row_norms(row).item() == ((((s[0] + s[3]) + s[2]) + (s[1] + s[4])) ** 0.5)


def by_hand(weight: Tensor, b: Tensor, a: Tensor, m: Tensor, scaling: float) -> list[list[float]]:
    """DoRA's weight in Python's floats, one rounded operation after the other, in the order that is promised."""
    rows = []
    for row, b_row, magnitude in zip(weight.tolist(), b.tolist(), m.tolist(), strict=True):
        for b_value, a_row in zip(b_row, a.tolist(), strict=True):
            row = [value + b_value * scaling * a_value for value, a_value in zip(row, a_row, strict=True)]
        squares = [value * value for value in row]
        while len(squares) > 1:
            half = (len(squares) + 1) // 2
            rest = squares[half:]
            squares = [s + rest[i] if i < len(rest) else s for i, s in enumerate(squares[:half])]
        gain = magnitude / math.sqrt(squares[0])
        rows.append([value * gain for value in row])
    return rows


def test_the_bits_of_the_weight_are_those_of_plain_float64_arithmetic() -> None:
    """Whatever this machine's vector units and threads: otherwise members could not sign a merge."""
    model, flat = stirred(llama, "dora")
    named, base = flat.to_named(flat.values.detach()), base_tensors(model)
    for layer in adapted_layers(model)[::3]:
        weight = base[layer.weight_name]
        assert layer.a_name is not None
        assert layer.magnitude_name is not None
        factors = named[layer.b_name], named[layer.a_name], named[layer.magnitude_name]
        assert layer.weight(weight, named).tolist() == by_hand(weight, *factors, layer.scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_makes_the_weight_that_it_starts_on(kind: Kind) -> None:
    model, _ = stirred(llama, kind)
    base = base_tensors(model)
    for layer in adapted_layers(model):
        weight = base[layer.weight_name]
        fresh = layer.fresh(weight, seed=0, epoch=4)
        assert set(fresh) == set(layer.trained_names())
        torch.testing.assert_close(layer.weight(weight, fresh).float(), weight, rtol=1e-6, atol=1e-8)
        other = layer.fresh(weight, seed=0, epoch=8)
        if layer.a_name is not None:
            drawn = uniform(f"merge-a\n0\n4\n{layer.name}", (8, weight.shape[1]), weight.shape[1] ** -0.5)
            assert torch.equal(fresh[layer.a_name], drawn)  # docs/protocol.md
            assert not torch.equal(other[layer.a_name], drawn)


def test_a_row_of_zeros_has_no_direction_and_stays_zero() -> None:
    model, flat = stirred(llama, "dora_linear")
    layer, named = adapted_layers(model)[0], flat.to_named(flat.values.detach().clone())
    named[layer.b_name].zero_()
    weight = base_tensors(model)[layer.weight_name].clone()
    weight[0] = 0
    assert layer.weight(weight, named)[0].abs().sum() == 0
