"""The wire's bytes, pinned: what another implementation must produce and accept.

The msgpack bytes are assembled by hand from https://github.com/msgpack/msgpack/blob/master/spec.md; the signatures
were made once with the well-known development keys //Alice and //Bob (sr25519 signatures are randomised, so they
are checked, not reproduced).
"""

from __future__ import annotations

import hashlib
import struct

import pytest
from bittensor import http_auth
from bittensor.wallets import Keypair

from template import wire
from template.protocol import (
    AllReduce,
    AllReduceReply,
    IsAlive,
    IsAliveReply,
    Link,
    MemberFault,
    Message,
    Opening,
    RemainderOpening,
    Train,
    TrainReply,
)

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
BOB = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
NONCE = 1_700_000_000_000_000_001
RUN_ID = "ab" * 32
HEX64 = b"\xd9\x40" + b"ab" * 32  # str 8, 64 bytes


def f64(value: float) -> bytes:
    return b"\xcb" + struct.pack(">d", value)


MESSAGES: list[tuple[Message, bytes]] = [
    (IsAlive(), b"\x80"),
    (
        IsAliveReply(version=10, role="miner", run_id=RUN_ID, epoch=-1, round=300, state="training"),
        b"\x86\xa7version\x0a\xa4role\xa5miner\xa6run_id" + HEX64 + b"\xa5epoch\xff\xa5round\xcd\x01\x2c"
        b"\xa5state\xa8training",
    ),
    (
        Train(run_id=RUN_ID, round=7, want="open", snapshots=(0, 5), coins=b"\x00\xff"),
        b"\x85\xa6run_id" + HEX64 + b"\xa5round\x07\xa4want\xa4open\xa9snapshots\x92\x00\x05\xa5coins\xc4\x02\x00\xff",
    ),
    (
        TrainReply(
            run_id=RUN_ID,
            round=7,
            status="committed",
            epoch=2,
            step=50,
            num_steps=50,
            loss=4.5,
            receipt=b"r",
            openings=(Opening(index=1, step=10, payload=b"\x01\x02", proof=(b"\x03",)),),
            remainder=RemainderOpening(values=b"\x04", previous=b"\x05\x06"),
            steps=b"\x07",
        ),
        b"\x8d\xa6run_id" + HEX64 + b"\xa5round\x07\xa6status\xa9committed\xa5epoch\x02\xa4step\x32\xa9num_steps\x32"
        b"\xa4loss" + f64(4.5) + b"\xb1tokens_per_second\xc0\xa7receipt\xc4\x01r\xa8openings\x91"
        b"\x84\xa5index\x01\xa4step\x0a\xa7payload\xc4\x02\x01\x02\xa5proof\x91\xc4\x01\x03\xa6detail\xa0\xa9remainder"
        b"\x83\xa6values\xc4\x01\x04\xa8previous\xc4\x02\x05\x06\xa6others\xc4\x00"
        b"\xa5steps\xc4\x01\x07",
    ),
    (
        AllReduce(run_id=RUN_ID, round=7, attempt=1, plan=b"\x81", base_manifest=RUN_ID),
        b"\x87\xa6run_id"
        + HEX64
        + b"\xa5round\x07\xa7attempt\x01\xa4plan\xc4\x01\x81\xadbase_manifest"
        + HEX64
        + b"\xa4want\xa4mean\xaastate_hash\xa0",
    ),
    (
        AllReduce(run_id=RUN_ID, round=7, attempt=2, plan=b"", base_manifest=RUN_ID, want="state", state_hash=RUN_ID),
        b"\x87\xa6run_id"
        + HEX64
        + b"\xa5round\x07\xa7attempt\x02\xa4plan\xc4\x00\xadbase_manifest"
        + HEX64
        + b"\xa4want\xa5state\xaastate_hash"
        + HEX64,
    ),
    (
        AllReduceReply(
            run_id=RUN_ID,
            round=7,
            attempt=0,
            accepted=True,
            completed=False,
            state_signature="0a",
            included={"5A": 1.5},
            faults=(MemberFault(hotkey="5B", fault="absent", detail="no"),),
            bytes_sent=256,
            bytes_received=1,
            seconds=0.5,
            links=(Link(hotkey="5B", bytes_received=0, seconds=0.0, first_byte_s=0.25),),
        ),
        b"\x8e\xa6run_id" + HEX64 + b"\xa5round\x07\xa7attempt\x00\xa8accepted\xc3\xa9completed\xc2\xaastate_hash\xa0"
        b"\xafstate_signature\xa20a\xa8included\x81\xa25A" + f64(1.5) + b"\xa6faults\x91\x83\xa6hotkey\xa25B"
        b"\xa5fault\xa6absent\xa6detail\xa2no\xaabytes_sent\xcd\x01\x00\xaebytes_received\x01\xa7seconds"
        + f64(0.5)
        + b"\xa5links\x91\x84\xa6hotkey\xa25B\xaebytes_received\x00\xa7seconds"
        + f64(0.0)
        + b"\xacfirst_byte_s"
        + f64(0.25)
        + b"\xa6detail\xa0",
    ),
]


