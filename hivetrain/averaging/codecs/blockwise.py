"""int8, int4, int2 and sign: blocks of values as a scale and a few bits each.

A chunk is its blocks' scales, then their codes. Scales are bf16, which has the whole range of float32, and whose
eight bits of precision widen a level by less than one percent. A block whose largest value (or mean) is below 2^-100
has scale 0 and decodes to zeros, so that no bit hangs on how a processor treats denormal numbers.

Shapes: C = chunks, S = blocks in a chunk, B = values in a block.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.codecs.chunked import (
    Chunked,
    as_float,
    fill,
    pack,
    packed_size,
    read_words,
    require_words,
    unpack,
    upper_word,
    word_bytes,
)
from hivetrain.averaging.codecs.rounding import dither
from hivetrain.run import CHUNK_ELEMENTS

_TINY = 2.0**-100
_FLOAT_MAX = float(np.finfo(np.float32).max)


class _Scaled(Chunked):
    """A scale per block, and codes of ``bits`` bits. ``reach``: no code stands for more than that many scales."""

    def __init__(self, name: str, *, bits: int, block: int, reach: float) -> None:
        super().__init__(name)
        self._bits = bits
        self._block = block
        self._limit = upper_word(_FLOAT_MAX / reach)  # whatever the codes, values are finite

    @abstractmethod
    def _quantise(self, blocks: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Scales (int32 words, [C, S]) and codes (uint8, [C, S, B]), where ``counts`` [S] values of the blocks count.

        Raises:
            ValueError: a value is not finite.
        """

    @abstractmethod
    def _levels(self, codes: Tensor) -> Tensor:
        """What codes (uint8) stand for, in scales: float32."""

    def _chunk_size(self, num_elements: int) -> int:
        return 2 * -(-num_elements // self._block) + packed_size(num_elements, self._bits, self._block)

    def _encode_rows(self, rows: Tensor, num_elements: int, seed: int) -> Tensor:
        blocks = rows.view(rows.shape[0], -1, self._block)
        starts = torch.arange(0, CHUNK_ELEMENTS, self._block, device=rows.device)
        counts = (num_elements - starts).clamp(1, self._block)
        words, codes = self._quantise(blocks, counts, seed)
        codes.view(rows.shape[0], -1)[:, num_elements:] = 0
        num_blocks = -(-num_elements // self._block)
        packed = pack(codes, self._bits)[:, : packed_size(num_elements, self._bits, self._block)]
        return torch.cat((word_bytes(words[:, :num_blocks]), packed), dim=1)

    def _decode_rows(self, data: Tensor, num_elements: int) -> Tensor:
        num_blocks = -(-num_elements // self._block)
        words = read_words(data[:, : 2 * num_blocks])
        require_words(words, self._limit, f"scales in {self.name}")
        packed = fill(data[:, 2 * num_blocks :], num_elements, self._bits, self._block)
        levels = self._levels(unpack(packed, self._bits, self._block))
        return levels.mul_(as_float(words)[..., None]).flatten(1)

    def _require_finite(self, reduced: Tensor) -> None:
        if not bool(torch.isfinite(reduced).all()):
            raise ValueError(f"{self.name} encodes finite values only")


class TopScaled(_Scaled):
    """Even levels from -top to top, zero among them, top being the block's largest magnitude; stochastic rounding."""

    def __init__(self, name: str, *, bits: int, block: int = 64) -> None:
        self._zero = 2 ** (bits - 1)  # the code that stands for 0; code 0 is never written
        super().__init__(name, bits=bits, block=block, reach=float(self._zero))

    def _quantise(self, blocks: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        top = blocks.abs().amax(dim=-1)
        self._require_finite(top)
        most = self._zero - 1
        # By products, not quotients: CUDA divides by a constant through its rounded inverse.
        words = ((top * (1.0 / most)).view(torch.int32) + 0xFFFF) >> 16  # upwards: top stays within the levels
        words = torch.where(top < _TINY, 0, words.clamp_(max=self._limit))
        scales = as_float(words)
        inverse = torch.where(words > 0, torch.ones_like(scales) / scales, 0.0)
        levels = blocks * inverse[..., None]
        levels += dither(seed, blocks.shape[0], blocks.device).view_as(blocks)
        levels += self._zero
        # All are positive now, where to truncate is to round down.
        return words, levels.clamp_(1.0, 2 * self._zero - 0.5).to(torch.uint8)

    def _levels(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32).sub_(self._zero)


class MeanScaled(_Scaled):
    """Odd multiples of a scale that is a share of the block's mean magnitude, rounded to the nearest.

    One bit: ± the mean. Two bits: ±2/3 and ±2 means, close to the best even levels for normal values (±0.5 and ±1.5
    standard deviations; J. Max, 1960), with room for heavier tails. Larger values are cut: error feedback carries them.
    Where the largest is below two means it is the outer level, so that no value is decoded past its block's largest.
    """

    def __init__(self, name: str, *, bits: int, block: int = 256) -> None:
        self._half = 2 ** (bits - 1)  # codes for positive values; the largest stands for 2 * half - 1 scales
        super().__init__(name, bits=bits, block=block, reach=2.0 * self._half - 1)

    def _quantise(self, blocks: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        mean = self._mean_magnitude(blocks, counts)
        scale = mean
        if self._half > 1:
            scale = (mean * (2.0 / 3.0)).minimum(blocks.abs().amax(dim=-1) * (1.0 / 3.0))
        words = ((scale.view(torch.int32) + 0x8000) >> 16).clamp_(max=self._limit)
        words = torch.where(mean < _TINY, 0, words)
        if self._half == 1:
            return words, (blocks < 0).to(torch.uint8)
        scales = as_float(words)
        inverse = torch.where(words > 0, torch.full_like(scales, 0.5) / scales, 0.0)
        levels = blocks * inverse[..., None]
        levels += self._half
        return words, levels.clamp_(0.0, 2 * self._half - 0.5).to(torch.uint8)

    def _mean_magnitude(self, blocks: Tensor, counts: Tensor) -> Tensor:
        """Mean of |x| over the first ``counts`` values of each block, the rest of which are 0: [C, S]."""
        # Halves are added to halves, so that the order of the additions is the same everywhere; scaled first, so that
        # a sum of finite values is finite.
        total = blocks.abs() * (1.0 / self._block)
        while total.shape[-1] > 1:
            half = total.shape[-1] // 2
            total = total[..., :half] + total[..., half:]
        total = total.squeeze(-1)
        self._require_finite(total)
        counts = counts.to(torch.float32)
        return (total * (torch.full_like(counts, self._block) / counts)).clamp(max=_FLOAT_MAX)

    def _levels(self, codes: Tensor) -> Tensor:
        if self._half == 1:
            return codes.to(torch.float32).mul_(-2.0).add_(1.0)
        return codes.to(torch.float32).mul_(2.0).sub_(2.0 * self._half - 1)
