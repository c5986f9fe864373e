"""Synapses: what a stranger's bytes must be before anybody looks at them."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.errors import Fault, PeerFault
from template.protocol import AllReduce, AllReduceReply, IsAlive, IsAliveReply, Link, Message, Train, TrainReply

RUN_ID = "0f" * 32
TRAIN = {"run_id": RUN_ID, "round": 1, "want": "open", "snapshots": [1, 2], "coins": b"c"}
TRAIN_REPLY = {"run_id": RUN_ID, "round": 1, "status": "idle", "epoch": 0, "step": 0, "num_steps": 50}
OPENING = {"index": 0, "step": 0, "payload": b"", "proof": []}
ALL_REDUCE = {"run_id": RUN_ID, "round": 1, "attempt": 0, "plan": b"", "base_manifest": RUN_ID}
ALL_REDUCE_REPLY = {"run_id": RUN_ID, "round": 1, "attempt": 0, "accepted": True, "completed": True}
ALIVE = {"version": 1, "role": "miner", "run_id": RUN_ID, "epoch": 0, "round": 0, "state": "training"}
LINK = {"hotkey": "5A", "bytes_received": 1, "seconds": 1.0, "first_byte_s": 0.1}


def parse(kind: type[Message], fields: Any) -> Message:
    return kind.from_bytes(msgpack.packb(fields), 1 << 24)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Train, TRAIN),
        (TrainReply, TRAIN_REPLY | {"openings": [OPENING]}),
        (AllReduce, ALL_REDUCE),
        (AllReduceReply, ALL_REDUCE_REPLY | {"links": [LINK], "included": {"5A": 2.0}}),
        (IsAliveReply, ALIVE),
        (IsAlive, {}),
    ],
)
def test_well_formed_fields_parse_and_come_back_as_the_same_message(kind, fields) -> None:
    message = parse(kind, fields)
    assert kind.from_bytes(message.to_bytes(), 1 << 24) == message


@pytest.mark.parametrize(
    ("kind", "fields", "fault"),
    [
        (Train, TRAIN | {"extra": 1}, Fault.MALFORMED),
        (Train, {"round": 1}, Fault.MALFORMED),
        (Train, TRAIN | {"run_id": RUN_ID.upper()}, Fault.MALFORMED),
        (Train, TRAIN | {"run_id": RUN_ID + "\n"}, Fault.MALFORMED),
        (Train, TRAIN | {"round": -1}, Fault.MALFORMED),
        (Train, TRAIN | {"round": 2**60}, Fault.MALFORMED),
        (Train, TRAIN | {"round": "1"}, Fault.MALFORMED),
        (Train, TRAIN | {"round": True}, Fault.MALFORMED),
        (Train, TRAIN | {"round": 1.0}, Fault.MALFORMED),
        (Train, TRAIN | {"want": "everything"}, Fault.MALFORMED),
        (Train, TRAIN | {"snapshots": list(range(65))}, Fault.MALFORMED),
        (Train, TRAIN | {"snapshots": [3, 3]}, Fault.MALFORMED),
        (Train, TRAIN | {"coins": b"c" * 65}, Fault.MALFORMED),
        (Train, TRAIN | {"coins": "text"}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"status": "Idle\n"}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"status": "x" * 33}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"loss": math.nan}, Fault.NOT_FINITE),
        (TrainReply, TRAIN_REPLY | {"loss": math.inf}, Fault.NOT_FINITE),
        (TrainReply, TRAIN_REPLY | {"tokens_per_second": -1.0}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"receipt": bytes(65537)}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"detail": "x" * 501}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"openings": [OPENING] * 65}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"openings": [OPENING | {"proof": [bytes(65)]}]}, Fault.MALFORMED),
        (TrainReply, TRAIN_REPLY | {"openings": [OPENING | {"proof": [b""] * 65}]}, Fault.MALFORMED),
        (AllReduce, ALL_REDUCE | {"plan": bytes((1 << 20) + 1)}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"accepted": 1}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"state_hash": "ab"}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"state_signature": "ab" * 129}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"state_signature": "abc"}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"included": {"5A": math.nan}}, Fault.NOT_FINITE),
        (AllReduceReply, ALL_REDUCE_REPLY | {"included": {"x" * 65: 1.0}}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"included": {str(i): 1.0 for i in range(1025)}}, Fault.MALFORMED),
        (AllReduceReply, ALL_REDUCE_REPLY | {"seconds": -math.inf}, Fault.NOT_FINITE),
        (AllReduceReply, ALL_REDUCE_REPLY | {"links": [LINK | {"seconds": math.nan}]}, Fault.NOT_FINITE),
        (AllReduceReply, ALL_REDUCE_REPLY | {"links": [LINK] * 1025}, Fault.MALFORMED),
        (IsAliveReply, ALIVE | {"epoch": -2}, Fault.MALFORMED),
        (IsAlive, {"anything": 0}, Fault.MALFORMED),
        (IsAlive, [], Fault.MALFORMED),
        (IsAlive, None, Fault.MALFORMED),
        (IsAlive, {1: 2}, Fault.MALFORMED),
        (IsAlive, {"a": msgpack.ExtType(5, b"x")}, Fault.MALFORMED),
        (IsAlive, {"a": [0] * 5000}, Fault.MALFORMED),
    ],
    ids=lambda value: repr(value)[-40:] if isinstance(value, dict) else None,
)
def test_fields_out_of_bounds_are_the_peers_fault(kind, fields, fault) -> None:
    with pytest.raises(PeerFault) as raised:
        parse(kind, fields)
    assert raised.value.fault is fault, raised.value.detail
    assert len(raised.value.detail) <= 400


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x81", b"\x80\x80", b"\xdf\xff\xff\xff\xff", b"\x91" * 100_000, b"\x81\xa1\xff\x00", b"\x80 "],
    ids=["empty", "reserved", "cut", "two values", "huge map", "deep", "no utf-8", "trailing"],
)
def test_bytes_that_are_no_message_are_malformed(raw) -> None:
    with pytest.raises(PeerFault) as raised:
        IsAlive.from_bytes(raw, 1 << 20)
    assert raised.value.fault is Fault.MALFORMED


def test_a_message_past_the_limit_is_oversized_before_it_is_parsed() -> None:
    with pytest.raises(PeerFault) as raised:
        IsAlive.from_bytes(b"\xc1" * 11, 10)
    assert raised.value.fault is Fault.OVERSIZED


def test_a_fault_does_not_echo_what_the_peer_wrote() -> None:
    with pytest.raises(PeerFault) as raised:
        parse(Train, TRAIN | {"want": "\x1b[31mred"})
    assert "red" not in raised.value.detail


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_parse_or_be_refused(raw: bytes) -> None:
    for kind in (IsAlive, Train, TrainReply, AllReduceReply):
        with contextlib.suppress(PeerFault):
            assert kind.from_bytes(raw, 200).to_bytes()


@given(
    seconds=st.floats(min_value=0, max_value=1e18),
    count=st.integers(min_value=0, max_value=2**53),
    hotkey=st.text(min_size=1, max_size=64),
)
def test_every_link_within_bounds_survives_the_wire(seconds, count, hotkey) -> None:
    link = Link(hotkey=hotkey, bytes_received=count, seconds=seconds, first_byte_s=seconds)
    assert Link.from_bytes(link.to_bytes(), 1 << 12) == link


def test_our_own_message_out_of_bounds_never_leaves() -> None:
    reply = TrainReply.model_validate(TRAIN_REPLY | {"openings": ()})
    with pytest.raises(ValueError, match="detail"):
        reply.model_copy(update={"detail": "x" * 501}).to_bytes()


def test_a_message_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Train(run_id=RUN_ID, round=0).round = 1  # type: ignore[misc]
