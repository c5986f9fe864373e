"""A receipt's bytes, pinned: what is signed, what the root is, what travels.

Everything expected here is made with json, hashlib and struct alone, from docs/protocol.md. The signature was made
once with the well-known development key //Alice (sr25519 signatures are randomised, so it is checked, not reproduced).
"""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from bittensor.wallets import Keypair

from hivetrain.contribution import codec_seed
from hivetrain.errors import Fault, PeerFault
from hivetrain.training.state import Snapshot
from hivetrain.verification.receipt import Receipt, encode_snapshot, parse_receipt, sign_receipt, step_record
from hivetrain.verification.sketch import count_sketch, sketch_seed, to_hex
from template.chain.keys import verify

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
FIELDS: dict[str, object] = {
    "version": 1,
    "run_id": "01" * 32,
    "round": 7,
    "epoch": 5,
    "base_manifest": "02" * 32,
    "base_state": "03" * 32,
    "schema_hash": "04" * 32,
    "layout_hash": "05" * 32,
    "hotkey": ALICE,
    "rank": 2,
    "num_steps": 50,
    "num_samples": 200,
    "num_tokens": 12800,
    "loss": 4.5,
    "data_digests": ["06" * 32, "07" * 32],
    "steps_root": "08" * 32,
    "snapshots_root": "09" * 32,
    "num_snapshots": 5,
    "payload_root": "0a" * 32,
    "num_chunks": 660,
    "remainder_root": "0b" * 32,
    "rest_root": "0c" * 32,
    "carried_root": "0d" * 32,
    "sketch": "0000803f" * 256,
}
SIGNED = b"hivetrain-receipt/1\n" + json.dumps(FIELDS, sort_keys=True, separators=(",", ":")).encode()
SIGNED_SHA256 = "691c48e9ffdd331a2d12e7e05592e66c1d6d6f79c100998d8f8c037233020604"
ROOT = "0b94583f55428b133d3dfdf32bbcc7e126603653d9c44c5124570ca89f7301b2"
SIGNATURE = (
    "520dd553833dbc21b3e6860555bafe1cfb6682766510487fec09cbc3b1934f4c"
    "f70b444370c752c661f9e6b8e18d6f06340b544a51694825c20513077e46c480"
)
WIRE_SHA256 = "913d00173b5b4f6c058967d96b542447e8f6b96c598213d95272ef927eec54c1"


def receipt() -> Receipt:
    return Receipt.model_validate({**FIELDS, "signature": SIGNATURE})


def test_the_signed_bytes_are_a_tag_and_sorted_json_without_the_signature() -> None:
    assert receipt().signed_bytes() == SIGNED
    assert hashlib.sha256(SIGNED).hexdigest() == SIGNED_SHA256
    assert SIGNED.startswith(b'hivetrain-receipt/1\n{"base_manifest":"0202')


def test_the_root_binds_steps_snapshots_payload_and_remainders_in_this_order() -> None:
    trees = b"".join(bytes([number]) * 32 for number in (8, 9, 10, 11, 12, 13))
    assert receipt().root() == hashlib.sha256(b"hivetrain-root/1" + trees).hexdigest() == ROOT


def test_a_manifest_names_a_receipt_by_the_digest_of_its_signed_bytes() -> None:
    assert receipt().sha256() == SIGNED_SHA256


def test_the_bytes_on_the_wire_are_the_same_json_with_the_signature() -> None:
    wire = json.dumps({**FIELDS, "signature": SIGNATURE}, sort_keys=True, separators=(",", ":")).encode()
    assert receipt().to_bytes() == wire
    assert hashlib.sha256(wire).hexdigest() == WIRE_SHA256


def test_alices_signature_of_then_is_accepted_now() -> None:
    assert parse_receipt(receipt().to_bytes(), hotkey=ALICE, verify=verify) == receipt()


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"version", "hotkey"}))
def test_the_signature_covers_every_field(name: str) -> None:
    value = FIELDS[name]
    if isinstance(value, list):
        other: object = value[::-1][:1]
    else:
        other = "ee" * (len(value) // 2) if isinstance(value, str) else value + 1  # type: ignore[operator]
    raw = json.dumps({**FIELDS, "signature": SIGNATURE, name: other}).encode()
    with pytest.raises(PeerFault) as caught:
        parse_receipt(raw, hotkey=ALICE, verify=verify)
    assert caught.value.fault is Fault.BAD_SIGNATURE


def test_a_fresh_signature_is_accepted_as_well() -> None:
    class Alice:
        hotkey = ALICE

        def sign(self, message: bytes) -> bytes:
            return bytes(Keypair.create_from_uri("//Alice").sign(message))

    signed = sign_receipt(receipt().model_copy(update={"signature": ""}), Alice())
    assert len(signed.signature) == 128
    assert parse_receipt(signed.to_bytes(), hotkey=ALICE, verify=verify) == signed


def test_a_step_is_number_loss_and_pairs_in_little_endian() -> None:
    expected = bytes.fromhex("030000000000000000009040010000000200000000000000ff000000")
    assert step_record(3, [(1, 2), (0, 255)], 4.5) == expected


def test_a_snapshot_is_its_step_and_three_vectors_in_little_endian() -> None:
    snapshot = Snapshot(
        step=10,
        vector=torch.tensor([1.0, -2.0]),
        exp_avg=torch.tensor([0.5, 0.25]),
        exp_avg_sq=torch.tensor([0.0, 3.0]),
    )
    made = encode_snapshot(snapshot)
    assert made.payload == struct.pack("<Q6f", 10, 1.0, -2.0, 0.5, 0.25, 0.0, 3.0)
    assert made.digest().hex() == "fe94efa8cd8dcd424aec3a28de1f56de1179d6d652c9f42fbf90b3db5664e601"


def test_the_codecs_seed_is_seven_bytes_of_a_sha256() -> None:
    text = b"hivetrain-codec/1\n" + b"01" * 32 + b"\n7\n" + ALICE.encode()
    assert codec_seed("01" * 32, 7, ALICE) == int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def test_a_sketch_is_signed_sums_in_256_buckets_by_splitmix64() -> None:
    run, values = "01" * 32, [1.5, -0.25, 3.0, 1e-3, -7.0, 0.125]
    seed = int.from_bytes(hashlib.sha256(f"hivetrain-sketch/1\n{run}\n7".encode()).digest()[:8], "big")
    sums, mask = [0.0] * 256, 2**64 - 1
    for place, value in enumerate(values, start=1):
        z = (place * 0x9E3779B97F4A7C15 + seed) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        sums[z & 255] += -value if z >> 8 & 1 else value
    expected = struct.pack("<256f", *sums).hex()
    assert sketch_seed(run, 7) == seed
    assert to_hex(count_sketch(torch.tensor(values), seed)) == expected
