"""The inner loop against torch's own AdamW on separate parameters, and its bookkeeping."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hivetrain.errors import SchemaMismatch
from hivetrain.model import Assembled, assemble
from hivetrain.run import Data, Inner, Model, Recipe
from hivetrain.training import (
    InnerLoop,
    State,
    StepReport,
    TrainingDiverged,
    at_snapshot,
    genesis_state,
    learning_rate,
)

RECIPE = Recipe(
    model=Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128),
    data=Data(seq_len=16, batch_size=2),
    inner=Inner(max_steps=7, lr=1e-2, warmup_steps=3, total_steps=20, snapshot_every=3, weight_decay=0.1),
)


def build(recipe: Recipe = RECIPE) -> tuple[Assembled, State]:
    model = assemble(recipe, None, 128, "cpu")
    return model, genesis_state(model.flat, model.base_sha256)


def batches(step: int) -> Tensor:
    return torch.randint(0, 128, (1, 4, 16), generator=torch.Generator().manual_seed(step))


def with_inner(**fields: Any) -> Recipe:
    return dataclasses.replace(RECIPE, inner=dataclasses.replace(RECIPE.inner, **fields))


def reference(num_steps: int, first_global_step: int = 0) -> tuple[list[float], Tensor]:
    """The same training by the plainest loop that torch allows."""
    model, _ = build()
    named = sorted((n, p) for n, p in model.module.named_parameters() if p.requires_grad)
    for _, p in named:
        p.data, p.grad = p.data.clone(), None
    parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW(
        parameters, betas=(RECIPE.inner.beta1, RECIPE.inner.beta2), eps=1e-8, weight_decay=0.1, foreach=False
    )
    losses = []
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(first_global_step + step, RECIPE.inner)
        ids = batches(step)[0]
        loss = model.module(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().reshape(-1) for p in parameters])


def test_the_rate_warms_up_then_follows_a_cosine_to_its_floor() -> None:
    inner = Inner(lr=1.0, final_lr_ratio=0.1, warmup_steps=4, total_steps=14)
    assert [learning_rate(step, inner) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(9, inner) == pytest.approx(0.55)
    assert learning_rate(14, inner) == pytest.approx(0.1)
    assert learning_rate(10_000, inner) == pytest.approx(0.1)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert learning_rate(0, Inner(lr=0.5, warmup_steps=0)) == 0.5


def test_the_flat_loop_trains_like_separate_parameters_do() -> None:
    losses, vector = reference(6)
    model, state = build()
    work = InnerLoop(model.module, model.flat, RECIPE, "cpu").run(state, batches, num_steps=6)
    assert work.losses == pytest.approx(losses, rel=1e-5)
    displacement = torch.linalg.vector_norm(vector - state.vector)
    assert torch.linalg.vector_norm(work.vector - vector) / displacement < 1e-4


def test_two_rounds_are_one_long_one_when_the_moments_are_published() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    whole = loop.run(state, batches, num_steps=7)
    first = loop.run(state, batches, num_steps=4)
    published = dataclasses.replace(
        state, epoch=1, step=4, vector=first.vector, exp_avg=first.exp_avg, exp_avg_sq=first.exp_avg_sq
    )
    second = loop.run(published, lambda step: batches(step + 4), num_steps=3)
    assert torch.equal(second.vector, whole.vector)
    assert torch.equal(second.exp_avg_sq, whole.exp_avg_sq)
    assert first.losses + second.losses == whole.losses


def test_a_later_window_continues_from_its_snapshot() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    whole = loop.run(state, batches, num_steps=7)
    window = loop.run(at_snapshot(state, whole.snapshots[0]), batches, first_step=3, num_steps=3)
    assert torch.equal(window.vector, whole.snapshots[1].vector)
    assert [s.step for s in window.snapshots] == [6]


def test_the_same_inputs_give_the_same_bits_whatever_the_model_held() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    first = loop.run(state, batches, num_steps=4)
    model.flat.values.fill_(3.0)
    model.flat.grad.fill_(5.0)
    again = loop.run(state, batches, num_steps=4)
    assert torch.equal(first.vector, again.vector)
    assert first.losses == again.losses


def test_the_state_is_not_written_to() -> None:
    model, state = build()
    before = [t.clone() for t in (state.vector, state.exp_avg, state.exp_avg_sq)]
    InnerLoop(model.module, model.flat, RECIPE, "cpu").run(state, batches, num_steps=3)
    for now, then in zip((state.vector, state.exp_avg, state.exp_avg_sq), before, strict=True):
        assert torch.equal(now, then)


def test_snapshots_lie_every_k_steps_and_at_the_end() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    work = loop.run(state, batches, num_steps=7)
    assert [s.step for s in work.snapshots] == [3, 6, 7]
    assert work.snapshots[-1].vector is work.vector
    assert not torch.equal(work.snapshots[0].vector, work.snapshots[1].vector)
    assert [s.step for s in loop.run(state, batches, num_steps=6).snapshots] == [3, 6]


def test_the_counts_are_of_what_was_trained_on() -> None:
    model, state = build()
    work = InnerLoop(model.module, model.flat, RECIPE, "cpu").run(state, batches, num_steps=5)
    assert (work.num_steps, work.num_samples, work.num_tokens) == (5, 20, 320)
    assert 0 < work.compute_seconds <= work.seconds


def test_a_stop_ends_the_round_after_the_step_in_hand() -> None:
    model, state = build()
    reports: list[StepReport] = []
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    work = loop.run(state, batches, num_steps=7, should_stop=lambda: len(reports) == 4, on_step=reports.append)
    assert work.num_steps == 4
    assert [s.step for s in work.snapshots] == [3, 4]
    assert [r.step for r in reports] == [0, 1, 2, 3]
    assert tuple(r.loss for r in reports) == work.losses
    assert [r.lr for r in reports] == [learning_rate(i, RECIPE.inner) for i in range(4)]


def test_a_round_stopped_before_its_first_step_is_the_state() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    work = loop.run(state, batches, num_steps=7, should_stop=lambda: True)
    assert (work.num_steps, work.losses, work.snapshots) == (0, (), ())
    assert torch.equal(work.vector, state.vector)


def test_accumulated_micro_batches_train_like_one_batch() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    whole = loop.run(state, batches, num_steps=4)
    parts = loop.run(state, lambda step: batches(step).view(2, 2, 16), num_steps=4)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.num_samples == whole.num_samples
    error = torch.linalg.vector_norm(parts.vector - whole.vector) / torch.linalg.vector_norm(
        whole.vector - state.vector
    )
    assert error < 1e-4


def test_bf16_autocast_keeps_float32_state_and_stays_near_fp32() -> None:
    model, state = build()
    exact = InnerLoop(model.module, model.flat, RECIPE, "cpu").run(state, batches, num_steps=6)
    mixed = InnerLoop(model.module, model.flat, with_inner(precision="bf16"), "cpu").run(state, batches, num_steps=6)
    assert mixed.vector.dtype is torch.float32
    assert mixed.losses != exact.losses
    assert mixed.losses == pytest.approx(exact.losses, rel=5e-3)


def test_the_gradient_is_clipped_to_the_recipes_norm() -> None:
    model, state = build()
    reports: list[StepReport] = []
    loop = InnerLoop(model.module, model.flat, with_inner(clip_norm=0.01), "cpu")
    loop.run(state, batches, num_steps=1, on_step=reports.append)
    assert reports[0].grad_norm > 0.01
    assert torch.linalg.vector_norm(model.flat.grad).item() == pytest.approx(0.01, rel=1e-3)


def test_a_poisoned_state_is_told_as_divergence() -> None:
    model, state = build()
    vector = state.vector.clone()
    vector[0] = math.nan
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    with pytest.raises(TrainingDiverged, match="inner step 0"):
        loop.run(dataclasses.replace(state, vector=vector), batches, num_steps=2)


def test_a_poisoned_moment_is_told_even_at_the_last_step() -> None:
    model, state = build()
    exp_avg_sq = torch.full_like(state.exp_avg_sq, -1.0)
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    with pytest.raises(TrainingDiverged, match="not finite after inner step 0"):
        loop.run(dataclasses.replace(state, exp_avg_sq=exp_avg_sq), batches, num_steps=1)


def test_a_state_of_another_size_is_refused() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    with pytest.raises(SchemaMismatch):
        loop.run(dataclasses.replace(state, vector=state.vector[:-1]), batches, num_steps=1)
    with pytest.raises(SchemaMismatch, match="exp_avg_sq"):
        loop.run(dataclasses.replace(state, exp_avg_sq=state.exp_avg_sq[:-1]), batches, num_steps=1)


def test_a_batch_without_the_accumulation_axis_is_refused() -> None:
    model, state = build()
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    with pytest.raises(ValueError, match=r"\[accumulation, batch, seq\]"):
        loop.run(state, lambda step: batches(step)[0], num_steps=1)
