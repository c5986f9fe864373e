"""Whether gradients can be stepped with: one value that is none would be everyone's."""

from __future__ import annotations

import torch


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no value is infinite or NaN.

    A sum is finite only where all its values are, and takes a fortieth of the time; large ones may overflow it.
    """
    sums = [tensor.sum() for tensor in tensors]
    if all(bool(torch.isfinite(total)) for total in sums):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
