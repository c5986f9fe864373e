"""The dendrite against real sockets: what a peer, or somebody between, can do, and what record comes of it."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from wire_kit import (
    ALIVE,
    MINER,
    OTHER_MINER,
    TRAIN,
    TRAIN_REPLY,
    VALIDATOR,
    address,
    policy,
    serving,
)

from template import dendrite as dendrite_module
from template import wire
from template.axon import Axon, Caller
from template.dendrite import Dendrite, Failure, PeerAddress
from template.protocol import IsAlive, Message, Opening, Train

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def peer_that(talk: Talk, hotkey: str = MINER.ss58_address) -> AsyncIterator[PeerAddress]:
    """A hostile peer: ``talk`` has the raw connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield PeerAddress(hotkey=hotkey, ip="127.0.0.1", port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    length = next(int(line.split(": ")[1]) for line in lines if line.startswith("content-length"))
    return head + await reader.readexactly(length)


def nonce_of(request: bytes) -> int:
    lines = request.split(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    return next(int(line.split(": ")[1]) for line in lines if line.startswith("x-bittensor-nonce"))


def http(body: bytes, headers: dict[str, str], status: int = 200) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def sealed(request: bytes, body: bytes, *, key=MINER, sender: str | None = None, **changes) -> dict[str, str]:
    fields = {
        "status": 200,
        "route": "/IsAlive",
        "nonce": nonce_of(request),
        "sender": sender or key.ss58_address,
        "receiver": VALIDATOR.ss58_address,
        "body_sha256": wire.sha256_hex(body),
    } | changes
    return wire.ReplySeal(**fields).headers(key)


def answer(make: Callable[[bytes], bytes]) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(make(await read_request(reader)))
        await writer.drain()

    return talk


def ask(talk: Talk, *, timeout_s: float = 5.0, max_reply_bytes: int | None = None, attempts: int = 1):
    """The record that a call to a peer with this behaviour gives."""

    async def scenario():
        async with peer_that(talk) as peer, Dendrite(VALIDATOR) as dendrite:
            return await dendrite.call(
                peer, IsAlive(), timeout_s=timeout_s, max_reply_bytes=max_reply_bytes, attempts=attempts
            )

    return asyncio.run(scenario())


BODY = ALIVE.to_bytes()


def test_a_sealed_reply_is_accepted_from_any_server_that_follows_the_protocol() -> None:
    reply = ask(answer(lambda request: http(BODY, sealed(request, BODY))))
    assert reply.reply == ALIVE, reply.detail
    assert (reply.status, reply.size_bytes) == (200, len(BODY))


@pytest.mark.parametrize(
    ("make", "failure"),
    [
        (lambda r: http(BODY, {}), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, b"another body")), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY, route="/Train")), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY, status=201)), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY, nonce=nonce_of(r) - 1)), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY, receiver=OTHER_MINER.ss58_address)), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY, key=OTHER_MINER, sender=MINER.ss58_address)), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY) | {wire.HEADER_REPLY_SIGNATURE: "0x12"}), Failure.BAD_SIGNATURE),
        (lambda r: http(BODY, sealed(r, BODY, key=OTHER_MINER)), Failure.WRONG_PEER),
        (lambda r: http(b"\xc1", sealed(r, b"\xc1")), Failure.MALFORMED),
        (lambda r: http(b"\x80", sealed(r, b"\x80")), Failure.MALFORMED),
        (lambda r: http(b'{"error": "no"}', {}, 403), Failure.REFUSED),
        (lambda r: http(b"[" * 2000, {}, 403), Failure.REFUSED),
        (lambda r: http(b"", {"Location": "http://127.0.0.1:1/"}, 302), Failure.MALFORMED),
        (lambda r: http(b"\xff", {}, 500), Failure.FAILED),
        (lambda r: b"SSH-2.0-OpenSSH_9.6\r\n\r\n", Failure.MALFORMED),
        (lambda r: http(BODY, sealed(r, BODY))[:-5], Failure.UNREACHABLE),
        (lambda r: http(bytes(9000), sealed(r, bytes(9000))), Failure.OVERSIZED),
    ],
    ids=[
        "unsigned",
        "body of another",
        "route of another",
        "status of another",
        "reply to another request",
        "reply to another caller",
        "signed by another key",
        "signature too short",
        "another hotkey serves here",
        "no msgpack",
        "no such reply",
        "refused",
        "refusal that is no JSON",
        "redirect",
        "failed",
        "no HTTP",
        "cut within the body",
        "declares too much",
    ],
)
def test_what_a_peer_does_wrong_is_a_value_with_its_kind(make, failure) -> None:
    reply = ask(answer(make))
    assert reply.failure is failure, reply.detail
    assert not reply.ok
    assert reply.hotkey == MINER.ss58_address


