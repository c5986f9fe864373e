"""Where bulk connections arrive, and how they are dialled: a stranger is let in only with a token that is expected.

A token is 32 bytes that both ends of a libp2p stream derived (`sealing.SessionKeys`); it is good once, for one stream:
while that stream waits for it, or, of a ticket (`tickets`), until it is forgotten. Whoever presents none within
`TOKEN_TIMEOUT_S` is cut off, and until then costs a file descriptor and 40 bytes; of so many strangers at once, the
oldest of the busiest address goes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from hivetrain.averaging.sealing import READY_BYTES, TOKEN_BYTES, SessionKeys

logger = logging.getLogger(__name__)

Endpoint = tuple[str, int]
"""An IP address in text, and a port."""

Taker = Callable[[socket.socket, SessionKeys], None]

MAGIC = b"HTBULK/1"
TOKEN_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 1.5
READY_TIMEOUT_S = 3.0
MAX_STRANGERS = 64
MAX_PENDING = 1024  # tokens that are waited for at once
MAX_STANDING = 8192  # tickets, of 32 for each path that was agreed on
BACKLOG = 128
ACCEPT_PAUSE_S = 0.1  # when the process is out of file descriptors
_ID_BYTES = 16  # of a token: what it is looked up by; the rest is compared in constant time


class Arrival:
    """A connection that is waited for."""

    def __init__(self, keys: SessionKeys) -> None:
        self.keys = keys
        self._sock: socket.socket | None = None

    def put(self, sock: socket.socket) -> None:
        """It came, and is ours to close."""
        self._sock = sock

    def take(self) -> socket.socket | None:
        """The connection, now the caller's to close; None: it has not come."""
        sock, self._sock = self._sock, None
        return sock


class _Standing(Arrival):
    """A ticket that may be presented at any time."""

    def __init__(self, keys: SessionKeys, taker: Taker) -> None:
        super().__init__(keys)
        self._taker = taker

    def put(self, sock: socket.socket) -> None:
        self._taker(sock, self.keys)


