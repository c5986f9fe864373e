"""An optimizer as it is before its first step, with its state in place."""

from __future__ import annotations

import math

import torch


def with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """``optimizer`` with its state in place, as it is before the first step.

    hivemind would make it by a step with zero gradients, which decays the weights and counts as the first.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    values = [(weight.detach().clone(), weight.grad) for weight in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    with torch.no_grad():
        for weight, (value, grad) in zip(weights, values, strict=True):
            weight.copy_(value)
            weight.grad = grad
    for state in optimizer.state.values():
        if isinstance(step := state.get("step"), torch.Tensor):
            step.zero_()
        elif isinstance(step, int | float) and not math.isnan(step):
            state["step"] = type(step)(0)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # a schedule may catch up with the swarm before the first step
    return optimizer
