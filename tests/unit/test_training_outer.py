"""The outer step against hand arithmetic, bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from hivetrain.errors import SchemaMismatch
from hivetrain.run import Outer
from hivetrain.training.outer import outer_step, pseudo_gradient
from hivetrain.training.state import State


def state(momentum: Tensor | None = None) -> State:
    return State(
        epoch=2,
        step=100,
        vector=torch.tensor([1.0, 2.0, 3.0]),
        exp_avg=torch.zeros(3),
        exp_avg_sq=torch.zeros(3),
        outer_momentum=momentum,
        base_sha256="b" * 64,
    )


DELTA = torch.tensor([0.5, -1.0, 0.25])
MEAN_EXP_AVG = torch.tensor([1.0, -1.0, 0.5])
MEAN_EXP_AVG_SQ = torch.tensor([0.1, 0.2, 0.3])


def test_the_pseudo_gradient_points_from_the_end_to_the_start() -> None:
    assert pseudo_gradient(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])).tolist() == [2, -1]


def test_averaging_at_rate_one_lands_on_the_mean_of_the_members() -> None:
    after = outer_step(state(), DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ, Outer(), 50)
    assert after.vector.tolist() == [0.5, 3.0, 2.75]
    assert (after.epoch, after.step, after.outer_momentum) == (3, 150, None)
    assert torch.equal(after.exp_avg, MEAN_EXP_AVG)
    assert torch.equal(after.exp_avg_sq, MEAN_EXP_AVG_SQ)


def test_the_rate_scales_the_step() -> None:
    after = outer_step(state(), DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ, Outer(lr=0.5), 50)
    assert after.vector.tolist() == [0.75, 2.5, 2.875]


def test_nesterov_keeps_a_buffer_and_looks_ahead() -> None:
    outer = Outer(kind="nesterov", lr=0.5, momentum=0.5)
    first = outer_step(state(), DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ, outer, 50)
    assert first.outer_momentum is not None
    assert first.outer_momentum.tolist() == [0.5, -1.0, 0.25]
    assert first.vector.tolist() == [1 - 0.375, 2 + 0.75, 3 - 0.1875]
    second = outer_step(first, DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ, outer, 50)
    assert second.outer_momentum is not None
    assert second.outer_momentum.tolist() == [0.75, -1.5, 0.375]
    assert second.vector.tolist() == [0.625 - 0.4375, 2.75 + 0.875, 2.8125 - 0.21875]


def test_every_product_is_rounded_before_it_is_added() -> None:
    """A fused multiply-add would give other bits; numpy rounds each float32 operation on its own."""
    generator = torch.Generator().manual_seed(0)
    vector, delta, momentum = (torch.randn(4099, generator=generator) for _ in range(3))
    before = State(
        epoch=0,
        step=0,
        vector=vector,
        exp_avg=torch.zeros(4099),
        exp_avg_sq=torch.zeros(4099),
        outer_momentum=momentum,
        base_sha256="b" * 64,
    )
    outer = Outer(kind="nesterov", lr=0.7, momentum=0.9)
    after = outer_step(before, delta, torch.zeros(4099), torch.zeros(4099), outer, 1)
    lr, mu = np.float32(0.7), np.float32(0.9)
    expected_momentum = momentum.numpy() * mu + delta.numpy()
    expected = vector.numpy() - (expected_momentum * mu + delta.numpy()) * lr
    assert np.array_equal(after.vector.numpy(), expected)


def test_the_state_before_is_not_written_to() -> None:
    before = state(torch.ones(3))
    outer_step(before, DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ, Outer(kind="nesterov", momentum=0.9), 50)
    assert before.vector.tolist() == [1, 2, 3]
    assert before.outer_momentum is not None
    assert before.outer_momentum.tolist() == [1, 1, 1]


def test_first_moments_that_are_not_sent_start_the_next_round_at_zero() -> None:
    before = dataclasses.replace(state(), exp_avg=torch.ones(3))
    after = outer_step(before, DELTA, None, MEAN_EXP_AVG_SQ, Outer(), 50)
    assert after.exp_avg.dtype is torch.float32
    assert after.exp_avg.tolist() == [0, 0, 0]
    assert before.exp_avg.tolist() == [1, 1, 1]
    assert after.vector.tolist() == [0.5, 3.0, 2.75]


def test_a_negative_second_moment_counts_as_zero() -> None:
    after = outer_step(state(), DELTA, MEAN_EXP_AVG, torch.tensor([-1e-9, 0.2, 0.3]), Outer(), 50)
    assert after.exp_avg_sq[0] == 0


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(3, dtype=torch.float64)])
def test_a_mean_of_another_shape_or_dtype_is_refused(place: int, wrong: Tensor) -> None:
    means = [DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ]
    means[place] = wrong
    with pytest.raises(SchemaMismatch, match=r"must be float32 \[3\]"):
        outer_step(state(), means[0], means[1], means[2], Outer(), 50)


def test_a_round_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="inner_steps"):
        outer_step(state(), DELTA, MEAN_EXP_AVG, MEAN_EXP_AVG_SQ, Outer(), 0)
