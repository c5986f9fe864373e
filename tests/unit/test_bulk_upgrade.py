"""Two peers agree on a path: over an in-memory stream, with real sockets beside it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgpack
import pytest

from hivetrain.averaging import bulk_listener, upgrade
from hivetrain.averaging.bulk_listener import BulkListener, Endpoint
from hivetrain.averaging.dialling import (
    FIRST_REST_S,
    LONGEST_REST_S,
    MAX_ENDPOINTS,
    MAX_REMEMBERED,
    DialMemory,
    candidates,
)
from hivetrain.averaging.memory import MemoryHub
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.averaging.upgrade import Choice, Hello, Offer, Reach, Upgrade, answer_upgrade, offer_upgrade
from tests.async_kit import run

HOSTS = ["127.0.0.1"]
SECRET = b"s" * 32


@dataclass(slots=True)
class World:
    """A stream between an opener and an acceptor, each with a port of its own."""

    near: Stream
    far: Stream
    opener: Reach
    acceptor: Reach

    async def agree(
        self, opener_hosts: list[str] = HOSTS, acceptor_hosts: list[str] = HOSTS
    ) -> tuple[Upgrade, Upgrade]:
        async with asyncio.TaskGroup() as group:
            offered = group.create_task(offer_upgrade(self.near, self.opener, opener_hosts))
            answered = group.create_task(answer_upgrade(self.far, self.acceptor, acceptor_hosts))
        return offered.result(), answered.result()


@contextlib.asynccontextmanager
async def world(
    opener_port: bool = True,
    acceptor_port: bool = True,
    opener_endpoints: list[Endpoint] | None = None,
    acceptor_endpoints: list[Endpoint] | None = None,
    may_dial: bool = True,
) -> AsyncIterator[World]:
    hub, far = MemoryHub(), asyncio.get_running_loop().create_future()
    opener, acceptor = hub.transport("opener"), hub.transport("acceptor")
    await opener.start()
    await acceptor.start()
    end = asyncio.Event()

    async def accept(stream: Stream) -> None:
        far.set_result(stream)
        await end.wait()

    acceptor.set_acceptor(accept)
    listeners = [BulkListener([("127.0.0.1", 0)]) for _ in range(2)]
    reaches = []
    for peer_id, has_port, endpoints, listener in zip(
        ("opener", "acceptor"),
        (opener_port, acceptor_port),
        (opener_endpoints, acceptor_endpoints),
        listeners,
        strict=True,
    ):
        listener.start()
        places = (listener.bound if has_port else []) if endpoints is None else endpoints
        reaches.append(
            Reach(peer_id=peer_id, listener=listener if has_port else None, endpoints=places, may_dial=may_dial)
        )
    try:
        near = await opener.open("acceptor", [], 1.0)
        yield World(near, await far, *reaches)
        assert all(not listener.num_pending and not listener.num_strangers for listener in listeners)
    finally:
        end.set()
        for listener in listeners:
            await listener.close()
        await opener.close()
        await acceptor.close()


async def assert_joined(offered: Upgrade, answered: Upgrade) -> None:
    """That both have the two ends of one connection, and keys that fit."""
    assert offered.sock is not None
    assert answered.sock is not None
    assert (offered.outgoing, offered.incoming) == (answered.incoming, answered.outgoing)
    with offered.sock, answered.sock:
        assert offered.sock.getsockname() == answered.sock.getpeername()
        assert offered.sock.getpeername() == answered.sock.getsockname()


def test_opener_dials_the_acceptor() -> None:
    async def main() -> None:
        async with world(opener_port=False) as here:
            await assert_joined(*await here.agree())

    run(main)


@pytest.mark.parametrize("why", ["not listening", "unknown address", "dead port"])
def test_acceptor_dials_back_where_the_opener_cannot_dial(why: str) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            dead = taken.getsockname()
        async with world(
            acceptor_port=why != "not listening", acceptor_endpoints=[dead] if why == "dead port" else None
        ) as here:
            hosts = [] if why == "unknown address" else HOSTS
            await assert_joined(*await here.agree(opener_hosts=hosts))

    run(main)


@pytest.mark.parametrize("why", ["no ports", "no dialling", "unknown addresses", "dead ports"])
def test_frames_stay_on_the_stream_where_nobody_can_dial(why: str) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            dead = [taken.getsockname()] if why == "dead ports" else None
        ports = why != "no ports"
        hosts = [] if why == "unknown addresses" else HOSTS
        async with world(ports, ports, dead, dead, may_dial=why != "no dialling") as here:
            offered, answered = await here.agree(hosts, hosts)
            assert offered.sock is None
            assert answered.sock is None
            await here.near.send(b"and it still works")
            assert await here.far.receive(100) == b"and it still works"

    run(main)


def test_impostor_at_the_offered_port_is_passed_over() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as impostor:
            place = impostor.getsockname()
            answering = asyncio.create_task(asyncio.to_thread(answer, impostor))
            async with world(acceptor_endpoints=[place]) as here:
                here.acceptor = Reach(
                    peer_id="acceptor",
                    listener=here.acceptor.listener,
                    endpoints=[place, *(here.acceptor.listener.bound if here.acceptor.listener else [])],
                )
                await assert_joined(*await here.agree())
            await answering

    def answer(impostor: socket.socket) -> None:
        sock, _ = impostor.accept()
        with sock:
            sock.recv(100)
            sock.sendall(bytes(32))

    run(main)


def hello(**changes: object) -> bytes:
    packed: bytes = msgpack.packb({"kind": "bulk_hello", "version": 1, "secret": SECRET, "endpoints": []} | changes)
    return packed


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"\x00garbage", id="no message"),
        pytest.param(hello(kind="bulk_offer"), id="another message"),
        pytest.param(hello(version=2), id="a later version"),
        pytest.param(hello(secret=b"short"), id="a short secret"),
        pytest.param(hello(endpoints=[["127.0.0.1", 1]] * 9), id="too many endpoints"),
        pytest.param(hello(endpoints=[["127.0.0.1", 70000]]), id="an impossible port"),
        pytest.param(hello(endpoints=[["h" * 100, 1]]), id="an endless host"),
        pytest.param(bytes(5000), id="a message that is too long"),
    ],
)
def test_opener_that_speaks_otherwise_is_not_answered(words: bytes) -> None:
    async def main() -> None:
        async with world() as here:
            await here.near.send(words)
            with pytest.raises(LinkLost):
                await answer_upgrade(here.far, here.acceptor, HOSTS)

    run(main)


def test_opener_that_chooses_a_connection_it_never_made_is_a_lost_link() -> None:
    async def main() -> None:
        async with world() as here:
            await here.near.send(Hello(secret=SECRET, endpoints=[]).to_bytes())
            await here.near.send(Choice(bulk=True).to_bytes())
            with pytest.raises(LinkLost, match="there is not"):
                await answer_upgrade(here.far, here.acceptor, HOSTS)

    run(main)


def test_connection_that_its_opener_does_not_choose_is_closed() -> None:
    async def main() -> None:
        async with world() as here:
            answering = asyncio.create_task(answer_upgrade(here.far, here.acceptor, HOSTS))
            await here.near.send(Hello(secret=SECRET, endpoints=[]).to_bytes())
            offer = Offer.model_validate(msgpack.unpackb(await here.near.receive(1000)))
            keys = upgrade.SessionKeys.derive(SECRET, offer.secret, "opener", "acceptor")[0]
            with await bulk_listener.dial(offer.endpoints[0], keys) as sock:
                await here.near.send(Choice(bulk=False).to_bytes())
                assert (await answering).sock is None
                assert not await asyncio.get_running_loop().sock_recv(sock, 10)

    run(main)


def test_peer_that_falls_silent_or_away_is_a_lost_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "NEGOTIATION_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with world() as here:
            with pytest.raises(LinkLost, match="did not agree"):
                await offer_upgrade(here.near, here.opener, HOSTS)
        async with world() as here:
            with pytest.raises(LinkLost, match="did not agree"):
                await answer_upgrade(here.far, here.acceptor, HOSTS)
        async with world() as here:
            await here.far.close()
            with pytest.raises(LinkLost, match="no path"):
                await offer_upgrade(here.near, here.opener, HOSTS)

    run(main)


def test_a_peer_is_dialled_at_no_address_but_its_own() -> None:
    offered = [("10.0.0.5", 1), ("192.0.2.7", 2), ("127.0.0.1", 22)]
    assert candidates(offered, ["192.0.2.7", "198.51.100.1"]) == [
        ("192.0.2.7", 2),
        ("192.0.2.7", 1),
        ("192.0.2.7", 22),
    ]
    assert candidates(offered, ["203.0.113.9", "10.0.0.5"]) == [
        ("10.0.0.5", 1),
        ("203.0.113.9", 1),
        ("203.0.113.9", 2),
        ("203.0.113.9", 22),
    ]
    assert candidates(offered, []) == []
    assert candidates([], ["192.0.2.7"]) == []
    many = [("192.0.2.7", port) for port in range(1, 30)]
    assert len(candidates(many, ["192.0.2.7"])) == MAX_ENDPOINTS


@pytest.mark.parametrize("side", ["opener", "acceptor"])
def test_an_endpoint_that_did_not_answer_is_left_in_peace_by_either_side(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[Endpoint] = []
    clock = [0.0]

    async def filtered(place: Endpoint, *_: object) -> socket.socket:
        dialled.append(place)
        raise TimeoutError

    monkeypatch.setattr("hivetrain.averaging.dialling.dial", filtered)
    place = ("127.0.0.1", 9)

    async def main() -> None:
        memory = DialMemory(lambda: clock[0])
        ports = {"opener_endpoints": [] if side == "opener" else [place]}
        ports["acceptor_endpoints"] = [place] if side == "opener" else []
        for clock[0], tries in ((0.0, 1), (FIRST_REST_S - 1, 1), (FIRST_REST_S, 2)):
            async with world(**ports) as here:
                here.opener = dataclasses.replace(here.opener, memory=memory)
                here.acceptor = dataclasses.replace(here.acceptor, memory=memory)
                offered, answered = await here.agree()
            assert (offered.sock, answered.sock, dialled) == (None, None, [place] * tries)

    run(main)


def test_an_endpoint_rests_longer_each_time_and_for_its_own_peer_alone() -> None:
    now = 0.0
    memory = DialMemory(lambda: now)
    place = ("192.0.2.7", 1)
    rests = []
    for _ in range(7):
        memory.failed("peer", place)
        memory.failed("peer", place)  # of another stream, at once
        began = now
        while not memory.worth_dialling("peer", [place]):
            now += FIRST_REST_S
        rests.append(now - began)
        assert memory.worth_dialling("another", [place]) == [place]
    assert rests == [60.0, 120.0, 240.0, 480.0, 960.0, LONGEST_REST_S, LONGEST_REST_S]
    memory.failed("peer", place)
    memory.answered("peer", place)
    assert memory.worth_dialling("peer", [place]) == [place]


def test_peers_without_end_fill_no_memory() -> None:
    memory = DialMemory()
    place = ("192.0.2.7", 1)
    for number in range(MAX_REMEMBERED + 1):
        memory.failed(f"peer-{number}", place)
    assert memory.worth_dialling("peer-0", [place]) == [place]
    assert memory.worth_dialling(f"peer-{MAX_REMEMBERED}", [place]) == []