@pytest.mark.parametrize(("message", "raw"), MESSAGES, ids=lambda value: type(value).__name__)
def test_every_message_has_exactly_these_bytes_both_ways(message: Message, raw: bytes) -> None:
    assert message.to_bytes().hex() == raw.hex()
    assert type(message).from_bytes(raw, len(raw)) == message


def test_routes_are_the_paths_that_are_signed() -> None:
    assert [synapse.route for synapse in (IsAlive, Train, AllReduce)] == ["/IsAlive", "/Train", "/AllReduce"]


def test_a_request_is_signed_over_exactly_these_lines() -> None:
    expected = (
        "btauth/1\nsr25519\nPOST\n/IsAlive\n76be8b528d0075f7aae98d6fa57a6d3c83ae480a8469e668d7b0af968995ac71\n"
        f"1700000000000000001\n{ALICE}\n{BOB}"
    )
    payload = http_auth.build_payload(
        scheme="sr25519",
        method="POST",
        path="/IsAlive",
        body=b"\x80",
        nonce_ns=NONCE,
        sender_ss58=ALICE,
        receiver_ss58=BOB,
    )
    assert payload == expected.encode()


REQUEST_HEADERS = {
    "X-Bittensor-Version": "1",
    "X-Bittensor-Hotkey": ALICE,
    "X-Bittensor-Nonce": str(NONCE),
    "X-Bittensor-Receiver": BOB,
    "X-Bittensor-Signature": "0xa250ca5fe523377c04a394b050012eb70e2d923ba5fa5fd702f5f572be764061"
    "adbcec7ac7b58ca065d4a05f67c55fdbdd6350c8cd4f02e145bf46be000c8989",
}


def verify(body: bytes) -> str:
    return wire.verify_request(
        REQUEST_HEADERS,
        body,
        method="POST",
        target="/IsAlive",
        receiver=BOB,
        nonces=http_auth.InMemoryNonceStore(),
        started_ns=NONCE - 1,
        arrived_ns=NONCE + 10**9,
    )


def test_a_recorded_request_of_alice_to_bob_verifies() -> None:
    assert wire.read_claim(list(REQUEST_HEADERS.items()), receiver=BOB) == wire.Claim(hotkey=ALICE, nonce=NONCE)
    assert verify(b"\x80") == ALICE
    with pytest.raises(wire.AuthFailure, match="does not verify"):
        verify(b"\x81")


def test_a_reply_is_signed_over_exactly_these_lines_and_a_recorded_one_verifies() -> None:
    seal = wire.ReplySeal(
        status=200,
        route="/IsAlive",
        nonce=NONCE,
        sender=BOB,
        receiver=ALICE,
        body_sha256=hashlib.sha256(b"\x80").hexdigest(),
    )
    assert (
        seal.payload()
        == (
            "hivetrain-reply/1\n200\n/IsAlive\n1700000000000000001\n"
            f"{BOB}\n{ALICE}\n76be8b528d0075f7aae98d6fa57a6d3c83ae480a8469e668d7b0af968995ac71"
        ).encode()
    )
    recorded = (
        "0xc4ce5c2c39c0878264bc6c0a4594d3d576a820bdd93dc5c213c7e3300b4b9c3b"
        "c858d425abf6557ff0e1e204cb37e169bd45cccc43e7cf46d0ea3c44a402a78a"
    )
    assert seal.is_signed_by_sender(recorded)
    assert not seal.is_signed_by_sender(recorded[:-1] + "b")


def test_reply_headers_have_these_names() -> None:
    bob = Keypair.create_from_uri("//Bob")
    seal = wire.ReplySeal(status=200, route="/Train", nonce=5, sender=BOB, receiver=ALICE, body_sha256="00" * 32)
    headers = seal.headers(bob)
    assert list(headers) == ["X-Hivetrain-Nonce", "X-Hivetrain-Hotkey", "X-Hivetrain-Signature"]
    assert (headers["X-Hivetrain-Nonce"], headers["X-Hivetrain-Hotkey"]) == ("5", BOB)
    assert seal.is_signed_by_sender(headers["X-Hivetrain-Signature"])
