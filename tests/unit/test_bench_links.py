"""The model of a slow, distant link: its arithmetic by hand, and that it carries bytes as they are."""

from __future__ import annotations

import asyncio
import os
import random
import socket

import pytest

from bench.links import FIRST_WINDOW_BYTES, MAX_WINDOW_BYTES, SEGMENT_BYTES, LinkProxy, PeerLink, Pipe, Window
from tests.async_kit import run


def test_bytes_leave_a_pipe_at_its_rate_one_after_another() -> None:
    pipe = Pipe(1000.0)
    assert pipe.leaves_at(100, 5.0) == pytest.approx(5.1)
    assert pipe.leaves_at(100, 5.0) == pytest.approx(5.2)
    assert pipe.leaves_at(300, 5.05) == pytest.approx(5.5)
    assert pipe.leaves_at(0, 5.1) == pytest.approx(5.5)
    assert pipe.leaves_at(100, 7.0) == pytest.approx(7.1), "idle time is not made up for"


def test_pipe_without_a_rate_holds_nothing_back() -> None:
    pipe = Pipe(None)
    assert pipe.leaves_at(1 << 40, 5.0) == 5.0


def test_line_of_a_hundred_megabits_carries_12_5_megabytes_a_second_each_way() -> None:
    line = PeerLink.of(100.0)
    assert line.up.leaves_at(12_500_000, 0.0) == pytest.approx(1.0)
    assert line.down.leaves_at(12_500_000, 0.0) == pytest.approx(1.0)


def test_window_doubles_each_round_trip_up_to_its_bound() -> None:
    window = Window(0.2, 0.0, random.Random(0))
    for doublings in range(1, 4):
        window.acknowledge(int(window.size))
        assert window.size == FIRST_WINDOW_BYTES * 2**doublings
    for _ in range(20):
        window.acknowledge(int(window.size))
    assert window.size == MAX_WINDOW_BYTES
    assert window.stall_s(1 << 20) == 0.0


def test_loss_halves_the_window_which_then_grows_by_a_segment_each_round_trip() -> None:
    window = Window(0.3, 1.0, random.Random(0))
    window.acknowledge(FIRST_WINDOW_BYTES)
    assert window.stall_s(1) == pytest.approx(0.6), "a retransmission timeout of two round trips"
    assert window.size == FIRST_WINDOW_BYTES
    window.acknowledge(int(window.size))
    assert window.size == pytest.approx(FIRST_WINDOW_BYTES + SEGMENT_BYTES)
    assert Window(0.001, 1.0, random.Random(0)).stall_s(1) == pytest.approx(0.2), "and never below 200 ms"


def test_long_pieces_are_lost_as_often_as_their_segments() -> None:
    window = Window(0.1, 0.01, random.Random(1))
    stalls = sum(window.stall_s(10 * SEGMENT_BYTES) > 0 for _ in range(10_000))
    assert stalls / 10_000 == pytest.approx(1 - 0.99**10, rel=0.05)


@pytest.mark.parametrize(("mbit_per_s", "delay_ms", "loss"), [(None, 0.0, 0.0), (200.0, 5.0, 0.0), (200.0, 1.0, 0.002)])
def test_bytes_arrive_intact_both_ways_and_the_end_after_them(
    mbit_per_s: float | None, delay_ms: float, loss: float
) -> None:
    there, back = os.urandom(1_000_003), os.urandom(300_001)

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.read(-1) == there
            writer.write(back)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        proxy = LinkProxy("127.0.0.1", server.sockets[0].getsockname()[1], mbit_per_s, delay_ms, loss)
        await proxy.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(there)
        writer.write_eof()
        assert await reader.read(-1) == back
        writer.close()
        await writer.wait_closed()
        await proxy.close()
        server.close()

    run(main)


def test_peers_share_the_line_of_whom_they_dial_and_each_uses_its_own() -> None:
    lines = {"127.0.0.2": PeerLink.of(None), "127.0.0.3": PeerLink.of(None)}
    target = PeerLink.of(None)
    carried = {id(pipe): 0 for line in (*lines.values(), target) for pipe in (line.up, line.down)}

    def count(pipe: Pipe) -> None:
        leaves_at = pipe.leaves_at

        def counted(num_bytes: int, now: float) -> float:
            carried[id(pipe)] += num_bytes
            return leaves_at(num_bytes, now)

        pipe.leaves_at = counted  # type: ignore[method-assign]

    for line in (*lines.values(), target):
        count(line.up)
        count(line.down)

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(1000) * 3)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        proxy = LinkProxy("127.0.0.1", port, None, 0.0, link=target, line_of=lines.__getitem__)
        await proxy.start()
        for address in lines:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, local_addr=(address, 0))
            writer.write(bytes(1000))
            assert len(await reader.read(-1)) == 3000
            writer.close()
            await writer.wait_closed()
        await proxy.close()
        server.close()

    run(main)
    for line in lines.values():
        assert (carried[id(line.up)], carried[id(line.down)]) == (1000, 3000)
    assert (carried[id(target.down)], carried[id(target.up)]) == (2000, 6000)


def test_proxy_to_nobody_and_a_closed_proxy_end_their_connections() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            dead = taken.getsockname()[1]
        proxy = LinkProxy("127.0.0.1", dead, 10.0, 1.0)
        with pytest.raises(ValueError, match="start"):
            _ = proxy.port
        await proxy.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read(-1) == b""
        writer.close()
        await proxy.close()

        with socket.create_server(("127.0.0.1", 0)) as silent:
            proxy = LinkProxy("127.0.0.1", silent.getsockname()[1], 10.0, 1.0)
            await proxy.start()
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            (await asyncio.to_thread(silent.accept))[0].close()
            assert await reader.read(-1) == b""
            await proxy.close()
            writer.close()

    run(main)
