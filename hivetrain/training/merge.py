"""Merge and restart: the adapter's product goes into the base, and a fresh adapter starts on it.

Low rank is a ceiling; merges add rank up (ReLoRA, https://arxiv.org/abs/2307.05695). The model's outputs stay what
they were, the moments of the new parameters start at zero, and the rate warms up again (`learning_rate`).

The merge is elementwise arithmetic in a fixed order (`hivetrain.model.weights`), so every member computes the same
base to the bit. The state's hash covers it through ``base_sha256``: members sign a merged state as they sign any
other, and whoever downloads the base checks it against that hash. Nobody has to be believed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hivetrain.model.vector import Entry, join, split
from hivetrain.model.weights import AdaptedLayer, tensors_sha256
from hivetrain.training.state import State


def merge_into_base(
    state: State,
    base: Mapping[str, Tensor],
    layers: Sequence[AdaptedLayer],
    entries: tuple[Entry, ...],
    seed: int,
) -> State:
    """Merge the state's adapters and start fresh ones; nothing that is passed in is written to.

    Args:
        state: of the epoch at which the merge is due, after its outer step.
        base: the tensors that it belongs to, as `base_tensors` gives them; those in the vector are not read.
        layers: as `adapted_layers` gives them.
        entries: names and shapes of the vector.
        seed: the recipe's `model.seed`; with the epoch it draws the new A's.

    Returns:
        the same epoch and step with fresh adapters, and in `State.base` a whole model: trained embeddings and norms
        are in it as they are in the vector.
    """
    trained = split(state.vector, entries)
    merged = {name: trained.get(name, tensor).detach().cpu().clone() for name, tensor in base.items()}
    fresh = dict(trained)
    for layer in layers:
        weight = layer.weight(layer.oriented(base[layer.weight_name].detach().cpu()), trained).float()
        merged[layer.weight_name] = layer.oriented(weight).contiguous()
        fresh.update(layer.fresh(weight, seed, state.epoch))
    restarted = {name for layer in layers for name in layer.trained_names()}

    def without_adapters(vector: Tensor) -> Tensor:
        named = split(vector, entries)
        return join({n: torch.zeros_like(t) if n in restarted else t for n, t in named.items()}, entries)

    momentum = state.outer_momentum
    return dataclasses.replace(
        state,
        vector=join(fresh, entries),
        exp_avg=without_adapters(state.exp_avg),
        exp_avg_sq=without_adapters(state.exp_avg_sq),
        outer_momentum=None if momentum is None else without_adapters(momentum),
        base_sha256=tensors_sha256(merged),
        base=merged,
    )
