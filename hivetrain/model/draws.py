"""Random matrices that every machine draws alike, bit for bit.

torch's generators promise nothing across versions and processors. What is never published, such as the frozen A of
the linear form, must still be the same everywhere: it is SHAKE-256 output, turned into floats by exact operations.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def signs(label: str, shape: tuple[int, int]) -> Tensor:
    """A float32 matrix of ``shape`` whose entries are -1 or 1, drawn by ``label`` alone."""
    count = shape[0] * shape[1]
    bits = np.unpackbits(np.frombuffer(_stream(label, -(-count // 8)), np.uint8), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(shape)


def uniform(label: str, shape: tuple[int, int], bound: float) -> Tensor:
    """A float32 matrix of ``shape``, uniform on [-bound, bound), drawn by ``label`` alone."""
    words = np.frombuffer(_stream(label, 4 * shape[0] * shape[1]), "<u4")
    # 24 bits: exact in float32, as is the way to [-1, 1); only the product with `bound` rounds.
    unit = (words >> 8).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy(unit * np.float32(bound)).view(shape)


def _stream(label: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(f"hivetrain-draw/1\n{label}".encode()).digest(num_bytes)
