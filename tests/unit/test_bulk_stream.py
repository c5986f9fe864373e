"""Sealed frames over a TCP connection: what gets through, and what an attacker on the way can do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from hivetrain.averaging.framing import RECORD_BYTES, Clear, FrameStream
from hivetrain.averaging.sealing import TAG_BYTES, Sealer, SessionKeys
from hivetrain.averaging.transport import MAX_FRAME_BYTES, LinkLost
from hivetrain.errors import Fault, PeerFault
from tests.async_kit import run

KEYS = SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "acceptor")[0]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    for sock in (near, far):
        sock.setblocking(False)
    return near, far


def opener_end(sock: socket.socket) -> FrameStream:
    return FrameStream("acceptor", sock, Sealer(KEYS.opener_key), Sealer(KEYS.acceptor_key))


def acceptor_end(sock: socket.socket) -> FrameStream:
    return FrameStream("opener", sock, Sealer(KEYS.acceptor_key), Sealer(KEYS.opener_key))


@contextlib.asynccontextmanager
async def streams() -> AsyncIterator[tuple[FrameStream, FrameStream]]:
    near, far = tcp_pair()
    ends = opener_end(near), acceptor_end(far)
    try:
        yield ends
    finally:
        for end in ends:
            end.end()


def sealed(*frames: bytes) -> list[bytes]:
    """What the opener puts on the wire for each frame."""
    sealer, wire = Sealer(KEYS.opener_key), []
    for frame in frames:
        header, out = len(frame).to_bytes(4, "big"), bytearray(len(frame) + TAG_BYTES)
        sealer.wrap(frame, header, memoryview(out))
        wire.append(header + bytes(out))
    return wire


async def received_from(wire: bytes, frames: int, max_bytes: int = 1 << 20) -> list[bytes]:
    """What the acceptor makes of bytes after which the connection ends."""
    near, far = tcp_pair()
    with near:
        stream = acceptor_end(far)
        try:
            await asyncio.get_running_loop().sock_sendall(near, wire)
            near.shutdown(socket.SHUT_WR)
            return [await stream.receive(max_bytes) for _ in range(frames)]
        finally:
            stream.end()


async def collect(stream: FrameStream, got: list[bytes]) -> None:
    while True:
        got.append(await stream.receive(100))


def test_frames_of_every_size_arrive_whole_and_in_order_both_ways() -> None:
    sizes = [0, 1, 17, 4096, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 3 * RECORD_BYTES + 5, MAX_FRAME_BYTES]
    frames = [os.urandom(size) for size in sizes]

    async def main() -> None:
        async with streams() as (near, far):

            async def echo() -> None:
                for _ in frames:
                    await far.send(await far.receive(MAX_FRAME_BYTES))

            echoing = asyncio.create_task(echo())
            for frame in frames:
                await near.send(memoryview(frame))
                assert await near.receive(MAX_FRAME_BYTES) == frame
            await echoing

    run(main)


def test_frames_in_the_clear_begin_with_what_was_read_before() -> None:
    frames = [b"early", b"", os.urandom(RECORD_BYTES + 7), b"late"]
    wire = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)

    async def main() -> None:
        for cut in (0, 2, 4, 9, 11, 13, 5000, len(wire)):
            near, far = tcp_pair()
            stream = FrameStream("peer", far, Clear(), Clear(), early=wire[:cut])
            with near:
                sending = asyncio.create_task(asyncio.get_running_loop().sock_sendall(near, wire[cut:]))
                assert [await stream.receive(MAX_FRAME_BYTES) for _ in frames] == frames
                await sending
                await stream.send(b"answer")
                assert await asyncio.get_running_loop().sock_recv(near, 100) == b"\x00\x00\x00\x06answer"
            stream.end()

    run(main)


def test_what_arrived_is_read_though_sending_has_failed() -> None:
    async def main() -> None:
        async with streams() as (near, far):
            await far.send(b"refused")
            far.end()
            with pytest.raises(LinkLost):
                await flood(near)
            assert await near.receive(100) == b"refused"

    async def flood(stream: FrameStream) -> None:
        while True:
            await stream.send(bytes(1 << 20))

    run(main)


def test_frame_past_the_limit_cannot_be_sent() -> None:
    async def main() -> None:
        async with streams() as (near, _):
            with pytest.raises(ValueError, match="at most"):
                await near.send(bytes(MAX_FRAME_BYTES + 1))

    run(main)


def test_frame_longer_than_allowed_is_refused_at_its_first_record() -> None:
    async def main() -> None:
        with pytest.raises(PeerFault) as refused:
            await received_from(sealed(bytes(11))[0], 1, max_bytes=10)
        assert refused.value.fault is Fault.OVERSIZED
        header, record = b"\xff" * 4, bytes(RECORD_BYTES)
        wrapped = bytearray(RECORD_BYTES + TAG_BYTES)
        Sealer(KEYS.opener_key).wrap(record, header, memoryview(wrapped))
        with pytest.raises(PeerFault) as refused:
            await received_from(header + bytes(wrapped), 1, max_bytes=1 << 40)
        assert refused.value.fault is Fault.OVERSIZED

    run(main)


@pytest.mark.parametrize("rest", [b"", sealed(bytes(9))[0][4:], bytes(RECORD_BYTES + TAG_BYTES)])
def test_length_that_its_peer_did_not_seal_is_blamed_on_nobody(rest: bytes) -> None:
    async def main() -> None:
        with pytest.raises(LinkLost):
            await received_from(b"\xff" * 4 + rest, 1, max_bytes=10)

    run(main)


def test_length_on_a_stream_that_is_not_ours_to_seal_is_refused_alone() -> None:
    async def main() -> None:
        near, far = tcp_pair()
        with near:
            stream = FrameStream("opener", far, Clear(), Clear())
            near.send((11).to_bytes(4, "big"))
            for _ in range(2):
                with pytest.raises(PeerFault) as refused:
                    await stream.receive(10)
                assert refused.value.fault is Fault.OVERSIZED
            stream.end()

    run(main)


def test_sealed_frames_open() -> None:
    async def main() -> None:
        assert await received_from(b"".join(sealed(b"one", b"two")), 2) == [b"one", b"two"]

    run(main)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda one, two: bytes([*one[:-1], one[-1] ^ 1]) + two, id="tag altered"),
        pytest.param(lambda one, two: one[:5] + bytes([one[5] ^ 1]) + one[6:] + two, id="ciphertext altered"),
        pytest.param(lambda one, two: b"\x00\x00\x00\x07" + one[4:] + two, id="length shortened"),
        pytest.param(lambda one, two: b"\x00\x00\x00\x09" + one[4:] + two, id="length stretched"),
        pytest.param(lambda one, two: two + one, id="reordered"),
        pytest.param(lambda one, two: one + one, id="repeated"),
        pytest.param(lambda one, two: two, id="dropped"),
        pytest.param(lambda one, two: one + two[:-1], id="truncated"),
        pytest.param(lambda one, two: one + two[:2], id="ended inside a length"),
        pytest.param(lambda one, two: one, id="ended between frames"),
        pytest.param(lambda one, two: b"", id="nothing"),
        pytest.param(lambda one, two: b"\x00\x00\x00\x08" + bytes(24) + two, id="made up"),
    ],
)
def test_altered_bytes_end_the_link_and_are_never_delivered(attack: Callable[[bytes, bytes], bytes]) -> None:
    frames = [b"frame 01", b"frame 02"]

    async def main() -> None:
        got: list[bytes] = []
        near, far = tcp_pair()
        with near:
            stream = acceptor_end(far)
            await asyncio.get_running_loop().sock_sendall(near, attack(*sealed(*frames)))
            near.shutdown(socket.SHUT_WR)
            with pytest.raises(LinkLost):
                await collect(stream, got)
            stream.end()
        assert got == frames[: len(got)]
        assert len(got) < 2

    run(main)


def test_frame_sent_back_to_its_sender_does_not_open() -> None:
    async def main() -> None:
        near, far = tcp_pair()
        with far:
            stream = opener_end(near)
            await asyncio.get_running_loop().sock_sendall(far, sealed(b"mine")[0])
            with pytest.raises(LinkLost, match="did not seal"):
                await stream.receive(100)
            stream.end()

    run(main)


def test_keys_differ_by_direction_secret_and_peers() -> None:
    others = [
        SessionKeys.derive(b"A" * 32, b"b" * 32, "opener", "acceptor")[0],
        SessionKeys.derive(b"a" * 32, b"B" * 32, "opener", "acceptor")[0],
        SessionKeys.derive(b"a" * 32, b"b" * 32, "other", "acceptor")[0],
        SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "other")[0],
    ]
    values = [
        value for keys in (KEYS, *others) for value in (keys.token, keys.ready, keys.opener_key, keys.acceptor_key)
    ]
    assert len(set(values)) == 4 * 5
    assert SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "acceptor")[0] == KEYS


def test_tickets_follow_from_the_same_secrets_and_share_no_key() -> None:
    keys = SessionKeys.derive(b"a" * 32, b"b" * 32, "opener", "acceptor", num_tickets=32)
    assert keys[0] == KEYS
    secrets = {part for one in keys for part in (one.token, one.ready, one.opener_key, one.acceptor_key)}
    assert len(secrets) == 4 * 33


def test_peer_that_dies_in_mid_frame_is_a_lost_link_for_receiver_and_sender() -> None:
    async def main() -> None:
        async with streams() as (near, far):
            sending = asyncio.create_task(near.send(bytes(MAX_FRAME_BYTES)))
            receiving = asyncio.create_task(near.receive(10))
            await asyncio.sleep(0)
            far.end()
            with pytest.raises(LinkLost):
                await sending
            with pytest.raises(LinkLost):
                await receiving

    run(main)


def test_cancelled_receive_loses_nothing() -> None:
    frame = os.urandom(RECORD_BYTES + 100)

    async def main() -> None:
        near, far = tcp_pair()
        with near:
            stream, wire = acceptor_end(far), b""
            sealer = Sealer(KEYS.opener_key)
            for record in (frame[:RECORD_BYTES], frame[RECORD_BYTES:]):
                out = bytearray(len(record) + TAG_BYTES)
                sealer.wrap(record, len(frame).to_bytes(4, "big"), memoryview(out))
                wire += bytes(out)
            wire = len(frame).to_bytes(4, "big") + wire
            for piece in (wire[:2], wire[2:1000], wire[1000 : RECORD_BYTES + 50]):
                receiving = asyncio.create_task(stream.receive(MAX_FRAME_BYTES))
                await asyncio.get_running_loop().sock_sendall(near, piece)
                for _ in range(5):
                    await asyncio.sleep(0)
                receiving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await receiving
            await asyncio.get_running_loop().sock_sendall(near, wire[RECORD_BYTES + 50 :])
            assert await stream.receive(MAX_FRAME_BYTES) == frame
            stream.end()

    run(main)


@pytest.mark.parametrize("then", ["send", "close"])
def test_cancelled_send_goes_out_before_what_follows(then: str) -> None:
    async def main() -> None:
        async with streams() as (near, far):
            frame = bytearray(os.urandom(MAX_FRAME_BYTES))
            expected, sent = bytes(frame), 0
            while True:  # until the kernel takes no more
                sending = asyncio.create_task(near.send(frame))
                done, _ = await asyncio.wait({sending}, timeout=0.2)
                if not done:
                    break
                sent += 1
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            frame[:] = bytes(MAX_FRAME_BYTES)  # the caller's buffer is its own again
            more = asyncio.create_task(near.send(b"next") if then == "send" else near.close())
            for _ in range(sent + 1):
                assert await far.receive(MAX_FRAME_BYTES) == expected
            if then == "send":
                assert await far.receive(10) == b"next"
            else:
                with pytest.raises(LinkLost):
                    await far.receive(10)
            await more

    run(main)


def test_close_wakes_whoever_waits_on_either_end() -> None:
    async def main() -> None:
        async with streams() as (near, far):
            waiting = [asyncio.create_task(end.receive(10)) for end in (near, far)]
            await asyncio.sleep(0)
            await near.close()
            await near.close()
            for task in waiting:
                with pytest.raises(LinkLost):
                    await task
            with pytest.raises(LinkLost):
                await near.send(b"late")
            with pytest.raises(LinkLost):
                await near.receive(10)

    run(main)


def test_last_words_arrive_though_the_peers_bytes_stay_unread() -> None:
    async def main() -> None:
        async with streams() as (near, far):
            for _ in range(3):
                await near.send(bytes(1000))
            await far.send(b"refused")
            await far.close()
            assert await near.receive(100) == b"refused"

    run(main)


def test_closed_ends_give_back_their_sockets() -> None:
    async def main() -> None:
        ended: asyncio.Queue[FrameStream] = asyncio.Queue()
        near, far = tcp_pair()
        ends = [
            FrameStream("far", near, Sealer(KEYS.opener_key), Sealer(KEYS.acceptor_key), on_end=ended.put_nowait),
            FrameStream("near", far, Sealer(KEYS.acceptor_key), Sealer(KEYS.opener_key), on_end=ended.put_nowait),
        ]
        for end in ends:
            await end.close()
        assert {await ended.get(), await ended.get()} == set(ends)
        assert near.fileno() == far.fileno() == -1
        ends[0].end()
        assert ended.empty()

    run(main)


def test_socket_of_a_peer_that_never_hangs_up_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hivetrain.averaging.framing.LINGER_S", 0.05)

    async def main() -> None:
        near, far = tcp_pair()
        ended = asyncio.Event()
        stream = FrameStream(
            "far", near, Sealer(KEYS.opener_key), Sealer(KEYS.acceptor_key), on_end=lambda _: ended.set()
        )
        with far:
            await stream.close()
            await ended.wait()
            assert near.fileno() == -1

    run(main)


def test_stream_that_always_has_bytes_leaves_turns_to_other_tasks() -> None:
    async def main() -> None:
        async with streams() as (near, far):
            turns, done = 0, False

            async def count() -> None:
                nonlocal turns
                while not done:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count())
            frame = bytes(100 << 10)
            await near.send(frame)  # fits into the kernel's buffers, as all that follow do
            for _ in range(50):
                await near.send(frame)
                await far.receive(1 << 20)
            done = True
            await counting
            assert turns > 50

    run(main)
