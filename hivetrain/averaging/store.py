"""Where means land: one buffer for the encoded payload, from which they are also served to others.

A section in fp32 is a view on that buffer, so a node needs no second copy of the model's size. Other codecs are
decoded as they arrive, which is also when their values can be checked.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.layout import PayloadLayout, require_sane
from hivetrain.errors import PeerFault


class MeanStore:
    """The mean of a whole payload, encoded and as vectors: anything, until chunks are put or cleared.

    Args:
        memory: to use, ``layout.size_bytes`` long; kept by the caller, it saves fresh pages: a third of a round's CPU
            time, as measured in a virtual machine whose host takes freed pages back.

    Raises:
        ValueError: ``memory`` has another size.
    """

    def __init__(self, layout: PayloadLayout, memory: bytearray | None = None) -> None:
        if memory is not None and len(memory) != layout.size_bytes:
            raise ValueError(f"the layout needs {layout.size_bytes} bytes of memory, got {len(memory)}")
        self._layout = layout
        if memory is None:
            self._buffer = np.zeros(layout.size_bytes, dtype=np.uint8).data  # untouched pages take no memory
        else:
            self._buffer = np.frombuffer(memory, dtype=np.uint8).data
        self._vectors: dict[str, Tensor] = {}
        self._in_place: set[str] = set()
        first = [0]
        for section in layout.sections:
            span = next(s for s in layout.spans(0, layout.num_chunks) if s.section == section)
            first.append(first[-1] + span.codec.encoded_size(section.num_elements))
        for section, (start, stop) in zip(layout.sections, pairwise(first), strict=True):
            if section.codec == "fp32" and sys.byteorder == "little" and start % 4 == 0:
                array = np.frombuffer(self._buffer[start:stop], dtype=np.float32)
                self._in_place.add(section.name)
            else:
                array = np.zeros(section.num_elements, dtype=np.float32)
            self._vectors[section.name] = torch.from_numpy(array)

    @property
    def vectors(self) -> dict[str, Tensor]:
        """float32 per section, shape [num_elements]; they share the store's memory."""
        return self._vectors

    def view(self, start: int, stop: int) -> memoryview:
        """Encoded bytes of chunks ``[start, stop)``."""
        return self._buffer[self._layout.byte_offset(start) : self._layout.byte_offset(stop)]

    def put(self, start: int, stop: int, data: Bytes, max_abs: float) -> PeerFault | None:
        """Keep the encoded mean of chunks ``[start, stop)``. Returns what is wrong with its values."""
        self.view(start, stop)[:] = data
        return self.take_in(start, stop, max_abs)

    def take_in(self, start: int, stop: int, max_abs: float) -> PeerFault | None:
        """Decode what was written to ``view(start, stop)``. Returns what is wrong with its values."""
        data = self.view(start, stop)
        fault: PeerFault | None = None
        position = 0
        for span in self._layout.spans(start, stop):
            size = span.codec.encoded_size(span.num_elements)
            target = self._vectors[span.section.name][span.start : span.stop]
            try:
                if span.section.name not in self._in_place:
                    values = span.codec.decode(data[position : position + size], span.num_elements)
                    target.numpy()[:] = values.numpy()
                require_sane(target, max_abs)
            except PeerFault as found:
                fault = fault or found
            position += size
        return fault

    def clear(self, start: int, stop: int) -> None:
        """Forget chunks ``[start, stop)``: their values are zero."""
        np.frombuffer(self.view(start, stop), dtype=np.uint8)[:] = 0
        for span in self._layout.spans(start, stop):
            self._vectors[span.section.name].numpy()[span.start : span.stop] = 0.0
