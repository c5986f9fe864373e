"""fp32 and fp16: a cast to a dtype and back.

fp16 holds up to 65,504, to which larger values are cut, and nothing between 0 and 6e-8: second moments of small
gradients vanish in it.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.codecs.protocol import Bytes, require_size

_FP16_MAX = 65504.0


class Cast:
    """A codec that is a cast: fp32 carries any value, NaN included, for whoever decodes it to judge."""

    def __init__(self, name: str, *, lossless: bool) -> None:
        self.name = name
        self.lossless = lossless
        self._wire = np.dtype("<f4" if lossless else "<f2")

    def encoded_size(self, num_elements: int) -> int:
        return num_elements * self._wire.itemsize

    def encode(self, values: Tensor, seed: int) -> bytes:
        cast = values.detach().to(device="cpu", dtype=torch.float32)
        if not self.lossless:
            if not bool(torch.isfinite(cast).all()):
                raise ValueError(f"{self.name} encodes finite values only")
            # torch casts to nearest, ties to even, on every device; numpy would do the same and warn.
            cast = cast.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)
        return cast.numpy().astype(self._wire, copy=False).tobytes()

    def decode(self, data: Bytes, num_elements: int) -> Tensor:
        require_size(len(data), self.encoded_size(num_elements), f"{num_elements} values in {self.name}")
        found = np.frombuffer(data, dtype=self._wire)
        if self.lossless and found.flags.writeable and sys.byteorder == "little":
            return torch.from_numpy(found)
        return torch.from_numpy(found.astype(np.float32))
