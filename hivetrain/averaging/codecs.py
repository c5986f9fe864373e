"""How float32 values become bytes on the wire: pure functions with a fixed size per chunk.

Bytes are little-endian whatever the machine. A chunk of `CHUNK_ELEMENTS` encodes alone, so that a part can be
checked, decoded and averaged from its own chunks: ``encode(values, seed)`` is the concatenation of
``encode(chunk j, seed + j)``. A lossy codec draws its rounding from that seed; the two here ignore it.

fp16 holds up to 65,504, and nothing between 0 and 6e-8: second moments of small gradients vanish in it.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hivetrain.errors import Fault, PeerFault

Bytes = bytes | bytearray | memoryview


class Codec(Protocol):
    """One way to write float32 values."""

    @property
    def name(self) -> str:
        """As it is written in the recipe."""
        ...

    def encoded_size(self, num_elements: int) -> int:
        """Bytes that ``num_elements`` values take: the sum over their chunks."""
        ...

    def encode(self, values: Tensor, seed: int) -> bytes:
        """Encode ``values`` (float32, CPU, shape [n]); chunk ``j`` of them rounds under ``seed + j``."""
        ...

    def decode(self, data: Bytes, num_elements: int) -> Tensor:
        """Decode to float32 of shape [num_elements].

        Raises:
            PeerFault: TRUNCATED or OVERSIZED where the size is not ``encoded_size(num_elements)``.
        """
        ...


class _Cast:
    """A codec that is a cast to a dtype and back."""

    def __init__(self, name: str, wire: str, dtype: torch.dtype) -> None:
        self.name = name
        self._wire = np.dtype(wire)
        self._dtype = dtype

    def encoded_size(self, num_elements: int) -> int:
        return num_elements * self._wire.itemsize

    def encode(self, values: Tensor, seed: int) -> bytes:
        # torch casts (to nearest, ties to even) where numpy would also warn about overflow.
        cast = values.detach().to(device="cpu", dtype=torch.float32).to(self._dtype)
        return cast.numpy().astype(self._wire, copy=False).tobytes()

    def decode(self, data: Bytes, num_elements: int) -> Tensor:
        require_size(len(data), self.encoded_size(num_elements), f"{num_elements} values in {self.name}")
        return torch.from_numpy(np.frombuffer(data, dtype=self._wire).astype(np.float32))


def require_size(actual: int, expected: int, what: str) -> None:
    """Refuse a size that is not the expected one.

    Raises:
        PeerFault: TRUNCATED or OVERSIZED.
    """
    if actual != expected:
        fault = Fault.TRUNCATED if actual < expected else Fault.OVERSIZED
        raise PeerFault(fault, f"{what}: expected {expected} bytes, got {actual}")


_CODECS: dict[str, Codec] = {
    "fp32": _Cast("fp32", "<f4", torch.float32),
    "fp16": _Cast("fp16", "<f2", torch.float16),
}
CODEC_NAMES = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: there is none; names those that exist.
    """
    if name not in _CODECS:
        raise ValueError(f"codec must be one of {', '.join(_CODECS)}, got {name!r}")
    return _CODECS[name]
