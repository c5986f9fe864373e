"""Adapters: what trains, that a tied head stays tied, and that the factored norm is peft's norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hivetrain import run
from hivetrain.errors import ConfigError
from hivetrain.model import FlatVector, attach_adapter
from hivetrain.model.dora import FactoredDora
from tests.model_kit import gpt2, llama, tokens


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def stir(model: nn.Module) -> None:
    """Move every trainable parameter, so that B is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_an_adapter_alone_trains_every_linear_layer_but_the_head(build: Any, kind: Any) -> None:
    base = build()
    linears = [n for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    model = attach_adapter(base, run.Adapter(kind=kind, train_embeddings=False, train_norms=False), 0)
    names = trainable(model)
    assert len(names) == len(linears) * (3 if kind == "dora" else 2)
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_fresh_adapter_does_not_change_the_model(build: Any) -> None:
    base = build().eval()
    before = base(input_ids=tokens()).logits
    after = attach_adapter(base, run.Adapter(), 0)(input_ids=tokens()).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_factored_dora_gives_the_loss_and_gradients_of_pefts_own(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attach_adapter(build(), run.Adapter(kind="dora"), 3)
    assert any(isinstance(m, FactoredDora) for m in ours.modules())
    # Makes the exchange of layers find nothing to exchange: peft's own layers stay.
    monkeypatch.setattr("hivetrain.model.dora.FactoredDora", lambda layer, _weight: layer)
    peft_own = attach_adapter(build(), run.Adapter(kind="dora"), 3)
    assert not any(isinstance(m, FactoredDora) for m in peft_own.modules())
    results = []
    for model in (ours, peft_own):
        stir(model)
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert set(results[0][1]) == set(results[1][1])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_training_embeddings_leaves_the_head_tied(build: Any) -> None:
    base = build()
    model = attach_adapter(base, run.Adapter(), 0)
    head, embeddings = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    assert head is embeddings
    flat = FlatVector(model)
    flat.values.add_(1.0)
    assert base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    assert sum(shape == (128, 32) for _, shape in flat.entries) == 1


def test_norms_train_only_where_the_recipe_says_so() -> None:
    with_norms = trainable(attach_adapter(llama(), run.Adapter(train_embeddings=False), 0))
    without = trainable(attach_adapter(llama(), run.Adapter(train_embeddings=False, train_norms=False), 0))
    assert len(with_norms - without) == 2 * 2 + 1  # two in each of two layers, and the last


def test_full_training_trains_everything_and_attaches_nothing() -> None:
    model = attach_adapter(llama(), run.Adapter(kind="full"), 0)
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert not any("lora_" in name for name in trainable(model))


def test_the_seed_alone_decides_the_adapter() -> None:
    vectors = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator moves between draws
        before = torch.random.get_rng_state()
        vectors.append(FlatVector(attach_adapter(llama(), run.Adapter(kind="dora"), seed)).values)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_named_target_modules_are_the_only_ones_adapted() -> None:
    adapter = run.Adapter(kind="dora", target_modules=("q_proj", "v_proj"), train_embeddings=False, train_norms=False)
    names = trainable(attach_adapter(llama(), adapter, 0))
    assert len(names) == 2 * 2 * 3
    assert all("q_proj" in name or "v_proj" in name for name in names)


def test_a_target_module_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="'c_attn'"):
        attach_adapter(llama(), run.Adapter(target_modules=("q_proj", "c_attn")), 0)


def test_the_expanded_norm_is_the_norm_of_the_dense_matrix() -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(4))
    layer.fan_in_fan_out = False  # type: ignore[assignment]
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    dora = FactoredDora(layer, weight)
    a, b = torch.randn(2, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 2)
    expected = torch.linalg.norm(weight, dim=1)
    torch.testing.assert_close(dora._row_norms(weight, a, b, 2.0), expected)
    b = torch.randn(4, 2, generator=torch.Generator().manual_seed(2))
    expected = torch.linalg.norm(weight + 2.0 * b @ a, dim=1)
    torch.testing.assert_close(dora._row_norms(weight, a, b, 2.0), expected)
