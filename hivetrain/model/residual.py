"""The residual form: average A, B and m plainly, and fold what that average misses into the base.

The mean of products is not the product of means, so ``W'(mean)`` is off from ``mean_i W'_i``; the difference, the
residual, is a full matrix. Folded into the frozen base it makes the average exact for any A's, and adapters and
optimizer state live on. It needs the factors of all members in one place, and gives a new base that must be
published (`docs/architecture.md`, "Ways of averaging").

DoRA's base lies under its norm, so adding the residual to W would not add it to W'. With ``T = mean_i W'_i`` and
``V = W + s B A`` of the averaged factors, the base becomes ``diag(||V|| / ||T||) T - s B A`` and m becomes ``||T||``:
the direction keeps its row norms, and W' is T.

One layer is in memory at a time: four matrices [out, in] of float64, whatever the number of members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hivetrain.model.vector import Entry, join, split
from hivetrain.model.weights import AdaptedLayer, Form, row_norms


def residual(
    layer: AdaptedLayer,
    base: Tensor,
    members: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    mean: Mapping[str, Tensor],
) -> Tensor:
    """``mean_i(W'_i) - W'(mean)`` of one layer, float32 [out, in].

    Args:
        base: W [out, in].
        members: every member's parameters by name.
        weights: one per member, as in the mean; their sum need not be 1.
        mean: the averaged parameters by name.

    Raises:
        ValueError: no weight, another number of weights than members, or a weight below 0.
    """
    total = sum(weights)
    if len(weights) != len(members) or min(weights, default=0) < 0 or total <= 0:
        raise ValueError(f"{len(members)} members need as many weights >= 0 and one above, got {list(weights)}")
    target = torch.zeros_like(base, dtype=torch.float64)
    for member, weight in zip(members, weights, strict=True):
        if weight > 0:
            target += layer.weight(base, member) * (weight / total)
    return (target - layer.weight(base, mean)).float()


def fold(layer: AdaptedLayer, base: Tensor, mean: Mapping[str, Tensor], missed: Tensor) -> tuple[Tensor, Tensor | None]:
    """A base and a magnitude with which the averaged factors make ``W'(mean) + missed``.

    Args:
        base: W [out, in] that the members trained on.
        mean: the averaged parameters by name.
        missed: what `residual` gave, [out, in].

    Returns:
        float32 [out, in], and m [out], which is None for LoRA.

    Raises:
        ValueError: a layer in the linear form, whose mean misses nothing.
    """
    if layer.form is Form.LINEAR:
        raise ValueError(f"{layer.name} is in the linear form: its plain mean is exact, there is nothing to fold")
    if layer.magnitude_name is None:
        return (base.double() + missed).float(), None
    target, direction = layer.weight(base, mean) + missed, layer.direction(base, mean)
    target_norm, direction_norm = row_norms(target), row_norms(direction)
    # A magnitude that went below 0 turns its row around, and must go on doing so.
    sign = torch.where(mean[layer.magnitude_name] < 0, -1.0, 1.0).double()
    usable = (target_norm > 0) & (direction_norm > 0)
    scale = torch.where(usable, direction_norm / torch.where(usable, target_norm, 1.0), 1.0)
    folded = base + (target * (scale * sign).unsqueeze(1) - direction)
    return folded.float(), (target_norm * sign).float()


def fold_residuals(
    layers: Sequence[AdaptedLayer],
    base: Mapping[str, Tensor],
    members: Sequence[Tensor],
    weights: Sequence[float],
    mean: Tensor,
    entries: tuple[Entry, ...],
) -> tuple[dict[str, Tensor], Tensor]:
    """The residuals of a whole model, folded.

    Args:
        layers: as `adapted_layers` gives them.
        base: the base's tensors by name, as `base_tensors` gives them.
        members: every member's trainable vector [P].
        weights: one per member, as in the mean.
        mean: [P] the averaged vector, after the outer step.
        entries: names and shapes of the vector.

    Returns:
        the base with the adapted layers' weights replaced, and the vector with their magnitudes replaced; nothing
        that was passed in is written to.
    """
    by_name = split(mean, entries)
    named = [split(member, entries) for member in members]
    new_base, new_vector = dict(base), dict(by_name)
    for layer in layers:
        weight = layer.oriented(base[layer.weight_name])
        folded, magnitude = fold(layer, weight, by_name, residual(layer, weight, named, weights, by_name))
        new_base[layer.weight_name] = layer.oriented(folded).contiguous()
        if layer.magnitude_name is not None and magnitude is not None:
            new_vector[layer.magnitude_name] = magnitude
    return new_base, join(new_vector, entries)
