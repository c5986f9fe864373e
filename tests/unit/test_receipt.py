"""Receipts: what a stranger's bytes must be, what the sums must say, and what opens a root."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
import torch

from hivetrain.errors import Fault, PeerFault
from hivetrain.training.state import Snapshot
from hivetrain.verification.receipt import (
    MAX_RECEIPT_BYTES,
    Expected,
    Receipt,
    SnapshotTree,
    check_opening,
    check_receipt,
    decode_snapshot,
    encode_snapshot,
    parse_receipt,
    sign_receipt,
    snapshot_size_bytes,
    snapshot_steps,
)
from tests.keys import TestIdentity, verify

ME = TestIdentity(1)
OTHER = TestIdentity(2)
NUM_PARAMS = 3

EXPECTED = Expected(
    run_id="01" * 32,
    round=7,
    epoch=5,
    base_manifest="02" * 32,
    base_state="03" * 32,
    schema_hash="04" * 32,
    layout_hash="05" * 32,
    num_chunks=660,
    rank=2,
    max_steps=50,
    snapshot_every=10,
    samples_per_step=4,
    tokens_per_step=256,
)


def receipt(**changes: object) -> Receipt:
    fields: dict[str, object] = {
        "run_id": "01" * 32,
        "round": 7,
        "epoch": 5,
        "base_manifest": "02" * 32,
        "base_state": "03" * 32,
        "schema_hash": "04" * 32,
        "layout_hash": "05" * 32,
        "hotkey": ME.hotkey,
        "rank": 2,
        "num_steps": 45,
        "num_samples": 180,
        "num_tokens": 45 * 256,
        "loss": 4.5,
        "data_digests": ("06" * 32,),
        "steps_root": "08" * 32,
        "sketch": "00" * 1024,
        "snapshots_root": "09" * 32,
        "num_snapshots": 5,
        "payload_root": "0a" * 32,
        "num_chunks": 660,
    }
    return sign_receipt(Receipt.model_validate({**fields, **changes}), ME)


def raw(**changes: object) -> bytes:
    """The wire's JSON with fields replaced; None drops one."""
    fields = json.loads(receipt().to_bytes()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def fault_of(blob: bytes, hotkey: str = ME.hotkey) -> Fault:
    with pytest.raises(PeerFault) as caught:
        parse_receipt(blob, hotkey=hotkey, verify=verify)
    return caught.value.fault


def test_a_signed_receipt_survives_the_wire() -> None:
    assert parse_receipt(receipt().to_bytes(), hotkey=ME.hotkey, verify=verify) == receipt()


def test_a_receipt_past_the_limit_is_oversized_before_it_is_parsed() -> None:
    assert fault_of(b"{" * (MAX_RECEIPT_BYTES + 1)) is Fault.OVERSIZED


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 5000,
        raw(run_id=None),
        raw(unknown=1),
        raw(version=2),
        raw(run_id="01" * 31),
        raw(run_id="AB" * 32),
        raw(round=-1),
        raw(num_steps=0),
        raw(num_steps=1_000_001),
        raw(num_snapshots=0),
        raw(num_chunks=0),
        raw(loss=-0.1),
        raw(loss=1e5),
        raw(loss=float("nan")),
        raw(loss=float("inf")),
        raw(loss="4.5 nats"),
        raw(data_digests=["06" * 32] * 65),
        raw(data_digests=["short"]),
        raw(hotkey=""),
        raw(hotkey="x" * 65),
        raw(sketch=""),
        raw(sketch="00" * 1023),
        raw(sketch="zz" * 1024),
        raw(sketch="0000c07f" * 256),
        raw(sketch="0000807f" + "00000000" * 255),
        raw(signature="zz"),
        raw(signature="abc"),
        raw(signature="ab" * 129),
    ],
)
def test_what_is_no_receipt_is_malformed(blob: bytes) -> None:
    assert fault_of(blob) is Fault.MALFORMED


def test_an_unknown_fields_name_is_cut_in_the_message() -> None:
    with pytest.raises(PeerFault) as caught:
        parse_receipt(raw(**{"x" * 20_000: 1}), hotkey=ME.hotkey, verify=verify)
    assert len(caught.value.detail) < 300


