"""Hivemind's peer-to-peer layer: its DHT for discovery, its libp2p daemon for identity, encryption and reach.

Every stream begins in libp2p, which proves who is at the other end. Frames then move to a TCP connection of their own
where one peer can dial the other (`upgrade`, `sealing`), and stay on the libp2p stream where not: through NATs and
relays.

The only module that imports hivemind, and lazily: the import takes seconds. Everything runs inside the caller's event
loop, with no process of hivemind's own but the libp2p daemon. The daemon ends with us however we end, `kill -9`
included: it exits when the connection over which it is controlled closes.

What the DHT returns was written by strangers and is not authenticated: sign what you store, verify what you get.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hivetrain.averaging.addresses import (
    announced_endpoints,
    dial_source,
    ip_hosts,
    listen_endpoints,
    parse_endpoint,
)
from hivetrain.averaging.bulk_listener import BulkListener, Endpoint, dial, endpoint_of
from hivetrain.averaging.daemon import detach, hush_the_daemons_end
from hivetrain.averaging.framing import Clear, FrameStream
from hivetrain.averaging.sealing import Sealer, SessionKeys
from hivetrain.averaging.tickets import TicketBook
from hivetrain.averaging.transport import Acceptor, LinkLost, Stream, Traffic
from hivetrain.averaging.upgrade import Reach, answer_upgrade, offer_upgrade
from hivetrain.errors import ConfigError, ServiceError

logger = logging.getLogger(__name__)

PROTOCOL = "/hivetrain/all-reduce/2"
STARTUP_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
DHT_TIMEOUT_S = 15.0
MAX_VALUE_BYTES = 16 << 10
MAX_VALUES = 1024
MAX_NEGOTIATIONS = 64  # that one peer may have under way with us
MAX_ALL_NEGOTIATIONS = 1024


class Swarm:
    """One node of the swarm: a DHT node and a `Transport`.

    Args:
        initial_peers: multiaddresses, with ``/p2p/ID``, of nodes to join through; empty: we are the first.
        host_maddrs: where to listen.
        announce_maddrs: what to tell others, where that differs from ``host_maddrs`` (behind a NAT).
        identity_path: file of our libp2p key; created if missing. None: a new peer id at every start.
        client_mode: answer no DHT queries, and be dialled by nobody (behind a NAT that cannot be reached).
        bulk: move frames to TCP connections of their own where that works.
        bulk_port: where those arrive; None: any port where ``host_maddrs`` names port 0, else 1,000 past the one that
            it names. Behind a NAT this port must be forwarded like libp2p's.
        announce_bulk: ``address:port`` to tell others; empty: as ``announce_maddrs`` says, 1,000 past its ports.
    """

    def __init__(
        self,
        initial_peers: Sequence[str],
        host_maddrs: Sequence[str],
        announce_maddrs: Sequence[str] | None = None,
        identity_path: str | Path | None = None,
        client_mode: bool = False,
        bulk: bool = True,
        bulk_port: int | None = None,
        announce_bulk: Sequence[str] = (),
    ) -> None:
        self._initial_peers = list(initial_peers)
        self._host_maddrs = list(host_maddrs)
        self._announce_maddrs = list(announce_maddrs) if announce_maddrs else None
        self._identity_path = str(identity_path) if identity_path is not None else None
        self._client_mode = client_mode
        self._bulk = bulk
        self._bulk_port = bulk_port
        self._announce_bulk = [parse_endpoint(endpoint) for endpoint in announce_bulk]
        self._protocol = PROTOCOL
        self._acceptor: Acceptor | None = None
        self._peer_ids: Collection[str] | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._p2p: Any = None
        self._node: Any = None
        self._maddrs: list[str] = []
        self._listener: BulkListener | None = None
        self._reach: Reach | None = None
        self._links: set[FrameStream] = set()
        self._tickets = TicketBook()
        self._negotiating: Counter[str] = Counter()
        self.bulk_traffic = Traffic()
        self.libp2p_traffic = Traffic()

    @property
    def peer_id(self) -> str:
        """Our libp2p peer id, base58."""
        return str(self._running().peer_id.to_base58())

    @property
    def alive(self) -> bool:
        """Whether our libp2p daemon runs."""
        return self._p2p is not None and self._p2p._child is not None and self._p2p._child.returncode is None

    def visible_maddrs(self) -> list[str]:
        """Multiaddresses, with ``/p2p/ID``, at which others can reach us."""
        self._running()
        return list(self._maddrs)

    async def start(self) -> None:
        """Start the daemon, join the DHT, and accept streams.

        Raises:
            ConfigError: an address or the identity file cannot work.
            ServiceError: the daemon did not start, or none of the initial peers answered; names them.
        """
        if self._p2p is not None:
            raise ValueError("this swarm has been started already")
        hivemind = _import_hivemind()
        for maddr in (*self._initial_peers, *self._host_maddrs, *(self._announce_maddrs or ())):
            _require_maddr(hivemind, maddr)
        if missing := [maddr for maddr in self._initial_peers if "/p2p/" not in maddr]:
            raise ConfigError(f"initial peer {missing[0]!r} must end in /p2p/ and the peer's id")
        try:
            await self._start(hivemind)
        except BaseException:
            await self.close()
            raise

    async def _start(self, hivemind: Any) -> None:
        began = time.monotonic()
        asyncio.get_running_loop().set_exception_handler(hush_the_daemons_end)
        try:
            self._p2p = await hivemind.P2P.create(
                initial_peers=self._initial_peers,
                host_maddrs=self._host_maddrs,
                announce_maddrs=self._announce_maddrs,
                identity_path=self._identity_path,
                dht_mode="client" if self._client_mode else "server",
                startup_timeout=STARTUP_TIMEOUT_S,
                # The check starts a second daemon, and a node that was killed would find its own ghost.
                check_if_identity_free=False,
            )
            self._node = await hivemind.DHTNode.create(
                p2p=self._p2p, initial_peers=self._initial_peers, client_mode=self._client_mode
            )
            await self._p2p.add_binary_stream_handler(self._protocol, self._on_stream)
            self._maddrs = [str(maddr) for maddr in await self._p2p.get_visible_maddrs()]
            self._reach = self._start_bulk()
        except (FileNotFoundError, PermissionError) as exc:
            raise ConfigError(f"the identity file {self._identity_path} cannot be used: {exc}") from exc
        except (hivemind.P2PDaemonError, RuntimeError, OSError, ValueError, TimeoutError) as exc:
            where = f" through {', '.join(self._initial_peers)}" if self._initial_peers else ""
            raise ServiceError(
                f"cannot join the swarm{where}: {exc}. Is one of these peers up and reachable from here, "
                f"and is {', '.join(self._host_maddrs)} free to listen on?"
            ) from exc
        seconds, endpoints = time.monotonic() - began, self._reach.endpoints
        logger.info("swarm: peer_id=%s seconds=%.2f maddrs=%s bulk=%s", self.peer_id, seconds, self._maddrs, endpoints)

    def _start_bulk(self) -> Reach:
        wanted = listen_endpoints(self._host_maddrs, self._bulk_port)
        endpoints: list[Endpoint] = []
        if self._bulk and wanted and not self._client_mode:
            self._listener = BulkListener(wanted)
            self._listener.start()
            forwarded = self._announce_maddrs is not None
            endpoints = self._announce_bulk or announced_endpoints(
                self._maddrs, wanted, self._listener.bound, forwarded
            )
        return Reach(
            peer_id=self.peer_id,
            listener=self._listener,
            endpoints=endpoints,
            source=dial_source(self._host_maddrs),
            may_dial=self._bulk,
        )

    async def close(self) -> None:
        """Leave the swarm and end the daemon."""
        p2p, node, self._p2p, self._node = self._p2p, self._node, None, None
        await self._end_streams()
        if p2p is None:
            return
        child = p2p._child
        # A daemon that Ctrl-C in a terminal has ended already would be asked, and waited for, in vain.
        ended = child is None or child.returncode is not None
        for step in (() if node is None or ended else (node.shutdown,)) + (p2p.shutdown,):
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await step()
            except Exception as exc:  # what is left is ended below, whatever went wrong here
                logger.debug("swarm: %s while closing: %r", step, exc)
        if child is not None and child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _end_streams(self) -> None:
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
        for task in self._answering:
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)
        for link in list(self._links):
            link.end()

    def set_acceptor(self, acceptor: Acceptor | None, peer_ids: Collection[str] | None = None) -> None:
        if acceptor is not None and self._acceptor is not None:
            raise ValueError("this swarm already has an acceptor: one all-reduce at a time")
        self._acceptor, self._peer_ids = acceptor, peer_ids

    async def open(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> Stream:
        p2p = self._running()
        hivemind = _import_hivemind()
        try:
            async with asyncio.timeout(timeout_s):
                if (known := await self._open_known(peer_id)) is not None:
                    return known
                peer = hivemind.PeerID.from_base58(peer_id)
                await self._connect(peer, maddrs)
                info, reader, writer = await p2p.call_binary_stream_handler(peer, self._protocol)
                stream = await self._take_over(info, reader, writer)
                return await self._upgrade(stream, ip_hosts([str(info.addr), *maddrs]), opening=True)
        except Exception as exc:  # addresses are a stranger's: whatever they make the client raise, it is not reached
            if not self.alive:
                raise ServiceError(f"our libp2p daemon has ended: {exc}") from exc
            raise LinkLost(f"peer {peer_id} cannot be reached at {list(maddrs)}: {exc!r}") from exc

    async def _connect(self, peer: Any, maddrs: Sequence[str]) -> None:
        """Have libp2p connect to ``peer``; whatever it raises, the peer is not reached."""
        hivemind = _import_hivemind()
        await self._p2p._client.connect(peer, [hivemind.Multiaddr(_without_peer(maddr)) for maddr in maddrs])

    async def _open_known(self, peer_id: str) -> FrameStream | None:
        """A stream for a ticket; None where there is none, or it is not taken."""
        ticket = self._tickets.take(peer_id)
        if ticket is None or self._reach is None:
            return None
        endpoint, keys = ticket
        try:
            sock = await dial(endpoint, keys, self._reach.source)
        except (OSError, TimeoutError) as exc:
            logger.debug("swarm: %s:%d takes no ticket of ours: %r", *endpoint, exc)
            self._tickets.drop(peer_id)
            return None
        return self._bulk_stream(peer_id, sock, keys.opener_key, keys.acceptor_key)

    def _accept_known(self, peer_id: str, sock: socket.socket, keys: SessionKeys) -> None:
        """A peer presented a ticket."""
        if not self._may_negotiate(peer_id):
            sock.close()
            return
        self._negotiating[peer_id] += 1  # until it ends: a ticket costs its bearer nothing
        stream = self._bulk_stream(peer_id, sock, keys.acceptor_key, keys.opener_key)
        task = asyncio.create_task(self._serve(stream))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        task.add_done_callback(lambda _: self._end_negotiation(peer_id))

    def _bulk_stream(self, peer_id: str, sock: socket.socket, outgoing: bytes, incoming: bytes) -> FrameStream:
        stream = self._own(FrameStream(peer_id, sock, Sealer(outgoing), Sealer(incoming), on_end=self._links.discard))
        stream.count_into(self.bulk_traffic)
        return stream

    async def _take_over(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> FrameStream:
        """A stream of the daemon's, with its socket out of asyncio's hands."""
        try:
            sock, early = await detach(reader, writer)
        except (OSError, RuntimeError) as exc:  # RuntimeError: it is closing
            raise LinkLost(f"the stream to {info.peer_id.to_base58()} ended as it began: {exc}") from exc
        return self._own(FrameStream(info.peer_id.to_base58(), sock, Clear(), Clear(), early, self._links.discard))

    def _own(self, stream: FrameStream) -> FrameStream:
        self._links.add(stream)
        return stream

    async def _upgrade(self, stream: FrameStream, hosts: Sequence[str], *, opening: bool) -> FrameStream:
        """The stream on the path that both ends agree on. ``hosts``: where the peer may be dialled."""
        reach, peer_id = self._reach, stream.remote_peer_id
        try:
            if reach is None:
                raise LinkLost("this swarm has not started yet")
            if opening:
                agreed = await offer_upgrade(stream, reach, hosts)
            else:
                agreed = await answer_upgrade(stream, reach, hosts)
        except BaseException:
            await stream.close()
            raise
        logger.debug("swarm: frames of %s go by %s", peer_id, "libp2p" if agreed.sock is None else "bulk")
        if agreed.sock is None:
            stream.count_into(self.libp2p_traffic)
            return stream
        if opening:
            with contextlib.suppress(OSError):  # it has ended already
                self._tickets.put(peer_id, endpoint_of(agreed.sock), agreed.tickets)
        elif agreed.tickets and self._listener is not None:
            self._listener.stand_by(agreed.tickets, partial(self._accept_known, peer_id))
        await stream.close()
        return self._bulk_stream(peer_id, agreed.sock, agreed.outgoing, agreed.incoming)

    async def _on_stream(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer_id = info.peer_id.to_base58()
        if not self._may_negotiate(peer_id):
            writer.transport.abort()
            return
        self._negotiating[peer_id] += 1
        try:
            stream = await self._take_over(info, reader, writer)
        except BaseException as exc:
            self._end_negotiation(peer_id)
            if not isinstance(exc, LinkLost):
                raise
            logger.debug("swarm: %s", exc.detail)
            return
        # A task of our own: hivemind's, cancelled, would be reported as an error.
        task = asyncio.create_task(self._answer(stream, ip_hosts([str(info.addr)])))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def _may_negotiate(self, peer_id: str) -> bool:
        """Whether a stream of that peer is taken: there is a round, the peer is in it, and few are under way."""
        if self._acceptor is None or (self._peer_ids is not None and peer_id not in self._peer_ids):
            return False
        return self._negotiating[peer_id] < MAX_NEGOTIATIONS and self._negotiating.total() < MAX_ALL_NEGOTIATIONS

    def _end_negotiation(self, peer_id: str) -> None:
        self._negotiating[peer_id] -= 1
        self._negotiating += Counter()  # forget who has none

    async def _answer(self, stream: FrameStream, hosts: Sequence[str]) -> None:
        peer_id = stream.remote_peer_id
        try:
            stream = await self._upgrade(stream, hosts, opening=False)
        except LinkLost as exc:
            logger.debug("swarm: a stream of %s ended before it began: %s", peer_id, exc)
            return
        finally:
            self._end_negotiation(peer_id)
        await self._serve(stream)

    async def _serve(self, stream: FrameStream) -> None:
        try:
            if self._acceptor is not None:
                await self._acceptor(stream)
        except Exception:  # the boundary: one stream must not end the node
            logger.exception("swarm: a stream of %s failed", stream.remote_peer_id)
        finally:
            await stream.close()

    async def store(self, key: str, subkey: str, value: bytes, expires_in_s: float) -> bool:
        """Store ``value`` under ``key`` and ``subkey`` for so long. Returns whether a node took it.

        Raises:
            ServiceError: the DHT did not answer.
        """
        if len(value) > MAX_VALUE_BYTES:
            raise ValueError(f"a value has at most {MAX_VALUE_BYTES} bytes, got {len(value)}")
        self._running()
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                expires = _import_hivemind().get_dht_time() + expires_in_s
                return bool(await self._node.store(key, value, expires, subkey=subkey))
        except Exception as exc:  # hivemind documents none of what its DHT raises
            raise ServiceError(f"the DHT did not store {key!r}: {exc!r}") from exc

    async def get(self, key: str) -> dict[str, bytes]:
        """Every unexpired value under ``key``, by subkey; those too large or of another type are left out.

        Raises:
            ServiceError: the DHT did not answer.
        """
        self._running()
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                found = await self._node.get(key, latest=True)
        except Exception as exc:  # see store
            raise ServiceError(f"the DHT did not answer for {key!r}: {exc!r}") from exc
        if found is None or not isinstance(found.value, dict):
            return {}
        values: dict[str, bytes] = {}
        for subkey, entry in found.value.items():
            value = getattr(entry, "value", None)
            if not isinstance(subkey, str) or not isinstance(value, bytes) or len(value) > MAX_VALUE_BYTES:
                continue
            if len(values) < MAX_VALUES:
                values[subkey] = value
        return values

    def _running(self) -> Any:
        if self._p2p is None:
            raise ServiceError("the swarm is not running: start() it first")
        return self._p2p


class _Hivemind:
    """The names of hivemind that we use."""

    def __init__(self) -> None:
        from hivemind.dht.node import DHTNode
        from hivemind.p2p import P2P, P2PDaemonError, PeerID
        from hivemind.utils import get_dht_time
        from hivemind.utils.multiaddr import Multiaddr

        self.DHTNode, self.P2P, self.PeerID, self.Multiaddr = DHTNode, P2P, PeerID, Multiaddr
        self.P2PDaemonError, self.get_dht_time = P2PDaemonError, get_dht_time


_hivemind: _Hivemind | None = None


def _import_hivemind() -> Any:
    global _hivemind
    if _hivemind is None:
        with warnings.catch_warnings():  # what its imports deprecate is not ours to change
            warnings.simplefilter("ignore")
            _hivemind = _Hivemind()
    return _hivemind


def _require_maddr(hivemind: Any, maddr: str) -> None:
    try:
        hivemind.Multiaddr(maddr)
    except Exception as exc:  # of several unrelated types
        raise ConfigError(f"{maddr!r} is not a multiaddress such as /ip4/127.0.0.1/tcp/4001: {exc}") from exc


def _without_peer(maddr: str) -> str:
    return maddr.split("/p2p/")[0]
