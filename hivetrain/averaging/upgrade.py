"""How two peers agree, on a libp2p stream, to move their frames to a TCP connection of their own (`sealing`).

    opener    Hello       its secret, where it can be dialled
    acceptor  Offer       its secret, where it can be dialled
              the opener dials, presents the token, and hears the right answer
    opener    DialBack    where that failed and it can be dialled itself
    acceptor  Dialled     whether that worked
    opener    Choice      the path of everything that follows, for both

Secrets are fresh and have only ever been on this stream, which libp2p authenticates and encrypts. A peer is dialled at
no other address than those at which libp2p was told, or found, to reach it: it names ports, it cannot point us at
others. Whatever fails here leaves the libp2p stream as the path.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, Strict

from hivetrain.averaging.bulk_listener import BulkListener, Endpoint
from hivetrain.averaging.dialling import MAX_ENDPOINTS, DialMemory, candidates, dial_any
from hivetrain.averaging.messages import Message, receive
from hivetrain.averaging.sealing import SECRET_BYTES, SessionKeys
from hivetrain.averaging.transport import LinkLost, Stream
from hivetrain.errors import PeerFault

MAX_MESSAGE_BYTES = 4 << 10
NEGOTIATION_TIMEOUT_S = 15.0
NUM_TICKETS = 32

Secret = Annotated[bytes, Field(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
Host = Annotated[str, Field(max_length=64)]
Port = Annotated[int, Field(ge=1, lt=1 << 16)]
Place = Annotated[tuple[Host, Port], Strict(False)]  # msgpack knows no tuples
Endpoints = Annotated[list[Place], Field(max_length=MAX_ENDPOINTS)]


class Hello(Message):
    """Opener: the first message."""

    kind: Literal["bulk_hello"] = "bulk_hello"
    version: Literal[1] = 1
    secret: Secret
    endpoints: Endpoints


class Offer(Message):
    """Acceptor: its answer."""

    kind: Literal["bulk_offer"] = "bulk_offer"
    secret: Secret
    endpoints: Endpoints


class DialBack(Message):
    """Opener: dial me, I cannot dial you."""

    kind: Literal["bulk_dial_back"] = "bulk_dial_back"


class Dialled(Message):
    """Acceptor: whether it reached the opener."""

    kind: Literal["bulk_dialled"] = "bulk_dialled"
    reached: bool


class Choice(Message):
    """Opener: where the frames go."""

    kind: Literal["bulk_choice"] = "bulk_choice"
    bulk: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What a node brings to a negotiation.

    Attributes:
        peer_id: ours.
        listener: None: nobody can dial us.
        endpoints: where we say that we can be dialled.
        source: local address to dial from; None: the kernel's choice.
        may_dial: False: we dial nobody.
        memory: whom we need not dial again just now, whichever side asks.
    """

    peer_id: str
    listener: BulkListener | None
    endpoints: Sequence[Endpoint]
    source: str | None = None
    may_dial: bool = True
    memory: DialMemory = field(default_factory=DialMemory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """What was agreed.

    Attributes:
        sock: the new path, the holder's to close; None: frames stay on the libp2p stream.
        outgoing, incoming: keys of the two directions.
        tickets: for more streams of the same opener; none where it was not the opener that dialled.
    """

    sock: socket.socket | None
    outgoing: bytes
    incoming: bytes
    tickets: tuple[SessionKeys, ...] = ()


async def offer_upgrade(stream: Stream, reach: Reach, hosts: Sequence[str]) -> Upgrade:
    """The opener's half.

    Args:
        hosts: IP addresses of the peer, the likeliest first.

    Raises:
        LinkLost: the stream ended, or the peer does not speak this protocol.
    """
    secret, sock = secrets.token_bytes(SECRET_BYTES), None
    async with _negotiation(stream):
        await _say(stream, Hello(secret=secret, endpoints=list(reach.endpoints)[:MAX_ENDPOINTS]))
        offer = await receive(stream, Offer, max_bytes=MAX_MESSAGE_BYTES)
        keys, *tickets = SessionKeys.derive(
            secret, offer.secret, reach.peer_id, stream.remote_peer_id, num_tickets=NUM_TICKETS
        )
        sock = await _dial(stream, reach, offer.endpoints, hosts, keys)
        if sock is None:
            tickets = []
        if sock is None and reach.listener is not None and reach.endpoints:
            with reach.listener.expect(keys) as arrival:
                await _say(stream, DialBack())
                dialled = await receive(stream, Dialled, max_bytes=MAX_MESSAGE_BYTES)
                sock = arrival.take() if arrival and dialled.reached else None
        with _closed_on_error(sock):
            await _say(stream, Choice(bulk=sock is not None))
    return Upgrade(sock=sock, outgoing=keys.opener_key, incoming=keys.acceptor_key, tickets=tuple(tickets))


async def answer_upgrade(stream: Stream, reach: Reach, hosts: Sequence[str]) -> Upgrade:
    """The acceptor's half; see `offer_upgrade`.

    Raises:
        LinkLost: the stream ended, or the peer does not speak this protocol.
    """
    async with _negotiation(stream):
        hello = await receive(stream, Hello, max_bytes=MAX_MESSAGE_BYTES)
        secret, sock = secrets.token_bytes(SECRET_BYTES), None
        keys, *tickets = SessionKeys.derive(
            hello.secret, secret, stream.remote_peer_id, reach.peer_id, num_tickets=NUM_TICKETS
        )
        with reach.listener.expect(keys) if reach.listener else contextlib.nullcontext() as arrival:
            endpoints = list(reach.endpoints)[:MAX_ENDPOINTS] if arrival else []
            await _say(stream, Offer(secret=secret, endpoints=endpoints))
            message = await receive(stream, Choice, DialBack, max_bytes=MAX_MESSAGE_BYTES)
            if isinstance(message, DialBack):
                tickets = []
                sock = await _dial(stream, reach, hello.endpoints, hosts, keys)
                with _closed_on_error(sock):
                    await _say(stream, Dialled(reached=sock is not None))
                    message = await receive(stream, Choice, max_bytes=MAX_MESSAGE_BYTES)
            elif arrival is not None:
                sock = arrival.take()
        if message.bulk != (sock is not None):
            if sock is not None:
                sock.close()
                sock = None
            if message.bulk:
                raise LinkLost(f"peer {stream.remote_peer_id} chose a connection that there is not")
    ours = tuple(tickets) if sock is not None else ()
    return Upgrade(sock=sock, outgoing=keys.acceptor_key, incoming=keys.opener_key, tickets=ours)


async def _dial(
    stream: Stream, reach: Reach, offered: Sequence[Endpoint], hosts: Sequence[str], keys: SessionKeys
) -> socket.socket | None:
    places = candidates(offered, hosts) if reach.may_dial else []
    return await dial_any(stream.remote_peer_id, places, keys, reach.source, reach.memory)


async def _say(stream: Stream, message: Message) -> None:
    await stream.send(message.to_bytes())


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if sock is not None:
            sock.close()
        raise


@contextlib.asynccontextmanager
async def _negotiation(stream: Stream) -> AsyncIterator[None]:
    """Nothing that goes wrong here proves more than that this stream is of no use."""
    try:
        async with asyncio.timeout(NEGOTIATION_TIMEOUT_S):
            yield
    except TimeoutError as exc:
        raise LinkLost(f"peer {stream.remote_peer_id} did not agree on a path in {NEGOTIATION_TIMEOUT_S:g} s") from exc
    except PeerFault as fault:
        raise LinkLost(f"peer {stream.remote_peer_id} and we agree on no path: {fault}") from fault