def test_a_receipt_of_another_hotkey_is_refused_though_its_signature_is_right() -> None:
    theirs = sign_receipt(receipt(hotkey=OTHER.hotkey), OTHER)
    assert fault_of(theirs.to_bytes()) is Fault.BAD_SIGNATURE


@pytest.mark.parametrize(
    "signature",
    ["", "00" * 64, OTHER.sign(receipt().signed_bytes()).hex(), ME.sign(b"something else").hex()],
)
def test_a_signature_that_is_not_this_hotkeys_over_these_bytes_is_refused(signature: str) -> None:
    assert fault_of(raw(signature=signature)) is Fault.BAD_SIGNATURE


def test_a_field_that_was_changed_after_signing_is_seen() -> None:
    assert fault_of(raw(num_samples=181)) is Fault.BAD_SIGNATURE


def test_the_signature_itself_is_not_among_the_signed_bytes() -> None:
    assert receipt().signed_bytes() == receipt().model_copy(update={"signature": ""}).signed_bytes()


TREES = ("steps_root", "snapshots_root", "payload_root", "remainder_root", "rest_root", "carried_root")


@pytest.mark.parametrize("name", TREES)
def test_the_root_changes_with_each_of_its_trees(name: str) -> None:
    assert receipt(**{name: "ff" * 32}).root() != receipt().root()


def test_an_honest_receipt_passes() -> None:
    check_receipt(receipt(), EXPECTED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_id", "ff" * 32),
        ("round", 8),
        ("epoch", 4),
        ("base_manifest", "ff" * 32),
        ("base_state", "ff" * 32),
        ("schema_hash", "ff" * 32),
        ("layout_hash", "ff" * 32),
        ("rank", 3),
    ],
)
def test_a_receipt_of_something_else_is_of_the_wrong_schema(name: str, value: object) -> None:
    with pytest.raises(PeerFault, match=f"receipt.{name} is") as caught:
        check_receipt(receipt(**{name: value}), EXPECTED)
    assert caught.value.fault is Fault.WRONG_SCHEMA


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_chunks", 659), ("num_samples", 181), ("num_tokens", 45 * 256 + 1), ("num_snapshots", 4)],
)
def test_counts_that_do_not_add_up_are_malformed(name: str, value: int) -> None:
    with pytest.raises(PeerFault, match=f"receipt.{name} is {value}, expected") as caught:
        check_receipt(receipt(**{name: value}), EXPECTED)
    assert caught.value.fault is Fault.MALFORMED


def test_more_steps_than_the_recipe_has_are_malformed_though_all_counts_agree() -> None:
    more = receipt(num_steps=60, num_samples=240, num_tokens=60 * 256, num_snapshots=6)
    with pytest.raises(PeerFault, match=r"receipt\.num_steps is 60, expected 50") as caught:
        check_receipt(more, EXPECTED)
    assert caught.value.fault is Fault.MALFORMED
    check_receipt(more, dataclasses.replace(EXPECTED, max_steps=60))


FED = dataclasses.replace(EXPECTED, feeds_back=True)
ROOTS = {"rest_root": "aa" * 32, "carried_root": "bb" * 32}


def test_error_feedback_commits_to_what_may_follow() -> None:
    check_receipt(receipt(**ROOTS), FED)
    check_receipt(receipt(**ROOTS, remainder_root="cc" * 32), dataclasses.replace(FED, was_in=True))
    check_receipt(receipt(**ROOTS), dataclasses.replace(FED, was_in=True))


@pytest.mark.parametrize("name", ["rest_root", "carried_root"])
def test_roots_of_a_feedback_that_is_off_or_missing_ones_are_malformed(name: str) -> None:
    for committed, expected in ((receipt(**{name: "aa" * 32}), EXPECTED), (receipt(**ROOTS | {name: "0" * 64}), FED)):
        with pytest.raises(PeerFault, match=f"receipt.{name}") as caught:
            check_receipt(committed, expected)
        assert caught.value.fault is Fault.MALFORMED


