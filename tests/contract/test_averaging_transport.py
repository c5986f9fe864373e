"""One suite over every transport of the all-reduce."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest
import uvloop

from hivetrain.averaging.guest import Guest
from hivetrain.averaging.memory import MemoryHub
from hivetrain.averaging.swarm import Swarm, _import_hivemind
from hivetrain.averaging.transport import LinkLost, Stream, Transport
from hivetrain.errors import Fault, PeerFault

# Where a stream cannot be opened, hivemind leaves its connection to the daemon to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*StreamWriter.__del__:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),  # hivemind's importlib.resources.path
]

Pair = tuple[Transport, Transport, list[str]]
"""Who accepts, who opens, and the addresses of the first."""


@contextlib.asynccontextmanager
async def memory_pair() -> AsyncIterator[Pair]:
    hub = MemoryHub()
    one, two = hub.transport("one"), hub.transport("two")
    await one.start()
    await two.start()
    try:
        yield one, two, []
    finally:
        await two.close()
        await one.close()


@contextlib.asynccontextmanager
async def swarm_pair(bulk: bool, client_mode: bool = False) -> AsyncIterator[Pair]:
    """``client_mode``: of the one who accepts."""
    first = Swarm([], ["/ip4/127.0.0.1/tcp/0"], bulk=bulk)
    await first.start()
    opened = [first]
    try:
        one = two = Swarm(first.visible_maddrs(), ["/ip4/127.0.0.1/tcp/0"], bulk=bulk, client_mode=client_mode)
        opened.append(one)
        await one.start()
        if client_mode:
            two = first
        else:
            two = Swarm(first.visible_maddrs(), ["/ip4/127.0.0.1/tcp/0"], bulk=bulk)
            opened.append(two)
            await two.start()
        yield one, two, one.visible_maddrs()
        for swarm in (one, two):
            used, unused = swarm.bulk_traffic, swarm.libp2p_traffic
            if not bulk:
                used, unused = unused, used
            assert used.bytes_sent > 1 << 20
            assert used.bytes_received > 1 << 20
            assert unused.bytes_sent == unused.bytes_received == 0
    finally:
        for swarm in reversed(opened):
            await swarm.close()


@contextlib.asynccontextmanager
async def guest_pair() -> AsyncIterator[Pair]:
    """Two guests of two daemons, each beside another guest of its own."""
    P2P, local = _import_hivemind().P2P, ["/ip4/127.0.0.1/tcp/0"]
    one = await P2P.create(host_maddrs=local)
    two = await P2P.create(host_maddrs=local, initial_peers=await one.get_visible_maddrs())
    replicas = [await P2P.replicate(p2p.daemon_listen_maddr) for p2p in (one, two, one, two)]
    guests = [Guest(p2p, f"/test/{place // 2}", local) for place, p2p in enumerate(replicas)]
    try:
        for guest in guests:
            await guest.start()
        guests[2].set_acceptor(_must_not_be_asked)
        yield guests[0], guests[1], guests[0].visible_maddrs()
        assert all(guest.bulk_traffic.bytes_sent > 1 << 20 for guest in guests[:2])
        assert all(guest.libp2p_traffic.streams == 0 for guest in guests)
    finally:
        for guest in guests:
            await guest.close()
        for p2p in (*replicas, two, one):
            await p2p.shutdown()


async def _must_not_be_asked(stream: Stream) -> None:
    raise AssertionError("a stream came to another guest of the daemon")


PAIRS = {
    "memory": memory_pair,
    "swarm over libp2p": lambda: swarm_pair(bulk=False),
    "swarm over bulk": lambda: swarm_pair(bulk=True),
    "guests of others' daemons": guest_pair,
    "swarm that dials back": lambda: swarm_pair(bulk=True, client_mode=True),
}
Check = Callable[[Transport, Transport, list[str]], Coroutine[None, None, None]]


async def frames_arrive_whole_and_in_order(here: Transport, there: Transport, maddrs: list[str]) -> None:
    async def echo(stream: Stream) -> None:
        assert stream.remote_peer_id == there.peer_id
        for _ in range(4):
            await stream.send(await stream.receive(4 << 20))

    here.set_acceptor(echo)
    stream = await there.open(here.peer_id, maddrs, 5.0)
    assert stream.remote_peer_id == here.peer_id
    for frame in (b"a", b"", bytes(range(256)) * 4096, memoryview(bytearray(b"xyz"))[1:]):
        await stream.send(frame)
        assert await stream.receive(4 << 20) == bytes(frame)
    with pytest.raises(LinkLost):
        await stream.receive(10)
    await stream.close()
    await stream.close()


async def frame_that_is_too_long_is_refused(here: Transport, there: Transport, maddrs: list[str]) -> None:
    async def speak(stream: Stream) -> None:
        await stream.send(b"0123456789")

    here.set_acceptor(speak)
    stream = await there.open(here.peer_id, maddrs, 5.0)
    with pytest.raises(PeerFault) as refused:
        await stream.receive(9)
    assert refused.value.fault is Fault.OVERSIZED
    await stream.close()


async def frames_that_others_follow_come_first_and_are_never_kept_back_for_good(
    here: Transport, there: Transport, maddrs: list[str]
) -> None:
    async def speak(stream: Stream) -> None:
        await stream.send(b"header", more=True)
        await stream.send(b"another", more=True)
        await stream.send(bytes(1 << 20))
        await stream.send(bytes(1 << 20), more=True)  # too long to wait for anybody
        assert await stream.receive(10) == b"all here"
        await stream.send(b"nothing follows", more=True)

    here.set_acceptor(speak)
    stream = await there.open(here.peer_id, maddrs, 5.0)
    frames = [await stream.receive(1 << 20) for _ in range(4)]
    assert frames == [b"header", b"another", bytes(1 << 20), bytes(1 << 20)]
    await stream.send(b"all here")
    assert await stream.receive(100) == b"nothing follows"
    with pytest.raises(LinkLost):
        await stream.receive(10)
    await stream.close()


async def what_was_sent_before_the_end_arrives(here: Transport, there: Transport, maddrs: list[str]) -> None:
    async def speak(stream: Stream) -> None:
        for _ in range(5):
            await stream.send(b"x" * 1000)

    here.set_acceptor(speak)
    stream = await there.open(here.peer_id, maddrs, 5.0)
    for _ in range(5):
        assert len(await stream.receive(1000)) == 1000
    with pytest.raises(LinkLost):
        await stream.receive(1000)
    await stream.close()


async def last_words_arrive_though_the_peer_is_not_read(here: Transport, there: Transport, maddrs: list[str]) -> None:
    async def refuse(stream: Stream) -> None:
        await stream.receive(1 << 20)
        await stream.send(b"refused")

    here.set_acceptor(refuse)
    for _ in range(10):
        stream = await there.open(here.peer_id, maddrs, 5.0)
        with contextlib.suppress(LinkLost):
            for _ in range(20):
                await stream.send(bytes(1 << 16))
        assert await stream.receive(10) == b"refused"
        await stream.close()


async def closed_stream_ends_at_the_other_end(here: Transport, there: Transport, maddrs: list[str]) -> None:
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def listen(stream: Stream) -> None:
        try:
            await stream.receive(10)
        except LinkLost:
            ended.set_result(True)

    here.set_acceptor(listen)
    stream = await there.open(here.peer_id, maddrs, 5.0)
    await stream.close()
    assert await asyncio.wait_for(ended, 5.0)


async def without_an_acceptor_streams_are_refused(here: Transport, there: Transport, maddrs: list[str]) -> None:
    async def talk() -> None:
        stream = await there.open(here.peer_id, maddrs, 5.0)
        await stream.send(b"hello")
        await stream.receive(10)

    with pytest.raises(LinkLost):
        await talk()


async def unknown_peer_cannot_be_reached(here: Transport, there: Transport, maddrs: list[str]) -> None:
    unknown = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
    for peer_id, addresses in ((unknown, ["/ip4/127.0.0.1/tcp/9"]), (unknown, []), ("not a peer id", ["nonsense"])):
        with pytest.raises(LinkLost):
            await there.open(peer_id, addresses, 2.0)


async def only_one_acceptor_at_a_time(here: Transport, there: Transport, maddrs: list[str]) -> None:
    async def ignore(stream: Stream) -> None:
        return

    here.set_acceptor(ignore)
    with pytest.raises(ValueError, match="acceptor"):
        here.set_acceptor(ignore)
    here.set_acceptor(None)
    here.set_acceptor(ignore)
    here.set_acceptor(None)


async def reader_that_is_slow_holds_the_sender_back(here: Transport, there: Transport, maddrs: list[str]) -> None:
    go = asyncio.Event()

    async def listen(stream: Stream) -> None:
        await go.wait()
        with contextlib.suppress(LinkLost):
            while True:
                await stream.receive(1 << 20)

    here.set_acceptor(listen)
    stream = await there.open(here.peer_id, maddrs, 5.0)
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while sent < 200:
            await stream.send(bytes(1 << 20))
            sent += 1

    flooding = asyncio.create_task(flood())
    last = -1
    while last != sent:  # until nothing moves any more
        last = sent
        await asyncio.sleep(0.3)
    assert sent < 200
    go.set()
    await flooding
    await stream.close()


CHECKS = [
    frames_arrive_whole_and_in_order,
    frames_that_others_follow_come_first_and_are_never_kept_back_for_good,
    frame_that_is_too_long_is_refused,
    what_was_sent_before_the_end_arrives,
    last_words_arrive_though_the_peer_is_not_read,
    closed_stream_ends_at_the_other_end,
    unknown_peer_cannot_be_reached,
    only_one_acceptor_at_a_time,
    reader_that_is_slow_holds_the_sender_back,
    without_an_acceptor_streams_are_refused,
]


SLOW = {"swarm over libp2p", "swarm that dials back", "guests of others' daemons"}
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PAIRS]


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("name", NAMES)
def test_transport_keeps_its_contract(name: str, make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        async with PAIRS[name]() as (here, there, maddrs):
            for check in CHECKS:
                await check(here, there, maddrs)
                here.set_acceptor(None)
            assert here.alive
            assert there.alive
        assert not here.alive
        assert not there.alive

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main())
