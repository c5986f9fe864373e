from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.averaging.messages import (
    Batch,
    Confirm,
    Contribution,
    Fetch,
    MaskRun,
    MeanBatch,
    Proof,
    Refusal,
    Result,
    parse,
)
from hivetrain.errors import Fault, PeerFault

GOOD = {"kind": "contribution", "part": 1, "rank": 0, "first": 0, "num_chunks": 2}


def test_message_survives_the_wire() -> None:
    batch = Batch(start=0, stop=64, proof=[bytes(32)])
    assert parse(batch.to_bytes(), Batch) == batch
    runs = [MaskRun(stop=4, included=b"\x05"), MaskRun(stop=9, included=b"\x01")]
    result = Result(part=1, rank=2, masks=runs, root=bytes(32), signature=b"s")
    assert parse(result.to_bytes(), Result, Refusal) == result
    assert parse(Confirm(version=1, results=[result], done=True).to_bytes(), Confirm).results == [result]
    proof = Proof(part=3, rank=1)
    assert parse(proof.to_bytes(), Contribution, MeanBatch, Proof) == proof


def test_wire_bytes_of_a_contribution_are_pinned() -> None:
    expected = b"\x85\xa4kind\xaccontribution\xa4part\x02\xa4rank\x01\xa5first\x00\xaanum_chunks\x07"
    assert Contribution(part=2, rank=1, first=0, num_chunks=7).to_bytes() == expected


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff\xff",
        b"\x93\x01\x02\x03",
        b"\xdf\xff\xff\xff\xff",  # a map that announces 4 billion entries
        b"\xdd\xff\xff\xff\xff",  # an array that does
        msgpack.packb({"kind": "contribution", "part": 1}),
        msgpack.packb({**GOOD, "weight": 1e6}),
        msgpack.packb({**GOOD, "part": "1"}),
        msgpack.packb({**GOOD, "part": True}),
        msgpack.packb({**GOOD, "part": -1}),
        msgpack.packb({**GOOD, "rank": 257}),
        msgpack.packb({"kind": "fetch", "part": 1, "take": False}),
        msgpack.packb({"kind": ["contribution"]}),
        msgpack.packb({1: 2}),
        msgpack.packb(None),
        msgpack.packb(GOOD) + b"\x00",
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
