"""Random numbers for stochastic rounding: a hash of seed and place, the same bits on every device and machine.

`torch.Generator` draws other streams on other devices, and in an order: here element ``i`` of a chunk hashes alone.
splitmix64's output number ``seed`` is a chunk's two 32-bit keys; murmur3's finaliser over place and keys gives 32 bits,
which are 16 for each of two elements. Sixteen are enough: rounding is off by at most 2^-16 of a level.

Sources: https://prng.di.unimi.it/splitmix64.c, https://github.com/aappleby/smhasher (MurmurHash3, fmix32).
Shapes: C = chunks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hivetrain.run import CHUNK_ELEMENTS

_HALF = CHUNK_ELEMENTS // 2
_GOLDEN = 0x9E3779B97F4A7C15
_PLACES = torch.from_numpy((np.arange(_HALF, dtype=np.uint32) * np.uint32(_GOLDEN >> 32)).view(np.int32))


def chunk_keys(seed: int, num_chunks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys of each of the chunks ``seed, seed + 1, ...`` (modulo 2^64): int32, shape [C, 1] each."""
    z = (np.uint64(seed % 2**64) + np.arange(num_chunks, dtype=np.uint64)) * np.uint64(_GOLDEN)  # arrays wrap
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    low, high = z.astype(np.uint32).view(np.int32), (z >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return torch.from_numpy(low)[:, None].to(device), torch.from_numpy(high)[:, None].to(device)


def dither(seed: int, num_chunks: int, device: torch.device) -> Tensor:
    """Uniform numbers k / 65536 in [0, 1) for every element of those chunks: float32, shape [C, CHUNK_ELEMENTS]."""
    low, high = chunk_keys(seed, num_chunks, device)
    x = _PLACES.to(device) ^ low  # int32 products wrap; shifts of negatives need the mask
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x85EBCA6B)
    x ^= high
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(0xC2B2AE35)
    x ^= (x >> 16) & 0xFFFF
    uniform = torch.empty((num_chunks, CHUNK_ELEMENTS), dtype=torch.float32, device=device)
    uniform[:, :_HALF] = x & 0xFFFF
    uniform[:, _HALF:] = (x >> 16) & 0xFFFF
    return uniform.mul_(2.0**-16)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
