"""Real swarms whose peers cannot dial each other, and what a closed swarm leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest

from hivetrain.averaging.swarm import Swarm
from hivetrain.averaging.transport import LinkLost, Stream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),  # hivemind's importlib.resources.path
]

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
FRAME = os.urandom(1 << 20)


def open_sockets() -> set[str]:
    """Inodes of the sockets that this process holds."""
    gc.collect()
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


async def echo(stream: Stream) -> None:
    while True:
        try:
            await stream.send(await stream.receive(1 << 20))
        except LinkLost:
            return


async def there_and_back(here: Swarm, there: Swarm) -> None:
    stream = await there.open(here.peer_id, here.visible_maddrs(), 20.0)
    await stream.send(FRAME)
    assert await stream.receive(1 << 20) == FRAME
    await stream.close()


def test_frames_stay_on_libp2p_where_the_endpoint_is_dead_and_the_opener_has_none() -> None:
    async def main() -> None:
        here = Swarm([], [LOOPBACK], announce_bulk=["127.0.0.1:9"])
        await here.start()
        there = Swarm(here.visible_maddrs(), [LOOPBACK], client_mode=True)
        try:
            await there.start()
            here.set_acceptor(echo)
            for _ in range(2):
                await there_and_back(here, there)
            for swarm in (here, there):
                assert swarm.bulk_traffic.streams == 0
                assert swarm.libp2p_traffic.streams == 2
                assert swarm.libp2p_traffic.bytes_sent == swarm.libp2p_traffic.bytes_received == 2 * len(FRAME)
        finally:
            await there.close()
            await here.close()

    asyncio.run(main())


def test_later_streams_need_no_libp2p_until_the_peer_has_forgotten_us(tmp_path: Path) -> None:
    async def main() -> None:
        identity = tmp_path / "there.key"
        here, there = Swarm([], [LOOPBACK]), Swarm([], [LOOPBACK], identity_path=identity)
        asked = 0
        try:
            await here.start()
            await there.start()
            there.set_acceptor(echo, {here.peer_id})
            real = here._p2p.call_binary_stream_handler

            async def count(*arguments: object) -> object:
                nonlocal asked
                asked += 1
                return await real(*arguments)

            here._p2p.call_binary_stream_handler = count
            for _ in range(5):
                await there_and_back(there, here)
            assert asked == 1
            assert here.bulk_traffic.streams == 5
            there.set_acceptor(None)
            with pytest.raises(LinkLost):  # whoever has no round takes no stream, ticket or not
                await there_and_back(there, here)
            await there.close()
            there = Swarm([], [LOOPBACK], identity_path=identity)
            await there.start()
            there.set_acceptor(echo)
            await there_and_back(there, here)
            assert asked == 2
            assert here.libp2p_traffic.streams == 0
        finally:
            await here.close()
            await there.close()

    asyncio.run(main())


def test_peer_that_names_no_address_is_asked_over_the_connection_that_it_made() -> None:
    async def main() -> None:
        here = Swarm([], [LOOPBACK])
        await here.start()
        there = Swarm(here.visible_maddrs(), [LOOPBACK], client_mode=True)
        try:
            await there.start()
            here.set_acceptor(echo, {there.peer_id})
            there.set_acceptor(echo, {here.peer_id})
            await there_and_back(here, there)
            stream = await here.open(there.peer_id, (), 20.0)
            await stream.send(FRAME)
            assert await stream.receive(1 << 20) == FRAME
            await stream.close()
        finally:
            await there.close()
            await here.close()

    asyncio.run(main())


def test_peer_behind_a_dead_endpoint_dials_back() -> None:
    async def main() -> None:
        here = Swarm([], [LOOPBACK], announce_bulk=["127.0.0.1:9"])
        await here.start()
        there = Swarm(here.visible_maddrs(), [LOOPBACK])
        try:
            await there.start()
            here.set_acceptor(echo)
            await there_and_back(here, there)
            assert here.bulk_traffic.bytes_sent == there.bulk_traffic.bytes_sent == len(FRAME)
            assert here.libp2p_traffic.bytes_sent == 0
        finally:
            await there.close()
            await here.close()

    asyncio.run(main())


def test_closed_swarm_ends_every_stream_and_leaves_no_socket_and_no_task() -> None:
    before = open_sockets()

    async def main() -> None:
        here = Swarm([], [LOOPBACK])
        await here.start()
        there = Swarm(here.visible_maddrs(), [LOOPBACK])
        await there.start()
        here.set_acceptor(echo)
        idle = [await there.open(here.peer_id, here.visible_maddrs(), 20.0) for _ in range(3)]
        waiting = asyncio.create_task(idle[0].receive(10))
        await there_and_back(here, there)
        await there.close()
        await here.close()
        with pytest.raises(LinkLost):
            await waiting
        with pytest.raises(LinkLost):
            await idle[1].send(b"late")
        ours = [task for task in asyncio.all_tasks() if "averaging" in str(task.get_coro())]
        assert not ours

    asyncio.run(main())
    assert open_sockets() <= before