class BulkListener:
    """Listens on one port per address, and hands over who presents an expected token.

    Args:
        wanted: addresses to listen on; port 0 is any. A port that is taken is replaced by any.
    """

    def __init__(self, wanted: Sequence[Endpoint]) -> None:
        self._wanted = list(wanted)
        self._sockets: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._arrivals: dict[bytes, Arrival] = {}
        self._standing: dict[bytes, Arrival] = {}  # the oldest first
        self._strangers: dict[asyncio.Task[bool], str] = {}  # in the order in which they came

    @property
    def bound(self) -> list[Endpoint]:
        """Where it listens."""
        return [_endpoint(sock.getsockname()) for sock in self._sockets]

    @property
    def num_pending(self) -> int:
        """Tokens that are waited for."""
        return len(self._arrivals)

    @property
    def num_strangers(self) -> int:
        """Connections that have presented no token yet."""
        return len(self._strangers)

    def start(self) -> None:
        """Listen. An address that cannot be used is logged and left out."""
        for host, port in self._wanted:
            for attempt in dict.fromkeys((port, 0)):
                try:
                    self._sockets.append(_listen(host, attempt))
                    break
                except OSError as exc:
                    logger.warning("bulk transfers cannot listen on %s:%d: %s", host, attempt, exc)
        self._accepting = [asyncio.create_task(self._accept(sock)) for sock in self._sockets]

    async def close(self) -> None:
        """Stop, and close every connection that was not handed over. May be called twice."""
        tasks: list[asyncio.Task[Any]] = [*self._accepting, *self._strangers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
        self._accepting, self._sockets = [], []
        self._arrivals.clear()
        self._standing.clear()

    def stand_by(self, tickets: Sequence[SessionKeys], taker: Taker) -> None:
        """Give ``taker`` the connection, and the keys, of whoever presents one of the tokens, once each.

        The oldest of too many tickets are forgotten: who presents one must agree on a path anew.
        """
        for keys in tickets:
            self._standing[keys.token[:_ID_BYTES]] = _Standing(keys, taker)
        while len(self._standing) > MAX_STANDING:
            del self._standing[next(iter(self._standing))]

    @contextlib.contextmanager
    def expect(self, keys: SessionKeys) -> Iterator[Arrival | None]:
        """Wait for whoever presents ``keys.token``; None where too many are waited for.

        Its connection is closed with the context, unless it was taken before.
        """
        if len(self._arrivals) >= MAX_PENDING or not self._sockets:
            yield None
            return
        arrival = Arrival(keys)
        self._arrivals[keys.token[:_ID_BYTES]] = arrival
        try:
            yield arrival
        finally:
            self._arrivals.pop(keys.token[:_ID_BYTES], None)
            if (sock := arrival.take()) is not None:
                sock.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as exc:
                logger.warning("bulk transfers cannot accept: %s", exc)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if not self._arrivals and not self._standing:
                sock.close()
                continue
            if len(self._strangers) >= MAX_STRANGERS:
                self._drop_a_stranger()
            task = asyncio.create_task(self._admit(sock))
            self._strangers[task] = _endpoint(address)[0]
            task.add_done_callback(partial(self._part_from, sock))

    def _part_from(self, sock: socket.socket, task: asyncio.Task[bool]) -> None:
        self._strangers.pop(task, None)
        if task.cancelled() or not task.result():  # a task that is cancelled before it runs could not close it itself
            sock.close()

    def _drop_a_stranger(self) -> None:
        busiest, _ = Counter(self._strangers.values()).most_common(1)[0]
        oldest = next(task for task, host in self._strangers.items() if host == busiest)
        del self._strangers[oldest]
        oldest.cancel()

    async def _admit(self, sock: socket.socket) -> bool:
        """Whether the connection was handed over."""
        try:
            async with asyncio.timeout(TOKEN_TIMEOUT_S):
                return self._take(sock, await read_exactly(sock, len(MAGIC) + TOKEN_BYTES))
        except (TimeoutError, OSError) as exc:
            logger.debug("a bulk connection presented no token: %r", exc)
            return False

    def _take(self, sock: socket.socket, greeting: bytes) -> bool:
        token = greeting[len(MAGIC) :]
        expected = self._standing if token[:_ID_BYTES] in self._standing else self._arrivals
        arrival = expected.get(token[:_ID_BYTES])
        if not greeting.startswith(MAGIC) or arrival is None or not hmac.compare_digest(token, arrival.keys.token):
            logger.debug("a bulk connection presented a token that is not waited for")
            return False
        del expected[token[:_ID_BYTES]]
        if sock.send(arrival.keys.ready) != READY_BYTES:
            return False
        arrival.put(sock)
        return True


async def dial(endpoint: Endpoint, keys: SessionKeys, source: str | None = None) -> socket.socket:
    """A connection to whoever waits for ``keys.token`` at ``endpoint``. It may be stopped at any moment.

    Args:
        source: local address to dial from.

    Raises:
        OSError: it cannot be reached, or is somebody else.
        TimeoutError: it did not answer in time.
    """
    family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _configure(sock)
        if source is not None and _alike(source, endpoint[0]):
            sock.bind((source, 0))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await loop.sock_connect(sock, endpoint)
        async with asyncio.timeout(READY_TIMEOUT_S):
            await loop.sock_sendall(sock, MAGIC + keys.token)
            answer = await read_exactly(sock, READY_BYTES)
        if not hmac.compare_digest(answer, keys.ready):
            raise ConnectionError(f"who answers at {endpoint} does not hold the keys")
    except BaseException:
        sock.close()
        raise
    return sock


async def read_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """So many bytes and not one more.

    Raises:
        OSError: the connection ended.
    """
    loop, received = asyncio.get_running_loop(), b""
    while len(received) < num_bytes:
        piece = await loop.sock_recv(sock, num_bytes - len(received))
        if not piece:
            raise ConnectionError(f"it ended after {len(received)} of {num_bytes} bytes")
        received += piece
    return received


def _alike(source: str, target: str) -> bool:
    """Whether a connection can lead from one address to the other: not from loopback into the world."""
    here, there = ipaddress.ip_address(source), ipaddress.ip_address(target)
    return here.version == there.version and here.is_loopback == there.is_loopback


def _listen(host: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        _configure(sock)  # accepted connections inherit it
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _configure(sock: socket.socket) -> None:
    """Buffer sizes stay the kernel's: set by hand, they would no longer grow with the link."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def endpoint_of(sock: socket.socket) -> Endpoint:
    """Where a connection leads."""
    return _endpoint(sock.getpeername())


def _endpoint(address: Sequence[object]) -> Endpoint:
    return str(address[0]), int(str(address[1]))