@pytest.mark.parametrize("expected", [EXPECTED, dataclasses.replace(EXPECTED, was_in=True), FED])
def test_a_remainder_that_follows_from_nothing_is_malformed(expected: Expected) -> None:
    roots = ROOTS if expected.feeds_back else {}
    with pytest.raises(PeerFault, match="no remainder follows") as caught:
        check_receipt(receipt(**roots, remainder_root="cc" * 32), expected)
    assert caught.value.fault is Fault.MALFORMED


@pytest.mark.parametrize(
    ("num_steps", "every", "steps"),
    [
        (50, 10, [10, 20, 30, 40, 50]),
        (45, 10, [10, 20, 30, 40, 45]),
        (9, 10, [9]),
        (1, 1, [1]),
        (3, 1, [1, 2, 3]),
        (11, 10, [10, 11]),
    ],
)
def test_snapshots_are_every_k_steps_and_the_last(num_steps: int, every: int, steps: list[int]) -> None:
    assert snapshot_steps(num_steps, every) == steps


def snapshot(step: int) -> Snapshot:
    values = torch.arange(3 * NUM_PARAMS, dtype=torch.float32).view(3, NUM_PARAMS) + step
    return Snapshot(step=step, vector=values[0], exp_avg=values[1], exp_avg_sq=values[2])


def test_a_snapshot_survives_its_encoding() -> None:
    found = decode_snapshot(encode_snapshot(snapshot(20)).payload, NUM_PARAMS)
    assert found.step == 20
    for name in ("vector", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(found, name), getattr(snapshot(20), name))


def test_a_claim_of_nan_is_decoded_for_replay_to_judge() -> None:
    payload = struct.pack("<Q", 4) + struct.pack("<f", float("nan")) * (3 * NUM_PARAMS)
    assert bool(decode_snapshot(payload, NUM_PARAMS).vector.isnan().all())


@pytest.mark.parametrize(("change", "fault"), [(-1, Fault.TRUNCATED), (-44, Fault.TRUNCATED), (1, Fault.OVERSIZED)])
def test_a_snapshot_of_another_size_is_refused(change: int, fault: Fault) -> None:
    size = snapshot_size_bytes(NUM_PARAMS)
    with pytest.raises(PeerFault, match=f"snapshot is {size + change} bytes, expected {size}") as caught:
        decode_snapshot(bytes(size + change), NUM_PARAMS)
    assert caught.value.fault is fault


TREE = SnapshotTree([encode_snapshot(snapshot(step)) for step in (10, 20, 30, 40, 45)])
COMMITTED = receipt(snapshots_root=TREE.root)


@pytest.mark.parametrize("index", range(5))
def test_every_snapshot_opens_the_receipts_root(index: int) -> None:
    opened, proof = TREE.open(index)
    assert opened == TREE.snapshots[index]
    check_opening(COMMITTED, index, opened.payload, proof)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_snapshot_that_is_not_there_cannot_be_opened(index: int) -> None:
    with pytest.raises(IndexError, match=f"snapshot {index} of 5"):
        TREE.open(index)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "what", ["payload", "index", "proof", "short proof", "long proof", "no digest", "root", "count"]
)
def test_anything_wrong_about_an_opening_does_not_open(what: str) -> None:
    opened, proof = TREE.open(2)
    index, payload, committed = 2, opened.payload, COMMITTED
    match what:
        case "payload":
            payload = flipped(payload)
        case "index":
            index = 3
        case "proof":
            proof = [flipped(proof[0]), *proof[1:]]
        case "short proof":
            proof = proof[:-1]
        case "long proof":
            proof = [*proof, bytes(32)]
        case "no digest":
            proof = [proof[0][:-1], *proof[1:]]
        case "root":
            committed = receipt(snapshots_root="ff" * 32)
        case "count":
            committed = receipt(snapshots_root=TREE.root, num_snapshots=6)
    with pytest.raises(PeerFault) as caught:
        check_opening(committed, index, payload, proof)
    assert caught.value.fault is Fault.NOT_COMMITTED
