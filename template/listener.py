"""One listening socket inside the caller's event loop: uvicorn's HTTP, without its signal handlers and open doors.

`uvicorn.Server` takes the process's signals and polls for its end, so only its protocol is used, on an asyncio
server of our own. That protocol serves HTTP well, but waits for ever for a request's headers, lets one host hold
every connection, and closes a stalled connection only after its buffer has drained. Each is a way for a stranger
to hold a file descriptor before any signature is looked at, so each is bounded here.

h11 rather than httptools: it bounds the size of the headers, and is strict where request smuggling begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from hivetrain.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 << 10
KEEP_ALIVE_S = 75  # uvicorn's 5 s raced with callers that reuse a connection after a large call
_SEND_BYTES = 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What connections may take before a request is complete.

    Attributes:
        max_connections: open at once; further ones are reset.
        max_per_host: open at once from one address.
        header_timeout_s: from connecting, or from the first byte of the next request, to the end of its headers.
    """

    max_connections: int = 512
    max_per_host: int = 64
    header_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_per_host <= self.max_connections:
            raise ValueError(f"need 1 <= max_per_host <= max_connections, got {self.max_per_host}")


@dataclass(slots=True)
class _Connections:
    """Every open connection, by the caller's address and port."""

    limits: ConnectionLimits
    transports: dict[tuple[str, int], asyncio.Transport] = field(default_factory=dict)
    per_host: Counter[str] = field(default_factory=Counter)

    def add(self, client: tuple[str, int], transport: asyncio.Transport) -> bool:
        """Count the connection in. False: one too many, it must go."""
        self.transports[client] = transport
        self.per_host[client[0]] += 1
        return (
            len(self.transports) <= self.limits.max_connections and self.per_host[client[0]] <= self.limits.max_per_host
        )

    def remove(self, client: tuple[str, int]) -> None:
        if self.transports.pop(client, None) is not None:
            self.per_host[client[0]] -= 1
            self.per_host += Counter()  # drops the hosts that are at zero


def _bounded_protocol(connections: _Connections) -> type[asyncio.Protocol]:
    class BoundedH11(H11Protocol):
        header_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # asyncio sets this only on sockets made with an explicit protocol number, which accepted ones lack:
            # without it Nagle and the delayed acknowledgement made every reply take 44 ms on loopback.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.client is None or not connections.add(self.client, transport):
                logger.debug("connection from %s reset: too many are open", self.client)
                transport.abort()
                return
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_deadline()
            self._unset_keepalive_if_required()
            if self.client is not None:
                connections.remove(self.client)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._await_headers()
            else:
                self._cancel_deadline()

        def timeout_keep_alive_handler(self) -> None:
            # close() would first flush a reply that the caller never reads.
            self.transport.abort()

        def _await_headers(self) -> None:
            if self.header_deadline is None and not self.transport.is_closing():
                self.header_deadline = self.loop.call_later(connections.limits.header_timeout_s, self.transport.abort)

        def _cancel_deadline(self) -> None:
            if self.header_deadline is not None:
                self.header_deadline.cancel()
                self.header_deadline = None

    return BoundedH11


class Listener:
    """Serves an ASGI application on one port until closed.

    Args:
        app: the application.
        host: address to listen on.
        port: 0 takes a free one; see `port`.
        setting: what the user calls the port, for error messages.
        close_grace_s: time that `close` gives requests in progress.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        limits: ConnectionLimits,
        setting: str = "axon.port",
        close_grace_s: float = 2.0,
    ) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._setting = setting
        self._close_grace_s = close_grace_s
        self._connections = _Connections(limits)
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that is listened on, once started."""
        return self._port

    async def start(self) -> None:
        """Listen; returns when the socket accepts connections.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        if self._server is not None:
            raise RuntimeError("the listener was started before")
        listening = self._bind()
        self._port = int(listening.getsockname()[1])
        config = uvicorn.Config(
            self._serve,
            http=_bounded_protocol(self._connections),
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # X-Forwarded-For from a stranger is a stranger's word
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        config.load()
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns at every request that is no HTTP
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: config.http_protocol_class(config=config, server_state=self._state, app_state={}),  # type: ignore[call-arg]
            sock=listening,
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if self._server is not None:
                raise  # not by `close`

    def _bind(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listening = socket.create_server((self._host, self._port), family=family, backlog=512)
        except (OSError, OverflowError) as exc:
            raise ConfigError(self._why_not(exc)) from exc
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a caller that stops acknowledging is dropped
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, KEEP_ALIVE_S * 1000)
        listening.setblocking(False)
        return listening

    def _why_not(self, exc: Exception) -> str:
        where = f"{self._host}:{self._port}"
        match getattr(exc, "errno", None):
            case errno.EADDRINUSE:
                return f"{where} is in use: stop what listens there, or set --{self._setting} to a free port"
            case errno.EACCES:
                return f"{where} needs privileges: set --{self._setting} to a port above 1023"
            case errno.EADDRNOTAVAIL:
                return f"{self._host} is not an address of this machine: set --{self._setting.split('.')[0]}.ip"
            case _:
                return f"cannot listen on {where}: {exc}; check --{self._setting} and the address"

    async def send(
        self,
        scope: Scope,
        send: Send,
        status: int,
        headers: dict[str, str],
        body: bytes,
        deadline_s: float,
        linger: Receive | None = None,
        linger_s: float = 0.0,
    ) -> None:
        """Answer a request, in pieces, so that only one waits in memory for a slow reader.

        Args:
            deadline_s: a caller that has not taken the whole answer by then loses its connection.
            linger: with ``linger_s``, what the caller still sends is read and thrown away for that long after the
                answer and before the connection closes.
        """
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        view = memoryview(body)
        try:
            async with asyncio.timeout(deadline_s + linger_s):
                await send({"type": "http.response.start", "status": status, "headers": raw})
                for start in range(0, len(body), _SEND_BYTES):
                    piece = bytes(view[start : start + _SEND_BYTES])
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                if linger is not None and linger_s > 0:
                    await _discard(linger, max_bytes=1 << 20, timeout_s=linger_s)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            logger.warning("%s read %d bytes too slowly: dropped", scope.get("client"), len(body))
            transport = self._connections.transports.get(tuple(scope.get("client") or ()))
            if transport is not None:
                transport.abort()

    async def close(self) -> None:
        """Stop accepting, give requests in progress a moment to finish, then reset what is left."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=self._close_grace_s)
        for transport in list(self._connections.transports.values()):
            transport.abort()  # before the tasks are cancelled, or each would first answer with a 500
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=self._close_grace_s)
        await server.wait_closed()
        await asyncio.sleep(0)  # lets the transports close their sockets


async def _discard(receive: Receive, *, max_bytes: int, timeout_s: float) -> None:
    """Read and forget, until the body ends or a limit is reached."""
    left = max_bytes
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while left > 0:
                event = await receive()
                left -= len(event.get("body", b""))
                if event["type"] == "http.disconnect" or not event.get("more_body", False):
                    return


__all__ = ["ConnectionLimits", "Listener"]
