"""The client side of the wire: ask one neuron, or many at once, and get a record back for each.

A peer's fault is a value, never an exception: a validator that asks two hundred miners must not stop at the one
that lies. What is *our* fault is told apart where that can be known (`Failure.OURS`), because our broken network
must never cost a miner.

A 200 counts only with the peer's signature over it (`template.wire`). Refusals are unsigned, so they say that the
call failed, not who is to blame.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import hashlib
import ipaddress
import json
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import aiohttp
from bittensor import http_auth
from yarl import URL

from hivetrain.errors import Fault, PeerFault
from template import wire
from template.protocol import Message, Synapse

logger = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 2 << 10
_IDLE_S = 30.0  # below the axon's 75 s, so that a connection is never reused while the peer closes it

R = TypeVar("R", bound=Message)


class Failure(enum.Enum):
    """Why a call gave no reply."""

    OURS = "ours"  # no network, no sockets, no memory: here, not there
    UNREACHABLE = "unreachable"  # no connection, or it broke before the reply was whole
    TIMEOUT = "timeout"  # connected, but no whole reply in time
    REFUSED = "refused"  # 4xx: access, rate, or a request that it does not like
    FAILED = "failed"  # 5xx: the peer's own handler failed
    OVERSIZED = "oversized"  # more bytes than we take: cut
    WRONG_PEER = "wrong_peer"  # somebody else's hotkey answers at this address
    BAD_SIGNATURE = "bad_signature"  # unsigned, altered, or a reply to another request
    MALFORMED = "malformed"  # signed by the peer, and not a reply to this synapse


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    """Where a hotkey says that it serves. Not checked here: the chain stores what a stranger wrote."""

    hotkey: str
    ip: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply(Generic[R]):
    """What came of one call. Either ``reply`` or ``failure`` is set.

    Attributes:
        status: HTTP status; 0 when there was none.
        detail: why it failed, at most 300 characters, printable.
        seconds: from the first attempt to the last byte.
        size_bytes: of the reply's body, as far as it was read.
    """

    hotkey: str
    reply: R | None = None
    failure: Failure | None = None
    status: int = 0
    detail: str = ""
    seconds: float = 0.0
    size_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the peer answered, provably, in the right form."""
        return self.reply is not None


class _Failed(Exception):
    def __init__(self, failure: Failure, detail: str, status: int = 0, size_bytes: int = 0) -> None:
        super().__init__(detail)
        self.failure = failure
        self.detail = detail
        self.status = status
        self.size_bytes = size_bytes


