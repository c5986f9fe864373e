"""How a reducer joins the vectors of a block into one, by the name in the plan.

Every mean is a pure function of one block: float32 in the plan's order, each operation on its own (a fused
multiply-add rounds once where two operations round twice, and processors differ in which they use), so that every
member recomputes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""``combine(vectors, weights)``: one vector from at least one, all float32 of one shape [n]; weights are > 0."""


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``(w_0 * x_0 + w_1 * x_1 + ...) / (w_0 + w_1 + ...)`` in the given order: float32, shape [n]."""
    mean = np.multiply(vectors[0].numpy(), np.float32(weights[0]))
    scratch = np.empty_like(mean) if len(vectors) > 1 else mean
    total = np.float32(weights[0])
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        np.multiply(vector.numpy(), np.float32(weight), out=scratch)
        np.add(mean, scratch, out=mean)
        total = np.float32(total + np.float32(weight))
    return torch.from_numpy(np.divide(mean, total, out=mean))


_MEANS: dict[str, Combine] = {
    "mean": weighted_mean,
}
MEAN_NAMES = tuple(_MEANS)


def get_mean(name: str) -> Combine:
    """The function of that name.

    Raises:
        ValueError: there is none; names those that exist.
    """
    if name not in _MEANS:
        raise ValueError(f"mean must be one of {', '.join(_MEANS)}, got {name!r}")
    return _MEANS[name]
