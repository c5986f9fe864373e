"""What every codec is, and the one check that all of them begin with."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hivetrain.errors import Fault, PeerFault

Bytes = bytes | bytearray | memoryview


class Codec(Protocol):
    """One way to write float32 values.

    A chunk of `CHUNK_ELEMENTS` encodes alone, so that a part can be checked, decoded and averaged from its own chunks:
    ``encode(values, seed)`` is the concatenation of ``encode(chunk j, seed + j)``. Bytes are little-endian.
    """

    @property
    def name(self) -> str:
        """As it is written in the recipe."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether ``decode(encode(values))`` always is ``values``."""
        ...

    def encoded_size(self, num_elements: int) -> int:
        """Bytes that ``num_elements`` values take: the sum over their chunks."""
        ...

    def encode(self, values: Tensor, seed: int) -> bytes:
        """Encode ``values`` (float32, any device, shape [n]); chunk ``j`` of them rounds under ``seed + j``.

        Raises:
            ValueError: a value is not finite (fp32 alone carries any), or negative where the codec has no sign.
        """
        ...

    def decode(self, data: Bytes, num_elements: int) -> Tensor:
        """Decode to float32 of shape [num_elements] on the CPU.

        Every value is finite, whatever the bytes; only a cast decodes what it finds.

        Raises:
            PeerFault: TRUNCATED or OVERSIZED where the size is not ``encoded_size(num_elements)``; NOT_FINITE or
                MALFORMED for bytes that no values encode to.
        """
        ...


def require_size(actual: int, expected: int, what: str) -> None:
    """Refuse a size that is not the expected one.

    Raises:
        PeerFault: TRUNCATED or OVERSIZED.
    """
    if actual != expected:
        fault = Fault.TRUNCATED if actual < expected else Fault.OVERSIZED
        raise PeerFault(fault, f"{what}: expected {expected} bytes, got {actual}")