class Dendrite:
    """Signs and sends synapses for one hotkey. ``async with`` it, or `start` and `close`.

    Args:
        key: the hotkey's keypair, or a wallet.
        max_connections: open at once, over all peers.
        connect_timeout_s: longest wait for a TCP connection.
    """

    def __init__(self, key: object, *, max_connections: int = 64, connect_timeout_s: float = 5.0) -> None:
        self._signer = wire.hotkey_signer(key)
        self._max_connections = max_connections
        self._connect_timeout_s = connect_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._last_nonce = 0

    @property
    def hotkey(self) -> str:
        """Who asks."""
        return self._signer.ss58_address

    async def start(self) -> None:
        """Open the connection pool."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections, keepalive_timeout=_IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a small body that inflates is not a reply of ours
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            )

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def call(
        self,
        peer: PeerAddress,
        synapse: Synapse[R],
        *,
        timeout_s: float = 12.0,
        max_reply_bytes: int | None = None,
        attempts: int = 2,
    ) -> Reply[R]:
        """Ask ``peer``. Never raises for what a peer does.

        Args:
            timeout_s: for the whole call, attempts included.
            max_reply_bytes: the reply is cut past this; the synapse's own limit unless given.
            attempts: a connection that broke before the first byte of a reply is tried again, under a fresh
                nonce, up to this often. The peer may see the request twice.

        Raises:
            RuntimeError: not started.
            ValueError: an argument that cannot work.
        """
        if self._session is None:
            raise RuntimeError("call start() first, or use `async with Dendrite(...)`")
        if not timeout_s > 0 or attempts < 1:
            raise ValueError(f"need timeout_s > 0 and attempts >= 1, got {timeout_s} and {attempts}")
        limit = type(synapse).max_reply_bytes if max_reply_bytes is None else max_reply_bytes
        body = synapse.to_bytes()
        if len(body) > synapse.max_request_bytes:
            raise ValueError(f"{synapse.route} takes {synapse.max_request_bytes} bytes, this one has {len(body)}")
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                reply, size_bytes = await self._attempt(self._session, peer, synapse, body, limit, attempts)
        except _Failed as exc:
            return _failure(peer, exc, started)
        except TimeoutError:
            return _failure(peer, _Failed(Failure.TIMEOUT, f"no whole reply within {timeout_s:g} s"), started)
        seconds = time.monotonic() - started
        return Reply(hotkey=peer.hotkey, reply=reply, status=200, seconds=seconds, size_bytes=size_bytes)

    async def call_many(
        self,
        peers: Sequence[PeerAddress],
        synapse: Synapse[R],
        *,
        timeout_s: float = 12.0,
        max_reply_bytes: int | None = None,
        concurrency: int = 16,
    ) -> list[Reply[R]]:
        """Ask every peer, ``concurrency`` at a time; one record per peer, in their order.

        ``timeout_s`` is for each call, and begins when that call does.
        """
        places = asyncio.Semaphore(concurrency)

        async def ask(peer: PeerAddress) -> Reply[R]:
            async with places:
                return await self.call(peer, synapse, timeout_s=timeout_s, max_reply_bytes=max_reply_bytes)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(peer)) for peer in peers]
        return [task.result() for task in tasks]

    async def _attempt(
        self,
        session: aiohttp.ClientSession,
        peer: PeerAddress,
        synapse: Synapse[R],
        body: bytes,
        limit: int,
        attempts: int,
    ) -> tuple[R, int]:
        url = _url(peer, synapse.route)
        for left in reversed(range(attempts)):
            try:
                return await self._exchange(session, url, peer, synapse, body, limit)
            except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError) as exc:  # no connection at all
                raise _connection_failure(exc) from exc
            except aiohttp.ClientPayloadError as exc:
                raise _Failed(Failure.UNREACHABLE, "the connection broke within the reply") from exc
            except (aiohttp.ClientConnectionError, OSError) as exc:
                if left == 0:
                    raise _connection_failure(exc) from exc
            except (aiohttp.ClientError, ValueError) as exc:  # aiohttp's parser, on what is no HTTP
                raise _Failed(Failure.MALFORMED, f"no HTTP reply: {type(exc).__name__}") from exc
        raise AssertionError("unreachable: attempts >= 1")

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        url: URL,
        peer: PeerAddress,
        synapse: Synapse[R],
        body: bytes,
        limit: int,
    ) -> tuple[R, int]:
        nonce = self._fresh_nonce()
        headers = http_auth.sign(
            self._signer, method="POST", path=synapse.route, body=body, receiver_ss58=peer.hotkey, nonce_ns=nonce
        )
        headers |= {"Content-Type": wire.CONTENT_TYPE, "Accept-Encoding": "identity"}
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                raise await _refusal(response)
            raw, digest = await _read(response, limit)
            seal = wire.ReplySeal(
                status=200,
                route=synapse.route,
                nonce=nonce,
                sender=peer.hotkey,
                receiver=self.hotkey,
                body_sha256=digest,
            )
            _check_seal(response, seal, len(raw))
        try:
            return await wire.off_loop(len(raw), lambda: synapse.parse_reply(raw, limit)), len(raw)
        except PeerFault as exc:
            failure = Failure.OVERSIZED if exc.fault is Fault.OVERSIZED else Failure.MALFORMED
            raise _Failed(failure, exc.detail, 200, len(raw)) from exc

    def _fresh_nonce(self) -> int:
        """Nanoseconds since 1970, and never the same twice."""
        self._last_nonce = max(time.time_ns(), self._last_nonce + 1)
        return self._last_nonce


def _url(peer: PeerAddress, route: str) -> URL:
    try:
        address = ipaddress.ip_address(peer.ip)
    except ValueError as exc:
        raise _Failed(Failure.UNREACHABLE, f"serves at {peer.ip[:64]!r}, which is no IP address") from exc
    if address.is_unspecified or address.is_multicast or not 1 <= peer.port <= 65535:
        raise _Failed(Failure.UNREACHABLE, f"serves nowhere: {address}, port {peer.port}")
    host = f"[{address}]" if address.version == 6 else str(address)
    return URL(f"http://{host}:{peer.port}{route}", encoded=True)


async def _read(response: aiohttp.ClientResponse, limit: int) -> tuple[bytes, str]:
    """The body and its sha256, cut as soon as it is past ``limit``."""
    if (response.content_length or 0) > limit:
        raise _Failed(Failure.OVERSIZED, f"declares {response.content_length} bytes, the limit is {limit}", 200)
    pieces: list[bytes] = []
    size, digest = 0, hashlib.sha256()
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > limit:
            response.close()  # not returned to the pool: the rest is never read
            raise _Failed(Failure.OVERSIZED, f"sent more than {limit} bytes", 200, size)
        digest.update(piece)
        pieces.append(piece)
    return b"".join(pieces), digest.hexdigest()


def _check_seal(response: aiohttp.ClientResponse, seal: wire.ReplySeal, size_bytes: int) -> None:
    hotkey = response.headers.get(wire.HEADER_REPLY_HOTKEY, "")
    if hotkey and hotkey != seal.sender:
        raise _Failed(Failure.WRONG_PEER, f"{hotkey[:64]!r} answers here, not {seal.sender}", 200, size_bytes)
    nonce = response.headers.get(wire.HEADER_REPLY_NONCE, "")
    if nonce != str(seal.nonce):
        raise _Failed(Failure.BAD_SIGNATURE, f"answers nonce {nonce[:24]!r}, not {seal.nonce}", 200, size_bytes)
    if not seal.is_signed_by_sender(response.headers.get(wire.HEADER_REPLY_SIGNATURE, "")):
        raise _Failed(Failure.BAD_SIGNATURE, "the signature does not cover this reply", 200, size_bytes)


async def _refusal(response: aiohttp.ClientResponse) -> _Failed:
    """What a status other than 200 says; its text is a stranger's, so it is short and printable."""
    text = ""
    with contextlib.suppress(aiohttp.ClientError, ValueError, KeyError, TypeError, OSError, RecursionError):
        said = json.loads(await response.content.read(_MAX_ERROR_BYTES))["error"]
        text = said if isinstance(said, str) else ""
    response.close()
    status = response.status
    failure = Failure.FAILED if status >= 500 else Failure.REFUSED if status >= 400 else Failure.MALFORMED
    return _Failed(failure, f"{status}: {ascii(text)[1:-1]}", status)


