"""Where every value of a payload lies: sections, chunks and parts. No network, no clock.

A payload is what one member brings to an all-reduce: its sections one after another ("delta", "exp_avg",
"exp_avg_sq"), each cut into chunks of `CHUNK_ELEMENTS` values; the last chunk of a section may be shorter. A part
is a run of whole chunks, and may span sections. Everyone derives the same offsets from the same layout, so sizes
from a peer are compared, never believed.

Shapes: C = chunks of the payload, n = values of a run of chunks, over all sections that it touches.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.codecs import Bytes, Codec, get_codec, require_size
from hivetrain.errors import Fault, PeerFault
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import leaf_digests

CUTS_KEPT = 4096
_SQUARABLE = 1e-15  # the square of a smaller float32 may round to nothing
_ROUNDED = 1 - 2.0**-20  # more than a float32 square is rounded by


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One named vector of the payload, and the codec that it travels under."""

    name: str
    num_elements: int
    codec: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a section needs a name")
        if self.num_elements < 1:
            raise ValueError(f"section {self.name!r} needs at least 1 element, got {self.num_elements}")
        get_codec(self.codec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The overlap of a run of chunks with one section: elements ``[start, stop)`` of that section."""

    section: Section
    start: int
    stop: int
    first_chunk: int  # global index of the span's first chunk

    @property
    def num_elements(self) -> int:
        return self.stop - self.start

    @property
    def codec(self) -> Codec:
        return get_codec(self.section.codec)


class PayloadLayout:
    """Offsets of a payload, fixed by its sections.

    Raises:
        ValueError: no sections, or two of one name.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = tuple(sections)
        names = [section.name for section in self.sections]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a layout needs sections of different names, got {names}")
        self._first_chunk = [0]
        self._first_byte = [0]
        self._chunk_bytes: list[int] = []
        for section in self.sections:
            codec = get_codec(section.codec)
            self._first_chunk.append(self._first_chunk[-1] + -(-section.num_elements // CHUNK_ELEMENTS))
            self._first_byte.append(self._first_byte[-1] + codec.encoded_size(section.num_elements))
            self._chunk_bytes.append(codec.encoded_size(CHUNK_ELEMENTS))
        self._cuts: dict[tuple[int, int], tuple[Span, ...]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PayloadLayout) and self.sections == other.sections

    def __hash__(self) -> int:
        return hash(self.sections)

    def __repr__(self) -> str:
        return f"PayloadLayout({list(self.sections)!r})"

    @property
    def num_chunks(self) -> int:
        """C."""
        return self._first_chunk[-1]

    @property
    def size_bytes(self) -> int:
        """Bytes of a whole encoded payload."""
        return self._first_byte[-1]

    @property
    def layout_hash(self) -> str:
        """Hex sha256 over names, sizes and codecs in order."""
        lines = [f"{section.name}\t{section.num_elements}\t{section.codec}" for section in self.sections]
        return hashlib.sha256("\n".join(("hivetrain-layout/1", str(CHUNK_ELEMENTS), *lines)).encode()).hexdigest()

    def spans(self, start: int, stop: int) -> tuple[Span, ...]:
        """The sections that chunks ``[start, stop)`` touch, in order.

        Raises:
            ValueError: the range is not inside ``[0, C]``.
        """
        cut = self._cuts.get((start, stop))
        if cut is None:
            cut = self._cut(start, stop)
            if len(self._cuts) >= CUTS_KEPT:
                self._cuts.clear()
            self._cuts[start, stop] = cut  # a round asks for each range many times over
        return cut

    def _cut(self, start: int, stop: int) -> tuple[Span, ...]:
        if not 0 <= start <= stop <= self.num_chunks:
            raise ValueError(f"chunks must lie in [0, {self.num_chunks}], got [{start}, {stop})")
        spans = []
        for section, (first, end) in zip(self.sections, pairwise(self._first_chunk), strict=True):
            low, high = max(start, first), min(stop, end)
            if low < high:
                span = Span(
                    section=section,
                    start=(low - first) * CHUNK_ELEMENTS,
                    stop=min((high - first) * CHUNK_ELEMENTS, section.num_elements),
                    first_chunk=low,
                )
                spans.append(span)
        return tuple(spans)

    def byte_offset(self, chunk: int) -> int:
        """Where chunk ``chunk`` begins in the payload; ``byte_offset(C)`` is its end."""
        index = bisect_right(self._first_chunk, chunk) - 1
        if index == len(self.sections):
            return self.size_bytes
        return self._first_byte[index] + (chunk - self._first_chunk[index]) * self._chunk_bytes[index]

    def range_bytes(self, start: int, stop: int) -> int:
        """Encoded bytes of chunks ``[start, stop)``."""
        return self.byte_offset(stop) - self.byte_offset(start)

    def num_elements(self, start: int, stop: int) -> int:
        """Values in chunks ``[start, stop)``, over all sections that they touch."""
        return sum(span.num_elements for span in self.spans(start, stop))

    def encode(self, vectors: Mapping[str, Tensor], seed: int) -> bytes:
        """The payload of ``vectors`` (float32, one per section, shape [num_elements]).

        Raises:
            ValueError: a section is missing, unknown, or of another shape.
        """
        if set(vectors) != {section.name for section in self.sections}:
            raise ValueError(f"expected vectors {[s.name for s in self.sections]}, got {sorted(vectors)}")
        for section in self.sections:
            if tuple(vectors[section.name].shape) != (section.num_elements,):
                shape = tuple(vectors[section.name].shape)
                raise ValueError(f"section {section.name!r} must have shape ({section.num_elements},), got {shape}")
        spans = self.spans(0, self.num_chunks)
        return b"".join(s.codec.encode(vectors[s.section.name], seed + s.first_chunk) for s in spans)

    def encode_chunks(self, values: Tensor, start: int, stop: int, seed: int) -> bytes:
        """Bytes ``[start, stop)`` of a payload from their values alone (float32, shape [n])."""
        pieces, position = [], 0
        for span in self.spans(start, stop):
            piece = values[position : position + span.num_elements]
            pieces.append(span.codec.encode(piece, seed + span.first_chunk))
            position += span.num_elements
        if position != values.numel():
            raise ValueError(f"chunks [{start}, {stop}) hold {position} values, got {values.numel()}")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def decode_chunks(self, data: Bytes, start: int, stop: int) -> Tensor:
        """Values of chunks ``[start, stop)``: float32, shape [n].

        Raises:
            PeerFault: TRUNCATED or OVERSIZED.
        """
        require_size(len(data), self.range_bytes(start, stop), f"chunks [{start}, {stop})")
        view, pieces = memoryview(data), []
        for span in self.spans(start, stop):
            size = span.codec.encoded_size(span.num_elements)
            pieces.append(span.codec.decode(view[:size], span.num_elements))
            view = view[size:]
        if len(pieces) == 1:
            return pieces[0]
        return torch.from_numpy(np.concatenate([piece.numpy() for piece in pieces]))

    def decode(self, payload: Bytes) -> dict[str, Tensor]:
        """Every section's vector.

        Raises:
            PeerFault: TRUNCATED or OVERSIZED.
        """
        flat = self.decode_chunks(payload, 0, self.num_chunks)
        ends = list(accumulate(section.num_elements for section in self.sections))
        return {s.name: flat[end - s.num_elements : end] for s, end in zip(self.sections, ends, strict=True)}

    def chunk_digests(self, payload: Bytes, start: int = 0, stop: int | None = None) -> list[bytes]:
        """Merkle leaf digests of chunks ``[start, stop)``, whose bytes ``payload`` is.

        Raises:
            PeerFault: TRUNCATED or OVERSIZED.
        """
        stop = self.num_chunks if stop is None else stop
        require_size(len(payload), self.range_bytes(start, stop), f"chunks [{start}, {stop})")
        view = memoryview(payload)
        digests: list[bytes] = []
        for span in self.spans(start, stop):
            size = span.codec.encoded_size(span.num_elements)
            digests += leaf_digests(view[:size], span.codec.encoded_size(CHUNK_ELEMENTS))
            view = view[size:]
        return digests


def require_sane(values: Tensor, max_abs: float) -> None:
    """Refuse values that are not finite or past the bound.

    Raises:
        PeerFault: NOT_FINITE or OUT_OF_BOUND.
    """
    array = values.numpy()  # numpy stays in this thread: a block is too small to wake torch's pool for
    # One fast look is enough for most: however a sum of squares is rounded, it is not below the largest of them.
    with np.errstate(over="ignore", invalid="ignore"):
        if max_abs > _SQUARABLE and float(np.dot(array, array)) < max_abs * max_abs * _ROUNDED:
            return
    largest = max(abs(float(array.min())), abs(float(array.max())))
    if not largest < math.inf:  # a NaN is its array's min and max
        raise PeerFault(Fault.NOT_FINITE, f"values must be finite, got {largest}")
    if largest > max_abs:
        raise PeerFault(Fault.OUT_OF_BOUND, f"values must be within ±{max_abs:g}, got {largest:g}")


def part_bounds(num_chunks: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Split ``[0, num_chunks)`` into one contiguous part per share, in order.

    Args:
        num_chunks: C.
        shares: relative, one per member; 0 is a member that does not reduce.

    Returns:
        ``(start, stop)`` per share, covering every chunk once. A share > 0 gets at least one chunk
        where there are enough of them; a share of 0 gets an empty range.

    Raises:
        ValueError: nobody reduces, or a share is negative or not finite.
    """
    running = list(accumulate(shares))  # its last entry, not sum(), so that the last edge is exact
    total = running[-1] if running else 0.0
    if not 0 < total < float("inf") or min(shares) < 0:
        raise ValueError(f"shares must be finite, >= 0 and one of them > 0, got {list(shares)}")
    num_reducers = sum(share > 0 for share in shares)
    floor = 1 if num_chunks >= num_reducers else 0
    spare = num_chunks - floor * num_reducers
    # Round the running total, not each share: rounded shares need not sum to C.
    edges, given = [0], 0
    for share, so_far in zip(shares, running, strict=True):
        given += floor * (share > 0)
        edges.append(given + round(spare * (so_far / total)))
    return list(pairwise(edges))
