"""The residual form against a float64 oracle: exact for any vectors and weights, and it changes what it must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from hivetrain import run
from hivetrain.model import Assembled, adapted_layers, assemble, base_tensors, fold_residuals
from hivetrain.model.residual import fold, residual
from hivetrain.run import Recipe
from hivetrain.training import install_base_

TINY = run.Model(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=128)


def build(kind: Literal["dora", "lora", "dora_linear"]) -> Assembled:
    return assemble(Recipe(model=TINY, adapter=run.Adapter(kind=kind)), None, 128, "cpu")


def member_vectors(model: Assembled, count: int, scale: float = 0.1) -> list[Tensor]:
    noise = torch.randn(count, model.flat.size, generator=torch.Generator().manual_seed(7))
    return list(model.flat.values.detach() + scale * noise)


def mean_of(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum(weights)
    return torch.stack([v * (w / total) for v, w in zip(vectors, weights, strict=True)]).sum(dim=0)


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 0.0, 1.0)])
def test_the_folded_average_is_the_mean_of_the_weights(
    kind: Literal["dora", "lora"], weights: tuple[float, ...]
) -> None:
    model = build(kind)
    layers, base, entries = adapted_layers(model.module), base_tensors(model.module), model.flat.entries
    vectors = member_vectors(model, 3)
    mean = mean_of(vectors, weights)
    new_base, new_vector = fold_residuals(layers, base, vectors, weights, mean, entries)
    total = sum(weights)
    for layer in layers:
        old = base[layer.weight_name]
        parts = [layer.weight(old, model.flat.to_named(v)) * w / total for v, w in zip(vectors, weights, strict=True)]
        oracle = torch.stack(parts).sum(dim=0)
        folded = layer.weight(new_base[layer.weight_name], model.flat.to_named(new_vector))
        plain = layer.weight(old, model.flat.to_named(mean))
        assert torch.norm(folded - oracle) < 1e-6 * torch.norm(oracle - old)
        assert torch.norm(plain - oracle) > 0.05 * torch.norm(oracle - old)  # what folding made good


def test_only_the_adapted_weights_and_their_magnitudes_change() -> None:
    model = build("dora")
    layers, base, entries = adapted_layers(model.module), base_tensors(model.module), model.flat.entries
    before = {name: tensor.clone() for name, tensor in base.items()}
    vectors = member_vectors(model, 2)
    mean = mean_of(vectors, (1, 1))
    new_base, new_vector = fold_residuals(layers, base, vectors, (1, 1), mean, entries)
    assert all(torch.equal(base[name], before[name]) for name in base)
    weights, magnitudes = {one.weight_name for one in layers}, {one.magnitude_name for one in layers}
    assert {name for name in base if not torch.equal(new_base[name], before[name])} == weights
    old, new = model.flat.to_named(mean), model.flat.to_named(new_vector)
    assert {name for name in old if not torch.equal(old[name], new[name])} == magnitudes


def test_the_live_model_computes_with_the_folded_weight() -> None:
    model = build("dora")
    layers, entries = adapted_layers(model.module), model.flat.entries
    vectors = member_vectors(model, 2)
    base, vector = fold_residuals(
        layers, base_tensors(model.module), vectors, (1, 1), mean_of(vectors, (1, 1)), entries
    )
    install_base_(layers, base, 0, 0)
    model.flat.load_(vector)
    for layer in layers:
        weight = layer.weight(base[layer.weight_name], model.flat.to_named(vector))
        live: Tensor = layer.module(torch.eye(weight.shape[1]))
        torch.testing.assert_close(live.T, weight.float(), rtol=1e-4, atol=1e-6)


def test_members_that_agree_miss_nothing() -> None:
    model = build("dora")
    layer, base = adapted_layers(model.module)[0], base_tensors(model.module)
    named = model.flat.to_named(member_vectors(model, 1)[0])
    weight = base[layer.weight_name]
    missed = residual(layer, weight, [named, named], [1, 1], named)
    assert missed.abs().max() < 1e-15
    folded, magnitude = fold(layer, weight, named, missed)
    torch.testing.assert_close(folded, weight, rtol=0, atol=1e-7)
    assert magnitude is not None
    assert layer.magnitude_name is not None
    torch.testing.assert_close(magnitude, named[layer.magnitude_name], rtol=1e-6, atol=0)


def test_a_magnitude_below_zero_goes_on_turning_its_row_around() -> None:
    model = build("dora")
    layer, base = adapted_layers(model.module)[0], base_tensors(model.module)
    members = [model.flat.to_named(vector.clone()) for vector in member_vectors(model, 2)]
    assert layer.magnitude_name is not None
    for member in members:
        member[layer.magnitude_name][0] = -0.3
    mean = {name: (members[0][name] + members[1][name]) / 2 for name in members[0]}
    weight = base[layer.weight_name]
    folded, magnitude = fold(layer, weight, mean, residual(layer, weight, members, [1, 1], mean))
    assert magnitude is not None
    assert magnitude[0] < 0
    oracle = (layer.weight(weight, members[0]) + layer.weight(weight, members[1])) / 2
    found = layer.weight(folded, {**mean, layer.magnitude_name: magnitude})
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-7)


def test_the_linear_form_has_nothing_to_fold() -> None:
    model = build("dora_linear")
    layer, base = adapted_layers(model.module)[0], base_tensors(model.module)
    named = model.flat.to_named(model.flat.values.detach())
    weight = base[layer.weight_name]
    with pytest.raises(ValueError, match="its plain mean is exact"):
        fold(layer, weight, named, torch.zeros_like(weight))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_make_no_mean_are_refused(weights: list[float]) -> None:
    model = build("lora")
    layer, base = adapted_layers(model.module)[0], base_tensors(model.module)
    named = model.flat.to_named(model.flat.values.detach())
    with pytest.raises(ValueError, match="2 members need as many weights"):
        residual(layer, base[layer.weight_name], [named, named], weights, named)