_OUR_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENETDOWN})
# A peer can provoke these by the address that it publishes (broadcast, IPv6, unroutable), to be excused for ever:
# they are ours only when an address of nobody's choosing fails as well.
_DOUBTFUL_ERRNOS = frozenset({errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def _connection_failure(exc: BaseException) -> _Failed:
    """Tell a peer that cannot be reached from a machine that reaches nobody."""
    cause: BaseException | None = exc
    while cause is not None and getattr(cause, "errno", None) is None:
        cause = cause.__cause__
    number = getattr(cause, "errno", None)
    if number in _OUR_ERRNOS or (number in _DOUBTFUL_ERRNOS and not has_route()):
        return _Failed(Failure.OURS, f"this machine cannot connect: {exc}")
    return _Failed(Failure.UNREACHABLE, str(exc))


def has_route(probe_ip: str = "192.88.99.1") -> bool:
    """Whether this machine has a route to the internet. Sends nothing: connecting a UDP socket only looks it up."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((probe_ip, 9))
    except OSError:
        return False
    return True


def _failure(peer: PeerAddress, failed: _Failed, started: float) -> Reply[R]:
    detail = failed.detail[:300]
    logger.debug("%s: %s: %s", peer.hotkey, failed.failure.value, detail)
    return Reply(
        hotkey=peer.hotkey,
        failure=failed.failure,
        status=failed.status,
        detail=detail,
        seconds=time.monotonic() - started,
        size_bytes=failed.size_bytes,
    )


__all__ = ["Dendrite", "Failure", "PeerAddress", "Reply"]