def test_an_endless_reply_is_cut_at_the_limit() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            sent += 0x10000
            await writer.drain()

    reply = ask(flood, max_reply_bytes=1 << 20)
    assert reply.failure is Failure.OVERSIZED
    assert 1 << 20 < reply.size_bytes < 3 << 20
    assert sent < 64 << 20  # what fits into two socket buffers, not what an endless sender has


def test_a_silent_peer_is_a_timeout() -> None:
    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    assert ask(silence, timeout_s=0.2).failure is Failure.TIMEOUT


def test_a_peer_that_drips_its_reply_is_a_timeout() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reply = http(BODY, sealed(await read_request(reader), BODY))
        for byte in reply[:40]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)
        await reader.read()

    assert ask(drip, timeout_s=0.3).failure is Failure.TIMEOUT


def test_a_connection_that_breaks_is_tried_again_under_a_fresh_nonce() -> None:
    nonces: list[int] = []

    async def breaks_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await read_request(reader)
        nonces.append(nonce_of(request))
        if len(nonces) > 1:
            writer.write(http(BODY, sealed(request, BODY)))
            await writer.drain()

    assert ask(breaks_once, attempts=2).ok
    assert len(set(nonces)) == 2


def test_a_connection_that_always_breaks_is_unreachable() -> None:
    async def breaks(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await read_request(reader)

    assert ask(breaks, attempts=3).failure is Failure.UNREACHABLE


def test_a_peer_that_is_down_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    async def scenario():
        async with Dendrite(VALIDATOR) as dendrite:
            return await dendrite.call(PeerAddress(hotkey=MINER.ss58_address, ip="127.0.0.1", port=port), IsAlive())

    reply = asyncio.run(scenario())
    assert (reply.failure, reply.status) == (Failure.UNREACHABLE, 0)


@pytest.mark.parametrize(("ip", "port"), [("", 80), ("example.org", 80), ("0.0.0.0", 80), ("127.0.0.1", 0)])
def test_an_address_that_leads_nowhere_is_the_peers_fault(ip, port) -> None:
    async def scenario():
        async with Dendrite(VALIDATOR) as dendrite:
            return await dendrite.call(PeerAddress(hotkey=MINER.ss58_address, ip=ip, port=port), IsAlive())

    assert asyncio.run(scenario()).failure is Failure.UNREACHABLE


def test_a_machine_without_file_descriptors_blames_itself() -> None:
    async def scenario(peer: PeerAddress):
        async with Dendrite(VALIDATOR) as dendrite:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # every number below 3 is taken
            try:
                starved = await dendrite.call(peer, IsAlive(), timeout_s=1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return starved, await dendrite.call(peer, IsAlive(), timeout_s=0.1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        peer = PeerAddress(hotkey=MINER.ss58_address, ip="127.0.0.1", port=listening.getsockname()[1])
        starved, fed = asyncio.run(scenario(peer))
    assert starved.failure is Failure.OURS, starved.detail
    assert fed.failure is Failure.TIMEOUT  # connected, and nobody accepts


@pytest.mark.parametrize(("routed", "failure"), [(False, Failure.OURS), (True, Failure.UNREACHABLE)])
def test_an_unroutable_address_is_ours_only_when_nothing_is_routable(monkeypatch, routed, failure) -> None:
    monkeypatch.setattr(dendrite_module, "has_route", lambda: routed)

    async def scenario():
        async with Dendrite(VALIDATOR) as dendrite:
            # Broadcast: connecting a TCP socket to it is refused by our own kernel.
            peer = PeerAddress(hotkey=MINER.ss58_address, ip="255.255.255.255", port=80)
            return await dendrite.call(peer, IsAlive())

    reply = asyncio.run(scenario())
    assert reply.failure is failure, reply.detail


def test_a_reply_altered_by_a_proxy_is_a_bad_signature_and_an_untouched_one_is_not() -> None:
    async def scenario():
        async with serving() as axon:

            def through(change: Callable[[bytes], bytes]) -> Talk:
                async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    upstream, out = await asyncio.open_connection("127.0.0.1", axon.port)
                    out.write(await read_request(reader))
                    head = await upstream.readuntil(b"\r\n\r\n")
                    writer.write(change(head + await upstream.readexactly(len(BODY))))
                    await writer.drain()
                    out.close()
                    await out.wait_closed()

                return talk

            async with Dendrite(VALIDATOR) as dendrite:
                for change in (lambda raw: raw, lambda raw: raw.replace(b"training", b"idle_now")):
                    async with peer_that(through(change)) as proxy:
                        yield await dendrite.call(proxy, IsAlive())

    async def collect():
        return [reply async for reply in scenario()]

    untouched, altered = asyncio.run(collect())
    assert untouched.ok
    assert altered.failure is Failure.BAD_SIGNATURE


def test_a_reply_recorded_from_an_earlier_request_is_a_bad_signature() -> None:
    recorded: list[bytes] = []

    def first_reply_for_ever(request: bytes) -> bytes:
        recorded.append(http(BODY, sealed(request, BODY)))
        return recorded[0]

    async def scenario():
        async with peer_that(answer(first_reply_for_ever)) as peer, Dendrite(VALIDATOR) as dendrite:
            return [await dendrite.call(peer, IsAlive()) for _ in range(2)]

    first, second = asyncio.run(scenario())
    assert first.ok
    assert second.failure is Failure.BAD_SIGNATURE


def test_a_recorded_reply_with_the_new_nonce_written_in_is_a_bad_signature() -> None:
    recorded: list[dict[str, str]] = []

    def renumbered(request: bytes) -> bytes:
        recorded.append(sealed(request, BODY))
        return http(BODY, recorded[0] | {wire.HEADER_REPLY_NONCE: str(nonce_of(request))})

    async def scenario():
        async with peer_that(answer(renumbered)) as peer, Dendrite(VALIDATOR) as dendrite:
            return [await dendrite.call(peer, IsAlive()) for _ in range(2)]

    first, second = asyncio.run(scenario())
    assert first.ok
    assert second.failure is Failure.BAD_SIGNATURE


def test_many_are_asked_at_once_and_answered_in_order() -> None:
    async def silence(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async def scenario():
        async with serving() as axon, peer_that(silence) as silent, Dendrite(VALIDATOR) as dendrite:
            nobody = PeerAddress(hotkey=OTHER_MINER.ss58_address, ip="nowhere", port=1)
            return await dendrite.call_many([nobody, address(axon), silent, address(axon)], IsAlive(), timeout_s=0.5)

    replies = asyncio.run(scenario())
    assert [reply.failure for reply in replies] == [Failure.UNREACHABLE, None, Failure.TIMEOUT, None]


def test_openings_of_many_megabytes_arrive_whole() -> None:
    payload = os.urandom(3 << 20)
    opened = TRAIN_REPLY.model_copy(
        update={
            "openings": tuple(Opening(index=i, step=10 * i, payload=payload, proof=(b"\1" * 32,)) for i in range(5))
        }
    )

    async def opens(_: Train, __: Caller) -> Message:
        return opened

    async def scenario():
        async with serving(train=opens) as axon, Dendrite(VALIDATOR) as dendrite:
            whole = await dendrite.call(address(axon), TRAIN, timeout_s=20, max_reply_bytes=16 << 20)
            cut = await dendrite.call(address(axon), TRAIN, timeout_s=20)
            return whole, cut

    whole, cut = asyncio.run(scenario())
    assert whole.reply == opened
    assert cut.failure is Failure.OVERSIZED


def test_a_wrong_hotkey_for_the_address_is_refused_by_the_axon() -> None:
    async def scenario():
        async with serving() as axon, Dendrite(VALIDATOR) as dendrite:
            return await dendrite.call(address(axon, hotkey=OTHER_MINER.ss58_address), IsAlive())

    reply = asyncio.run(scenario())
    assert (reply.failure, reply.status) == (Failure.REFUSED, 401)


def test_what_a_refusal_says_is_short_and_printable() -> None:
    body = b'{"error": "\\u001b[31m' + b"x" * 1000 + b'"}'
    reply = ask(answer(lambda _: http(body, {}, 403)))
    assert reply.failure is Failure.REFUSED
    assert len(reply.detail) <= 300
    assert reply.detail.isprintable()


def test_a_callers_own_mistake_raises() -> None:
    async def scenario() -> None:
        peer = PeerAddress(hotkey=MINER.ss58_address, ip="127.0.0.1", port=1)
        with pytest.raises(RuntimeError, match="start"):
            await Dendrite(VALIDATOR).call(peer, IsAlive())
        async with Dendrite(VALIDATOR) as dendrite:
            with pytest.raises(ValueError, match="timeout_s"):
                await dendrite.call(peer, IsAlive(), timeout_s=0)
        with pytest.raises(TypeError, match="keypair"):
            Axon(object(), policy())

    asyncio.run(scenario())
