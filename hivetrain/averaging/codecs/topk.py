"""topk: the largest values of a chunk and their places, everything else 0.

A chunk of n values keeps ceil(share * n) of them: first their places, increasing, as uint16, then the values as bf16,
whose range is float32's (fp16 would lose what is below 6e-8, and 8 bits of precision are far more than what leaving
the others out costs). Of equal magnitudes the first ones are kept, on every device.

Shapes: C = chunks, k = values kept of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hivetrain.averaging.codecs.chunked import INFINITE, Chunked, as_float, read_words, word_bytes
from hivetrain.errors import Fault, PeerFault
from hivetrain.run import CHUNK_ELEMENTS


class TopK(Chunked):
    """Keeps ``percent`` of each chunk, rounded up."""

    def __init__(self, name: str, *, percent: int) -> None:
        super().__init__(name)
        self._percent = percent

    def _kept(self, num_elements: int) -> int:
        return -(-num_elements * self._percent // 100)

    def _chunk_size(self, num_elements: int) -> int:
        return 4 * self._kept(num_elements)

    def _encode_rows(self, rows: Tensor, num_elements: int, seed: int) -> Tensor:
        bits = rows[:, :num_elements].contiguous().view(torch.int32)
        magnitudes = bits & 0x7FFFFFFF
        if bool((magnitudes >= INFINITE << 16).any()):
            raise ValueError(f"{self.name} encodes finite values only")
        # One integer that orders by magnitude, then by place, leaves no ties for a device to break its own way.
        order = torch.arange(CHUNK_ELEMENTS - 1, CHUNK_ELEMENTS - 1 - num_elements, -1, device=rows.device)
        keys = (magnitudes.to(torch.int64) << 12) | order
        kept = torch.topk(keys, self._kept(num_elements), dim=1, sorted=False).values
        places = (CHUNK_ELEMENTS - 1 - (kept & (CHUNK_ELEMENTS - 1))).sort(dim=1).values
        nearest = (magnitudes.gather(1, places) + 0x8000) >> 16
        signs = (bits.gather(1, places) >> 16) & 0x8000
        words = nearest.clamp_(max=INFINITE - 1) | signs
        return torch.cat((word_bytes(places.to(torch.int32)), word_bytes(words)), dim=1)

    def _decode_rows(self, data: Tensor, num_elements: int) -> Tensor:
        kept = self._kept(num_elements)
        places, words = read_words(data[:, : 2 * kept]), read_words(data[:, 2 * kept :])
        if bool(((words & 0x7FFF) >= INFINITE).any()):
            raise PeerFault(Fault.NOT_FINITE, f"values in {self.name} must be finite")
        if bool((places >= num_elements).any()):
            raise PeerFault(Fault.MALFORMED, f"places in {self.name} must be below {num_elements}")
        if bool((places[:, 1:] <= places[:, :-1]).any()):
            raise PeerFault(Fault.MALFORMED, f"places in {self.name} must increase")
        values = torch.zeros((data.shape[0], num_elements), dtype=torch.float32)
        return values.scatter_(1, places.to(torch.int64), as_float(words))
