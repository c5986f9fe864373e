from __future__ import annotations

import numpy as np
import pytest
import torch

from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.robust import get_mean
from hivetrain.averaging.store import MeanStore
from hivetrain.errors import Fault


def make_layout() -> PayloadLayout:
    return PayloadLayout(
        [
            Section(name="a", num_elements=4096 + 3, codec="fp32"),
            Section(name="b", num_elements=4096 + 1, codec="fp16"),
            Section(name="c", num_elements=5, codec="fp32"),  # begins at an odd multiple of 2 bytes
        ]
    )


def test_what_is_put_is_decoded_and_served() -> None:
    layout = make_layout()
    store = MeanStore(layout)
    generator = torch.Generator().manual_seed(0)
    vectors = {s.name: torch.randn(s.num_elements, generator=generator) for s in layout.sections}
    payload = layout.encode(vectors, seed=0)
    for start, stop in ((2, 5), (0, 2)):  # in any order
        data = payload[layout.byte_offset(start) : layout.byte_offset(stop)]
        assert store.put(start, stop, data, 100.0) is None
        assert bytes(store.view(start, stop)) == data
    assert torch.equal(store.vectors["a"], vectors["a"])
    assert torch.equal(store.vectors["b"], vectors["b"].half().float())
    assert torch.equal(store.vectors["c"], vectors["c"])


def test_fp32_takes_no_second_copy() -> None:
    layout = PayloadLayout([Section(name="a", num_elements=10, codec="fp32")])
    store = MeanStore(layout)
    store.put(0, 1, torch.ones(10).numpy().tobytes(), 100.0)
    store.view(0, 1)[:4] = np.float32(7).tobytes()
    assert store.vectors["a"][0] == 7


def test_cleared_chunks_are_zero() -> None:
    layout = make_layout()
    store = MeanStore(layout)
    payload = layout.encode({s.name: torch.ones(s.num_elements) for s in layout.sections}, seed=0)
    store.put(0, 5, payload, 100.0)
    store.clear(1, 3)
    assert store.vectors["a"].sum() == 4096
    assert store.vectors["b"].sum() == 1
    assert store.vectors["c"].sum() == 5
    assert not any(store.view(1, 3))


@pytest.mark.parametrize(("value", "fault"), [(float("nan"), Fault.NOT_FINITE), (11.0, Fault.OUT_OF_BOUND)])
@pytest.mark.parametrize("section", ["a", "b", "c"])
def test_values_that_no_mean_has_are_told(section: str, value: float, fault: Fault) -> None:
    layout = make_layout()
    payload = b"".join(  # by hand: no encoder writes a NaN in fp16
        np.full(s.num_elements, value if s.name == section else 0.0, "<f2" if s.codec == "fp16" else "<f4").tobytes()
        for s in layout.sections
    )
    found = MeanStore(layout).put(0, 5, payload, 10.0)
    assert found is not None
    assert found.fault is fault


def test_weighted_mean_by_hand() -> None:
    mean = get_mean("mean")([torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])], [1.0, 2.0])
    assert torch.equal(mean, torch.tensor([3.0, 6.0]))
    with pytest.raises(ValueError, match="mean must be one of mean"):
        get_mean("median-of-nothing")
