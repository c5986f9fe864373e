"""`max_grad_norm` in a swarm: the gradient that is clipped is the one that is stepped with, the mean of all peers.

A Trainer clips before the optimizer's step, which in a swarm only adds up: each small batch would be clipped alone, and
the mean of clipped gradients is another one than one process with the same batch has.
"""

from __future__ import annotations

import torch

WITHOUT_FLOAT64 = ("mps",)


def clipped(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.optim.Optimizer:
    """``optimizer``, which from now on clips its gradients to ``max_norm`` in all before each step; 0: it does not."""
    if max_norm > 0:
        optimizer.register_step_pre_hook(lambda stepped, args, kwargs: clip_(stepped, max_norm))
    return optimizer


@torch.no_grad()
def clip_(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Scale the gradients to a common 2-norm of at most ``max_norm``, as `torch.nn.utils.clip_grad_norm_` does.

    Peers with the same gradients have to keep the same bits, however many threads each adds them up with: the sum is in
    float64, and its last bits are gone in the factor. Where a device has no float64, each tensor's is in float32.
    """
    found = [weight.grad for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    squares = sum(_norm(gradient) ** 2 for gradient in found)
    factor = torch.tensor(max_norm / (squares**0.5 + 1e-6), dtype=torch.float32)
    if factor < 1:  # not where a norm is NaN
        for gradient in found:
            gradient.mul_(factor.to(gradient.device))


def _norm(gradient: torch.Tensor) -> float:
    dtype = torch.float32 if gradient.device.type in WITHOUT_FLOAT64 else torch.float64
    return float(torch.linalg.vector_norm(gradient, dtype=dtype))
