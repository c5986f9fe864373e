"""The linear form: its forward and gradients are the dense weight's, and a mean of vectors is a mean of weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from hivetrain import run
from hivetrain.model import FlatVector, adapted_layers, assemble, attach_adapter, base_tensors
from hivetrain.model.draws import signs
from hivetrain.model.linear import LinearDora, frozen_a
from hivetrain.run import Recipe
from tests.model_kit import TINY, gpt2, llama, tokens

LINEAR = run.Adapter(kind="dora_linear")


def stirred(layer: LinearDora, seed: int = 1) -> LinearDora:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (layer.lora_B, layer.lora_magnitude):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return layer


def one_layer(*, bias: bool = True) -> LinearDora:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        base = nn.Linear(6, 5, bias=bias).requires_grad_(False)
    return LinearDora(base, frozen_a(0, 0, "a", 2, 6, 2.0), scaling=2.0, transposed=False)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_fresh_linear_form_does_not_change_the_model(build: Any) -> None:
    base = build().eval()
    before = base(input_ids=tokens()).logits
    after = attach_adapter(base, LINEAR, 0)(input_ids=tokens()).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_those_of_the_dense_weight(bias: bool) -> None:
    layer = stirred(one_layer(bias=bias))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    ours = (layer(x), layer.lora_B.grad, layer.lora_magnitude.grad)
    weight = layer.base_weight()
    magnitude = layer.lora_magnitude.detach().clone().requires_grad_()
    b = layer.lora_B.detach().clone().requires_grad_()
    dense = torch.diag(magnitude / weight.norm(dim=1)) @ weight + b @ layer.lora_A
    result = nn.functional.linear(x, dense, layer.base_layer.bias)  # type: ignore[arg-type]
    result.square().sum().backward()
    for mine, theirs in zip(ours, (result, b.grad, magnitude.grad), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_only_b_and_magnitude_of_every_layer_train(build: Any) -> None:
    base = build()
    linears = [n for n, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    model = attach_adapter(base, dataclasses.replace(LINEAR, train_embeddings=False, train_norms=False), 0)
    wanted = sorted(f"{name}.{kind}" for name in linears for kind in ("lora_B", "lora_magnitude"))
    assert [name for name, _ in FlatVector(model).entries] == wanted


def test_the_head_stays_tied() -> None:
    base = llama()
    flat = FlatVector(attach_adapter(base, LINEAR, 0))
    flat.values.add_(1.0)
    assert base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()


def test_the_mean_of_the_vectors_is_the_mean_of_the_weights() -> None:
    model = assemble(Recipe(model=TINY, adapter=LINEAR), None, 128, "cpu")
    layers, base = adapted_layers(model.module), base_tensors(model.module)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(5, model.flat.size, generator=generator)
    vectors = (model.flat.values.detach() + noise).double()
    members = [model.flat.to_named(vector) for vector in vectors]
    averaged = model.flat.to_named(vectors.mean(dim=0))
    assert len(layers) == 14
    for layer in layers:
        weight = base[layer.weight_name]
        oracle = torch.stack([layer.weight(weight, member) for member in members]).mean(dim=0)
        torch.testing.assert_close(layer.weight(weight, averaged), oracle, rtol=0, atol=1e-14)


def test_the_seed_the_epoch_and_the_layer_decide_a_and_nothing_else_does() -> None:
    first = frozen_a(0, 0, "q", 4, 32, 2.0)
    assert torch.equal(first.sign(), signs("linear-a\n0\n0\nq", (4, 32)))  # docs/protocol.md
    torch.rand(3)
    assert torch.equal(frozen_a(0, 0, "q", 4, 32, 2.0), first)
    for other in (frozen_a(1, 0, "q", 4, 32, 2.0), frozen_a(0, 2, "q", 4, 32, 2.0), frozen_a(0, 0, "k", 4, 32, 2.0)):
        assert not torch.equal(other, first)
    # The variance of s A in plain DoRA, whose A is uniform on +-1/sqrt(in).
    assert first.square().mean().item() == pytest.approx(2.0**2 / (3 * 32))


def test_a_row_of_zeros_in_the_base_gives_no_nan() -> None:
    layer = one_layer()
    with torch.no_grad():
        layer.base_layer.weight[0] = 0  # type: ignore[index, operator]
        layer.reset_(layer.lora_A.clone())
    stirred(layer)
    loss = layer(torch.ones(1, 6)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert layer.lora_magnitude.grad is not None
    assert torch.isfinite(layer.lora_magnitude.grad).all()


def test_autocast_to_bf16_runs_and_is_near_fp32() -> None:
    layer = stirred(one_layer())
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    torch.testing.assert_close(found.float(), layer(x), rtol=0.05, atol=0.05)
