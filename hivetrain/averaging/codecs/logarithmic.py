"""log8 and log4: values that are never negative, on even levels of their logarithm. For AdamW's second moments.

They span twenty octaves and more, and AdamW divides by their root: a small one that became 0 would make a huge step.
Even levels of the values, or of their roots, keep the large ones well and lose the small ones by octaves; here each is
off by at most a level of its block's own range, and only 0 becomes 0. What lies further below the block's largest
than the codec reaches is lifted to that reach: AdamW then steps too little there, never too far.

The logarithm is the float's own bits, read as an integer: exponent, then mantissa. That is log2 within 0.09, and no
library's `log` decides a bit. A chunk is its blocks' least bits and their largest, rounded outwards to their upper
halves, then the codes: 0 is 0, code c lies c - 1 levels above the least.

Shapes: C = chunks, S = blocks in a chunk, B = values in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hivetrain.averaging.codecs.chunked import (
    INFINITE,
    Chunked,
    fill,
    pack,
    packed_size,
    read_words,
    require_words,
    unpack,
    word_bytes,
)
from hivetrain.averaging.codecs.rounding import dither
from hivetrain.errors import Fault, PeerFault

_LARGEST_INT = 2**31 - 1


class Logarithmic(Chunked):
    """2^bits - 1 levels between a block's least value above 0 and its largest, at most ``octaves`` apart."""

    def __init__(self, name: str, *, bits: int, octaves: int, block: int = 128) -> None:
        super().__init__(name)
        self._reach = octaves << 7  # an octave of floats is 2^7 words
        self._bits = bits
        self._block = block
        self._top = float(2**bits - 2)  # levels above the least

    def _chunk_size(self, num_elements: int) -> int:
        return 4 * -(-num_elements // self._block) + packed_size(num_elements, self._bits, self._block)

    def _encode_rows(self, rows: Tensor, num_elements: int, seed: int) -> Tensor:
        blocks = rows.view(rows.shape[0], -1, self._block)
        bits = blocks.view(torch.int32) & _LARGEST_INT  # -0 is 0
        if bool((bits >= INFINITE << 16).any()):
            raise ValueError(f"{self.name} encodes finite values only")
        if bool((blocks < 0).any()):
            raise ValueError(f"{self.name} encodes values >= 0 only")
        largest = bits.amax(dim=-1)
        least = torch.where(bits > 0, bits, _LARGEST_INT).amin(dim=-1).minimum(largest)
        high = ((largest + 0xFFFF) >> 16).clamp_(max=INFINITE - 1)
        # At least 1: code 1 must not stand for 0, whatever the block holds.
        low = (least >> 16).maximum(high - self._reach).clamp_(min=1).minimum(high)
        span = ((high - low) << 16).to(torch.float32)
        per_bit = torch.where(span > 0, torch.full_like(span, self._top) / span, 0.0)
        levels = (bits - (low << 16)[..., None]).to(torch.float32)
        levels *= per_bit[..., None]
        levels += dither(seed, rows.shape[0], rows.device).view_as(levels)
        codes = levels.clamp_(0.0, self._top).to(torch.uint8) + 1
        codes *= bits > 0
        num_blocks = -(-num_elements // self._block)
        packed = pack(codes, self._bits)[:, : packed_size(num_elements, self._bits, self._block)]
        return torch.cat((word_bytes(low[:, :num_blocks]), word_bytes(high[:, :num_blocks]), packed), dim=1)

    def _decode_rows(self, data: Tensor, num_elements: int) -> Tensor:
        num_blocks = -(-num_elements // self._block)
        low, high = read_words(data[:, : 2 * num_blocks]), read_words(data[:, 2 * num_blocks : 4 * num_blocks])
        require_words(high, INFINITE - 1, f"bounds in {self.name}")
        if bool((low > high).any()):
            raise PeerFault(Fault.MALFORMED, f"a block in {self.name} has its least value above its largest")
        packed = fill(data[:, 4 * num_blocks :], num_elements, self._bits, self._block)
        codes = unpack(packed, self._bits, self._block)
        per_level = ((high - low) << 16).to(torch.float32) * (1.0 / self._top)
        steps = (codes.to(torch.float32) - 1.0) * per_level[..., None]
        bits = steps.to(torch.int32) + (low << 16)[..., None]
        bits *= codes > 0
        return bits.view(torch.float32).flatten(1)
