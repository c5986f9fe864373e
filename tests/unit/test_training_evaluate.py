"""Held-out loss against cross-entropy by hand; the model is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hivetrain.errors import SchemaMismatch
from hivetrain.model import Assembled, assemble
from hivetrain.run import Model, Recipe
from hivetrain.training import heldout_loss

RECIPE = Recipe(model=Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128))
IDS = torch.randint(0, 128, (3, 2, 16), generator=torch.Generator().manual_seed(0))


def build() -> Assembled:
    return assemble(RECIPE, None, 128, "cpu")


def test_it_is_the_mean_next_token_cross_entropy() -> None:
    model = build()
    with torch.no_grad():
        logits = model.module(input_ids=IDS.view(6, 16)).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 128), IDS.view(6, 16)[:, 1:].reshape(-1))
    actual = heldout_loss(model.module, model.flat, model.flat.values.clone(), IDS, "cpu")
    assert actual == pytest.approx(expected.item(), rel=1e-6)


def test_it_judges_the_vector_given_and_leaves_the_model_as_it_was() -> None:
    model = build()
    before = model.flat.values.clone()
    other = before + 0.05 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    assert heldout_loss(model.module, model.flat, other, IDS, "cpu") != heldout_loss(
        model.module, model.flat, before, IDS, "cpu"
    )
    assert torch.equal(model.flat.values, before)
    assert model.flat.grad.abs().sum() == 0


def test_a_vector_of_nan_gives_nan_and_does_not_stay() -> None:
    model = build()
    before = model.flat.values.clone()
    assert math.isnan(heldout_loss(model.module, model.flat, torch.full_like(before, math.nan), IDS, "cpu"))
    assert torch.equal(model.flat.values, before)


def test_a_vector_of_another_size_is_refused_and_the_model_is_as_it_was() -> None:
    model = build()
    before = model.flat.values.clone()
    with pytest.raises(SchemaMismatch):
        heldout_loss(model.module, model.flat, before[:-1], IDS, "cpu")
    assert torch.equal(model.flat.values, before)


@pytest.mark.parametrize("batches", [IDS[0], IDS[:0]])
def test_batches_of_another_shape_are_refused(batches: torch.Tensor) -> None:
    model = build()
    with pytest.raises(ValueError, match="num_batches"):
        heldout_loss(model.module, model.flat, model.flat.values.clone(), batches, "cpu")
