"""Held-out loss of a vector: the run's yardstick, the same in every node."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hivetrain.model.vector import FlatVector


@torch.no_grad()
def heldout_loss(
    model: nn.Module, flat: FlatVector, vector: Tensor, batches: Tensor, device: torch.device | str
) -> float:
    """Mean loss of ``vector`` [P] over ``batches`` [num_batches, batch, seq], in nats per token, in float32.

    The model holds what it held before when this returns or raises. A vector that makes the loss overflow gives
    NaN or infinity: the caller's gate refuses it.
    """
    if batches.ndim != 3 or not batches.numel():
        raise ValueError(f"held-out batches must be [num_batches, batch, seq], got {list(batches.shape)}")
    before = flat.values.clone()
    flat.load_(vector)
    try:
        losses = torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches.to(device)])
    finally:
        flat.load_(before)
    return float(losses.double().mean())
