from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.averaging.messages import (
    Block,
    Confirm,
    Contribution,
    Fetch,
    Refusal,
    Result,
    blocks,
    pack_mask,
    parse,
    unpack_mask,
)
from hivetrain.errors import Fault, PeerFault


def test_message_survives_the_wire() -> None:
    block = Block(start=0, stop=64, proof=[bytes(32)])
    assert parse(block.to_bytes(), Block) == block
    result = Result(part=1, included=b"\x05", size_bytes=9, sha256=bytes(32), signature=b"s")
    assert parse(result.to_bytes(), Result, Refusal) == result
    assert parse(Confirm(results=[result]).to_bytes(), Confirm).results == [result]


def test_wire_bytes_of_a_contribution_are_pinned() -> None:
    expected = b"\x83\xa4kind\xaccontribution\xa4part\x02\xaanum_chunks\x07"
    assert Contribution(part=2, num_chunks=7).to_bytes() == expected


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff\xff",
        b"\x93\x01\x02\x03",
        b"\xdf\xff\xff\xff\xff",  # a map that announces 4 billion entries
        b"\xdd\xff\xff\xff\xff",  # an array that does
        msgpack.packb({"kind": "contribution", "part": 1}),
        msgpack.packb({"kind": "contribution", "part": 1, "num_chunks": 2, "weight": 1e6}),
        msgpack.packb({"kind": "contribution", "part": "1", "num_chunks": 2}),
        msgpack.packb({"kind": "contribution", "part": True, "num_chunks": 2}),
        msgpack.packb({"kind": "contribution", "part": -1, "num_chunks": 2}),
        msgpack.packb({"kind": "fetch", "part": 1, "take": False}),
        msgpack.packb({"kind": ["contribution"]}),
        msgpack.packb({1: 2}),
        msgpack.packb(None),
        Contribution(part=0, num_chunks=0).to_bytes() + b"\x00",
    ],
)
def test_hostile_frames_are_malformed(frame: bytes) -> None:
    with pytest.raises(PeerFault) as refused:
        parse(frame, Contribution)
    assert refused.value.fault is Fault.MALFORMED


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(frame: bytes) -> None:
    with pytest.raises(PeerFault):
        parse(frame, Contribution, Fetch)


def test_blocks_cut_a_part_at_64_chunks() -> None:
    assert list(blocks(3, 3 + 130)) == [(3, 67), (67, 131), (131, 133)]
    assert list(blocks(5, 5)) == []


@given(st.lists(st.booleans(), max_size=40))
def test_mask_survives(included: list[bool]) -> None:
    assert unpack_mask(pack_mask(included), len(included)) == tuple(included)


def test_mask_by_hand() -> None:
    assert pack_mask([True, False, True, False, False, False, False, False, True]) == b"\x05\x01"


@pytest.mark.parametrize(("packed", "count"), [(b"", 1), (b"\x01\x00", 8), (b"\x02", 1), (b"\x01", 9)])
def test_mask_of_another_length_is_refused(packed: bytes, count: int) -> None:
    with pytest.raises(PeerFault):
        unpack_mask(packed, count)
