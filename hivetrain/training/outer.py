"""The outer step: from the group's averaged pseudo-gradient to the next state.

Every member computes it for itself and signs the hash of what it gets, so it must give the same bits on every
processor: float32 on the CPU, with multiply and add as separate operations. Fused forms (``alpha=``, ``addcmul``)
gave other bits with and without AVX2.

Source of the Nesterov form: DiLoCo, https://arxiv.org/abs/2311.08105.
Shapes: P = trainable parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hivetrain import run
from hivetrain.errors import SchemaMismatch
from hivetrain.training.state import State


def pseudo_gradient(start: Tensor, final: Tensor) -> Tensor:
    """What a miner sends: where the round started minus where the miner ended, [P]."""
    return start - final


def outer_step(
    state: State,
    mean_delta: Tensor,
    mean_exp_avg: Tensor | None,
    mean_exp_avg_sq: Tensor,
    outer: run.Outer,
    inner_steps: int,
) -> State:
    """The next epoch's state; ``state`` is not touched.

    Args:
        state: the round's.
        mean_delta: [P] weighted mean of the members' pseudo-gradients.
        mean_exp_avg: [P] mean of their first moments; None where those are not sent, and the next round starts at zero.
        mean_exp_avg_sq: [P] mean of their second moments; what a lossy codec made negative counts as 0, since a
            square root of it would be NaN.
        outer: the recipe's table.
        inner_steps: by how much the schedule moves on.

    Raises:
        SchemaMismatch: a tensor is not float32 [P] on the CPU.
        ValueError: ``inner_steps`` is not positive.
    """
    if inner_steps <= 0:
        raise ValueError(f"inner_steps must be > 0, got {inner_steps}")
    if mean_exp_avg is None:
        mean_exp_avg = torch.zeros_like(state.vector)
    for name, tensor in (("delta", mean_delta), ("exp_avg", mean_exp_avg), ("exp_avg_sq", mean_exp_avg_sq)):
        if tensor.shape != state.vector.shape or tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
            raise SchemaMismatch(
                f"the mean {name} must be float32 {list(state.vector.shape)} on the cpu, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    direction, momentum = mean_delta, state.outer_momentum
    if outer.kind == "nesterov":
        momentum = torch.zeros_like(mean_delta) if momentum is None else momentum
        momentum = momentum * outer.momentum + mean_delta
        direction = momentum * outer.momentum + mean_delta
    return State(
        epoch=state.epoch + 1,
        step=state.step + inner_steps,
        vector=state.vector - direction * outer.lr,
        exp_avg=mean_exp_avg.clone(),
        exp_avg_sq=mean_exp_avg_sq.clamp(min=0.0),
        outer_momentum=momentum,
        base_sha256=state.base_sha256,
    )
