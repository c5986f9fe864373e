from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.averaging.layout import PayloadLayout, Section, part_bounds, require_sane
from hivetrain.errors import Fault, PeerFault
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import leaf_digest

torch.set_num_threads(1)


def two_sections() -> PayloadLayout:
    return PayloadLayout(
        [
            Section(name="delta", num_elements=2 * CHUNK_ELEMENTS + 10, codec="fp16"),
            Section(name="exp_avg", num_elements=CHUNK_ELEMENTS + 1, codec="fp32"),
        ]
    )


def vectors(layout: PayloadLayout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.num_elements, generator=generator) for s in layout.sections}


def test_offsets_by_hand() -> None:
    layout = two_sections()
    assert layout.num_chunks == 5
    offsets = [0, 8192, 16384, 16404, 16404 + 16384, 16404 + 16384 + 4]
    assert [layout.byte_offset(chunk) for chunk in range(6)] == offsets
    assert layout.size_bytes == offsets[-1]
    assert layout.range_bytes(2, 4) == 20 + 16384
    spans = [(span.section.name, span.start, span.stop, span.first_chunk) for span in layout.spans(1, 4)]
    assert spans == [("delta", 4096, 8202, 1), ("exp_avg", 0, 4096, 3)]
    with pytest.raises(ValueError, match="chunks"):
        list(layout.spans(3, 6))


def test_payload_comes_back_and_every_run_of_chunks_with_it() -> None:
    layout, given_vectors = two_sections(), vectors(two_sections())
    payload = layout.encode(given_vectors, seed=3)
    assert len(payload) == layout.size_bytes
    decoded = layout.decode(payload)
    assert torch.equal(decoded["delta"], given_vectors["delta"].half().float())
    assert torch.equal(decoded["exp_avg"], given_vectors["exp_avg"])
    flat = torch.cat([decoded["delta"], decoded["exp_avg"]])
    position = 0
    for start in range(layout.num_chunks):
        for stop in range(start, layout.num_chunks + 1):
            data = payload[layout.byte_offset(start) : layout.byte_offset(stop)]
            if start < stop:
                values = layout.decode_chunks(data, start, stop)
                assert torch.equal(values, flat[position : position + layout.num_elements(start, stop)])
                assert layout.encode_chunks(values, start, stop, seed=3) == data
        position += layout.num_elements(start, start + 1)


def test_chunk_digests_are_those_of_the_bytes_of_each_chunk() -> None:
    layout = two_sections()
    payload = layout.encode(vectors(layout), seed=0)
    edges = [layout.byte_offset(chunk) for chunk in range(layout.num_chunks + 1)]
    expected = [leaf_digest(payload[a:b]) for a, b in pairwise(edges)]
    assert layout.chunk_digests(payload) == expected
    assert layout.chunk_digests(payload[edges[1] : edges[4]], 1, 4) == expected[1:4]


@pytest.mark.parametrize(("change", "fault"), [(-1, Fault.TRUNCATED), (1, Fault.OVERSIZED)])
def test_payload_of_another_size_is_refused(change: int, fault: Fault) -> None:
    layout = two_sections()
    for refuse in (layout.decode, layout.chunk_digests):
        with pytest.raises(PeerFault) as refused:
            refuse(bytes(layout.size_bytes + change))
        assert refused.value.fault is fault


def test_vectors_that_do_not_fit_are_refused() -> None:
    layout = two_sections()
    good = vectors(layout)
    with pytest.raises(ValueError, match="expected vectors"):
        layout.encode({"delta": good["delta"]}, seed=0)
    with pytest.raises(ValueError, match="must have shape"):
        layout.encode({**good, "delta": good["delta"][:-1]}, seed=0)
    with pytest.raises(ValueError, match="hold 4096 values"):
        layout.encode_chunks(torch.zeros(5000), 0, 1, seed=0)


def test_layout_hash_changes_with_every_field() -> None:
    base = Section(name="a", num_elements=10, codec="fp32")
    hashes = {
        PayloadLayout(sections).layout_hash
        for sections in (
            [base],
            [Section(name="b", num_elements=10, codec="fp32")],
            [Section(name="a", num_elements=11, codec="fp32")],
            [Section(name="a", num_elements=10, codec="fp16")],
            [base, Section(name="b", num_elements=10, codec="fp32")],
        )
    }
    assert len(hashes) == 5
    assert PayloadLayout([base]) == PayloadLayout([base])


def test_impossible_sections_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 element"):
        Section(name="a", num_elements=0, codec="fp32")
    with pytest.raises(ValueError, match="codec must be"):
        Section(name="a", num_elements=1, codec="zip")
    with pytest.raises(ValueError, match="name"):
        Section(name="", num_elements=1, codec="fp32")
    with pytest.raises(ValueError, match="different names"):
        PayloadLayout([Section(name="a", num_elements=1, codec="fp32")] * 2)
    with pytest.raises(ValueError, match="different names"):
        PayloadLayout([])


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([0.0, float("nan")], Fault.NOT_FINITE),
        ([float("nan"), 1e30], Fault.NOT_FINITE),
        ([float("inf"), 0.0], Fault.NOT_FINITE),
        ([float("-inf"), 0.0], Fault.NOT_FINITE),
        ([10.1, 0.0], Fault.OUT_OF_BOUND),
        ([-10.1, 0.0], Fault.OUT_OF_BOUND),
    ],
)
def test_insane_values_are_refused(values: list[float], fault: Fault) -> None:
    with pytest.raises(PeerFault) as refused:
        require_sane(torch.tensor(values), 10.0)
    assert refused.value.fault is fault


def test_values_at_the_bound_pass() -> None:
    require_sane(torch.tensor([10.0, -10.0]), 10.0)


def test_parts_by_hand() -> None:
    assert part_bounds(10, [1, 1]) == [(0, 5), (5, 10)]
    assert part_bounds(9, [1, 0, 2]) == [(0, 3), (3, 3), (3, 9)]
    assert part_bounds(3, [1, 1000, 1]) == [(0, 1), (1, 2), (2, 3)]
    assert part_bounds(1, [1, 1, 0])[-1] == (1, 1)


@given(
    st.integers(1, 10_000),
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40).filter(any),
)
def test_parts_cover_every_chunk_once_and_leave_no_reducer_idle(num_chunks: int, shares: list[float]) -> None:
    bounds = part_bounds(num_chunks, shares)
    assert len(bounds) == len(shares)
    assert [start for start, _ in bounds] == [0, *[stop for _, stop in bounds[:-1]]]
    assert bounds[-1][1] == num_chunks
    for (start, stop), share in zip(bounds, shares, strict=True):
        assert start <= stop
        if share == 0:
            assert start == stop
        elif num_chunks >= np.count_nonzero(shares):
            assert start < stop


@pytest.mark.parametrize("shares", [[], [0.0], [-1.0, 2.0], [float("inf")], [float("nan"), 1.0]])
def test_impossible_shares_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        part_bounds(10, shares)
