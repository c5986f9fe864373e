"""Memory that a caller keeps for the means of round after round."""

from __future__ import annotations

import pytest
import torch

from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.store import MeanStore

LAYOUT = PayloadLayout(
    [Section(name="delta", num_elements=5000, codec="fp32"), Section(name="exp_avg", num_elements=100, codec="fp16")]
)


def test_kept_memory_holds_the_fp32_vectors_and_is_zero_where_it_is_cleared() -> None:
    memory = bytearray(b"\xff" * LAYOUT.size_bytes)
    store = MeanStore(LAYOUT, memory)
    values = {"delta": torch.arange(5000.0), "exp_avg": torch.ones(100)}
    payload = LAYOUT.encode(values, seed=0)
    assert store.put(0, LAYOUT.num_chunks, payload, max_abs=1e4) is None
    assert bytes(memory) == payload
    assert torch.equal(store.vectors["delta"], values["delta"])
    assert torch.equal(store.vectors["exp_avg"], values["exp_avg"])
    again = MeanStore(LAYOUT, memory)
    again.clear(0, LAYOUT.num_chunks)
    assert not any(memory)
    assert all(not vector.any() for vector in again.vectors.values())


def test_memory_of_another_size_is_refused() -> None:
    for size in (0, LAYOUT.size_bytes - 1, LAYOUT.size_bytes + 1):
        with pytest.raises(ValueError, match="bytes of memory"):
            MeanStore(LAYOUT, bytearray(size))
