"""What all codecs but the casts share: whole chunks as rows of one tensor, then the shorter last one.

Rows are worked on some at a time, so that what lies between values and bytes stays in a processor's cache; on a GPU,
as many as fit a bounded memory.

Shapes: C = chunks at once, S = blocks in a chunk, B = values in a block; B divides `CHUNK_ELEMENTS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.codecs.protocol import Bytes, require_size
from hivetrain.errors import Fault, PeerFault
from hivetrain.run import CHUNK_ELEMENTS

# From 32,768 elements on torch wakes its pool, and on a busy machine waits for it: int4 then encodes 8 chunks at
# 21 MB/s, not 300, and members of a round stand still for seconds. One thread alone is twice as fast with 32 rows.
_ROWS_CPU = 7
_ROWS_GPU = 4096


class Chunked(ABC):
    """A codec whose chunks are rows.

    Args:
        name: as in the recipe.
    """

    lossless = False

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def _chunk_size(self, num_elements: int) -> int:
        """Bytes of one chunk of that many elements, at most `CHUNK_ELEMENTS`."""

    @abstractmethod
    def _encode_rows(self, rows: Tensor, num_elements: int, seed: int) -> Tensor:
        """uint8 [C, chunk size] of ``rows`` [C, CHUNK_ELEMENTS], whose first ``num_elements`` count; the rest are 0.

        Raises:
            ValueError: a value is not finite, or negative where there is no sign.
        """

    @abstractmethod
    def _decode_rows(self, data: Tensor, num_elements: int) -> Tensor:
        """float32 [C, num_elements] or more of ``data``, uint8 [C, chunk size].

        Raises:
            PeerFault: NOT_FINITE or MALFORMED.
        """

    def encoded_size(self, num_elements: int) -> int:
        whole, tail = divmod(num_elements, CHUNK_ELEMENTS)
        return whole * self._chunk_size(CHUNK_ELEMENTS) + (self._chunk_size(tail) if tail else 0)

    def encode(self, values: Tensor, seed: int) -> bytes:
        flat = values.detach().to(torch.float32).contiguous()
        whole, tail = divmod(flat.numel(), CHUNK_ELEMENTS)
        rows = flat[: whole * CHUNK_ELEMENTS].view(whole, CHUNK_ELEMENTS)
        step = _ROWS_CPU if flat.device.type == "cpu" else _ROWS_GPU
        pieces = [
            self._encode_rows(rows[first : first + step], CHUNK_ELEMENTS, seed + first)
            for first in range(0, whole, step)
        ]
        if tail:
            last = torch.zeros((1, CHUNK_ELEMENTS), dtype=torch.float32, device=flat.device)
            last[0, :tail] = flat[whole * CHUNK_ELEMENTS :]
            pieces.append(self._encode_rows(last, tail, seed + whole))
        return b"".join(piece.cpu().numpy().tobytes() for piece in pieces)

    def decode(self, data: Bytes, num_elements: int) -> Tensor:
        require_size(len(data), self.encoded_size(num_elements), f"{num_elements} values in {self.name}")
        whole, tail = divmod(num_elements, CHUNK_ELEMENTS)
        size = self._chunk_size(CHUNK_ELEMENTS)
        # A copy, since torch must own what it may write to; of encoded bytes it is a small one.
        raw = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
        rows = raw[: whole * size].view(whole, size)
        values = torch.empty(num_elements, dtype=torch.float32)
        into = values[: whole * CHUNK_ELEMENTS].view(whole, CHUNK_ELEMENTS)
        for first in range(0, whole, _ROWS_CPU):
            piece = rows[first : first + _ROWS_CPU]
            into[first : first + _ROWS_CPU] = self._decode_rows(piece, CHUNK_ELEMENTS)
        if tail:
            values[whole * CHUNK_ELEMENTS :] = self._decode_rows(raw[None, whole * size :], tail)[0, :tail]
        return values


# 16-bit words: the upper half of a float32 (bf16), or an index. int32 here, two bytes on the wire.

INFINITE = 0x7F80
"""The first of the words that are not a finite, positive float32's upper half."""


def upper_word(value: float) -> int:
    """The largest bf16 that is at most ``value``, as a word."""
    return int(np.float32(value).view(np.uint32)) >> 16


def word_bytes(words: Tensor) -> Tensor:
    """uint8 [C, 2 * n], little-endian, of int32 [C, n] in 0..65535."""
    return torch.stack((words & 0xFF, words >> 8), dim=-1).to(torch.uint8).flatten(1)


def read_words(data: Tensor) -> Tensor:
    """The inverse of `word_bytes`."""
    pairs = data.view(data.shape[0], -1, 2).to(torch.int32)
    return pairs[..., 0] | (pairs[..., 1] << 8)


def as_float(words: Tensor) -> Tensor:
    """The float32 values whose upper halves ``words`` are, their lower halves being 0."""
    return (words << 16).view(torch.float32)


def require_words(words: Tensor, limit: int, what: str) -> None:
    """Refuse words past ``limit``, which is below `INFINITE`.

    Raises:
        PeerFault: NOT_FINITE for infinity and NaN of either sign, else MALFORMED.
    """
    if words.numel() and int(words.max()) > limit:
        if bool(((words & 0x7FFF) >= INFINITE).any()):
            raise PeerFault(Fault.NOT_FINITE, f"{what} must be finite")
        raise PeerFault(Fault.MALFORMED, f"{what} must be in 0..{limit:#06x} as bf16, got {int(words.max()):#06x}")


# Codes of a few bits: byte i of a block holds the codes of the values i, i + w, i + 2w, ..., the first lowest, w being
# the bytes of a whole block. So both ways are runs of whole bytes.


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [C, S * w] of codes uint8 [C, S, B]."""
    num_chunks, num_blocks, block = codes.shape
    if bits == 8:
        return codes.flatten(1)
    lanes = codes.view(num_chunks, num_blocks, 8 // bits, block * bits // 8)
    packed = lanes[:, :, 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[:, :, lane] << (bits * lane)
    return packed.flatten(1)


def unpack(packed: Tensor, bits: int, block: int) -> Tensor:
    """The inverse of `pack`: uint8 [C, S, B]."""
    width = block * bits // 8
    rows = packed.view(packed.shape[0], -1, width)
    if bits == 8:
        return rows
    lanes = [(rows >> (bits * lane)) & (2**bits - 1) for lane in range(8 // bits)]
    return torch.cat(lanes, dim=-1)


def packed_size(num_elements: int, bits: int, block: int) -> int:
    """Bytes of the codes of one chunk of so many elements: whole blocks, and what the last one needs of its bytes."""
    width = block * bits // 8
    return num_elements // block * width + min(num_elements % block, width)


def fill(packed: Tensor, num_elements: int, bits: int, block: int) -> Tensor:
    """``packed`` of a shorter chunk, grown by zeros to whole blocks."""
    missing = -(-num_elements // block) * (block * bits // 8) - packed.shape[1]
    return torch.nn.functional.pad(packed, (0, missing)) if missing else packed
