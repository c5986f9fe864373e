"""The flat vector: one buffer under every parameter, and named tensors of strangers checked against it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hivetrain.errors import SchemaMismatch
from hivetrain.model.vector import FlatVector, schema_hash, split
from hivetrain.run import Inner, Recipe


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).view(2, 3))
        model[0].bias.copy_(torch.tensor([10.0, 11.0]))
        model[1].weight.copy_(torch.tensor([[20.0, 21.0]]))
    return model


def test_values_are_the_parameters_sorted_by_name() -> None:
    flat = FlatVector(small())
    assert flat.entries == (("0.bias", (2,)), ("0.weight", (2, 3)), ("1.weight", (1, 2)))
    assert flat.values.tolist() == [10, 11, 0, 1, 2, 3, 4, 5, 20, 21]


def test_writing_the_vector_changes_the_model_and_the_other_way_round() -> None:
    model = small()
    flat = FlatVector(model)
    flat.load_(torch.zeros(10))
    assert model[0].weight.abs().sum() == 0
    with torch.no_grad():
        model[1].weight.fill_(7.0)
    assert flat.values[-2:].tolist() == [7, 7]


def test_backward_writes_into_the_gradient_buffer_and_adds_up() -> None:
    model = small()
    flat = FlatVector(model)
    reference = small()
    x = torch.tensor([[1.0, 2.0, 3.0]])
    for _ in range(2):
        model(x).sum().backward()
        reference(x).sum().backward()
    by_name = dict(reference.named_parameters())
    expected = torch.cat([by_name[name].grad.reshape(-1) for name, _ in flat.entries])
    assert torch.equal(flat.grad, expected)


def test_frozen_parameters_are_not_in_the_vector() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    assert [name for name, _ in FlatVector(model).entries] == ["0.bias", "1.weight"]


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatVector(small().requires_grad_(False))


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        FlatVector(small().to(torch.bfloat16))


def test_a_vector_survives_being_named_and_joined() -> None:
    flat = FlatVector(small())
    vector = torch.arange(10.0)
    named = flat.to_named(vector)
    assert named["0.weight"].tolist() == [[2, 3, 4], [5, 6, 7]]
    assert torch.equal(flat.from_named(named), vector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": None}, r"0\.bias \[2\] is missing"),
        ({"0.weight": torch.zeros(3, 2)}, r"0\.weight must be float32 \[2, 3\], got torch\.float32 \[3, 2\]"),
        ({"1.weight": torch.zeros(1, 2, dtype=torch.float64)}, r"1\.weight must be float32 .* torch\.float64"),
        ({"2.weight": torch.zeros(4)}, r"2\.weight \[4\] is not in this model"),
    ],
)
def test_named_tensors_of_another_model_are_refused_by_name(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    flat = FlatVector(small())
    named = {**flat.to_named(flat.values), **change}
    with pytest.raises(SchemaMismatch, match=message):
        flat.from_named({name: tensor for name, tensor in named.items() if tensor is not None})


@pytest.mark.parametrize("vector", [torch.zeros(9), torch.zeros(2, 5), torch.zeros(10, dtype=torch.float64)])
def test_a_vector_of_another_shape_or_dtype_is_refused(vector: torch.Tensor) -> None:
    flat = FlatVector(small())
    before = flat.values.clone()
    with pytest.raises(SchemaMismatch):
        flat.load_(vector)
    assert torch.equal(flat.values, before)


def test_splitting_a_short_vector_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match=r"\[10\], got \[11\]"):
        split(torch.zeros(11), FlatVector(small()).entries)


def test_the_schema_hash_changes_with_a_name_a_shape_and_the_recipe() -> None:
    entries = (("a", (2, 3)), ("b", (4,)))
    recipe = Recipe()
    hashes = {
        schema_hash(entries, recipe),
        schema_hash((("c", (2, 3)), ("b", (4,))), recipe),
        schema_hash((("a", (3, 2)), ("b", (4,))), recipe),
        schema_hash(entries, dataclasses.replace(recipe, inner=Inner(lr=1e-3))),
    }
    assert len(hashes) == 4
    assert schema_hash(entries, recipe) == schema_hash(entries, Recipe())
