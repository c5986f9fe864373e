"""Means of a group, by name: the plain one, and those that a few bad members cannot carry away.

Where replay verifies every contribution, the plain mean is enough. These are for groups without verification, or so
small that one unverified member weighs much. They see one block of a part at a time, which holds values of one
section, and they answer without asking the other reducers: nothing travels that would not travel anyway. So a "norm"
here is a block's, and a bad member is bounded block by block.

Members audit each other's means byte for byte, so every function is the same to the bit on every machine and for any
number of threads. Elementwise float32 operations round alike everywhere as long as each is an operation of its own (a
fused multiply-add rounds once where two operations round twice). A sum of squares is the one reduction: the square of
a float32 is exact in float64, and the squares are added by halving, ``s[:h] += s[h:]``, an order that no library
chooses. Places in an order are counted by comparing pairs; equal values rank in the plan's order.

Every one of them takes the group's weights (receipted samples, from the plan). Weights count among the values that
are kept; who is kept is a matter of values alone, each member one voice. With one or two members nothing can be told
apart, and only `norm_bound` still differs from the mean.

Sources: trimmed mean and median per coordinate, https://arxiv.org/abs/1803.01498; centred clipping,
https://arxiv.org/abs/2012.10333.
Shapes: n = members, B = values of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""``combine(vectors, weights)``: n >= 1 finite float32 vectors [B] and their weights > 0 to one new vector [B]."""

CLIP_ITERATIONS = 3

_Array = npt.NDArray[np.float32]


def weighted_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``(w_0 * x_0 + w_1 * x_1 + ...) / (w_0 + w_1 + ...)`` in the given order: float32, the shape of each vector.

    Weights that are all equal count as 1: the values are added as they are.
    """
    return torch.from_numpy(_weighted_mean([vector.numpy() for vector in vectors], weights))


def norm_bound(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean after every vector longer than the median is scaled down to it.

    Of two middle norms the smaller counts, so that of two members the longer is bound to the shorter. It stops who
    shouts; it does not stop who points the wrong way.
    """
    return torch.from_numpy(_bounded_mean([vector.numpy() for vector in vectors], weights))


def trimmed_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Per coordinate: the weighted mean without the quarter (rounded up) of the members at either end.

    It withstands as many bad members as it drops: 1 of 3 or 4, 2 of 5 to 8, 3 of 9 to 12.
    """
    return _middle_mean(vectors, weights, num_trimmed(len(vectors)))


def median(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Per coordinate: the middle value, or the weighted mean of the two middle ones."""
    return _middle_mean(vectors, weights, (len(vectors) - 1) // 2)


def centered_clip(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """From the median, `CLIP_ITERATIONS` times: add the `norm_bound` of the members' distances to it.

    So the radius of the clipping is the median distance to the present centre, and needs no setting.
    """
    arrays = [vector.numpy() for vector in vectors]
    centre = median(vectors, weights).numpy()
    for _ in range(CLIP_ITERATIONS):
        centre = np.add(centre, _bounded_mean([np.subtract(array, centre) for array in arrays], weights))
    return torch.from_numpy(centre)


def num_trimmed(num_members: int) -> int:
    """How many values `trimmed_mean` drops at either end."""
    return min(-(-num_members // 4), (num_members - 1) // 2)


def _weighted_mean(arrays: Sequence[_Array], weights: Sequence[float]) -> _Array:
    if len(set(weights)) == 1:
        return _plain_mean(arrays)
    mean = np.multiply(arrays[0], np.float32(weights[0]))
    scratch = np.empty_like(mean)
    total = np.float32(weights[0])
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        np.multiply(array, np.float32(weight), out=scratch)
        np.add(mean, scratch, out=mean)
        total = np.float32(total + np.float32(weight))
    return np.divide(mean, total, out=mean)


def _plain_mean(arrays: Sequence[_Array]) -> _Array:
    if len(arrays) == 1:
        return arrays[0].copy()
    mean = np.add(arrays[0], arrays[1])
    for array in arrays[2:]:
        np.add(mean, array, out=mean)
    return np.divide(mean, np.float32(len(arrays)), out=mean)


def _bounded_mean(arrays: Sequence[_Array], weights: Sequence[float]) -> _Array:
    norms = [_norm(array) for array in arrays]
    bound = sorted(norms)[(len(norms) - 1) // 2]
    return _weighted_mean([_scaled(array, bound, norm) for array, norm in zip(arrays, norms, strict=True)], weights)


def _middle_mean(vectors: Sequence[Tensor], weights: Sequence[float], trim: int) -> Tensor:
    """The weighted mean per coordinate of the values whose rank is in ``[trim, n - trim)``."""
    arrays = [vector.numpy() for vector in vectors]
    if not trim:
        return torch.from_numpy(_weighted_mean(arrays, weights))
    mean = np.zeros(arrays[0].shape, dtype=np.float32)
    total = np.zeros(arrays[0].shape, dtype=np.float32)
    for array, rank, weight in zip(arrays, _ranks(arrays), weights, strict=True):
        is_kept = (rank >= trim) & (rank < len(arrays) - trim)
        kept = np.multiply(is_kept, np.float32(weight), dtype=np.float32)
        np.add(mean, np.multiply(array, kept), out=mean)
        np.add(total, kept, out=total)
    return torch.from_numpy(np.divide(mean, total, out=mean))


def _ranks(arrays: Sequence[_Array]) -> npt.NDArray[np.int16]:
    """Place of every member's value per coordinate, from 0: int16 [n, B]. Each coordinate's are a permutation."""
    ranks = np.zeros((len(arrays), *arrays[0].shape), dtype=np.int16)
    for i, lower in enumerate(arrays):
        for j in range(i + 1, len(arrays)):
            first = lower <= arrays[j]
            ranks[j] += first
            ranks[i] += ~first
    return ranks


def _scaled(array: _Array, bound: float, norm: float) -> _Array:
    """``array`` shortened to ``bound``; itself, not rounded anew, where it is no longer than that."""
    return array if norm <= bound else np.multiply(array, np.float32(bound / norm))


def _norm(array: _Array) -> float:
    """Euclidean norm in float64, added in an order of our own."""
    sums: npt.NDArray[Any] = np.square(array, dtype=np.float64)
    while len(sums) > 1:
        half = -(-len(sums) // 2)
        rest = sums[half:]
        sums = sums[:half]
        sums[: len(rest)] += rest
    return float(np.sqrt(sums[0]))


_MEANS: dict[str, Combine] = {
    "mean": weighted_mean,
    "norm_bound": norm_bound,
    "trimmed_mean": trimmed_mean,
    "median": median,
    "centered_clip": centered_clip,
}
MEAN_NAMES = tuple(_MEANS)
BLOCKWISE = frozenset({"norm_bound", "centered_clip"})
"""Those in which a value depends on its whole block; in the others on its coordinate alone."""


def get_mean(name: str) -> Combine:
    """The function of that name.

    Raises:
        ValueError: there is none; names those that exist.
    """
    if name not in _MEANS:
        raise ValueError(f"mean must be one of {', '.join(_MEANS)}, got {name!r}")
    return _MEANS[name]
