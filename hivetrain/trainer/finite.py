"""Whether gradients can be stepped with: one value that is none would be everyone's."""

from __future__ import annotations

import torch


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether no value is infinite or NaN.

    A sum is finite only where all its values are, and takes a fortieth of the time; large ones may overflow it. All
    sums are looked at in one go, for which an accelerator is waited for once.
    """
    if not tensors:
        return True
    sums = [tensor.sum().to(tensors[0].device, torch.float32) for tensor in tensors]
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
