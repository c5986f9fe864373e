"""Frames over a socket: one copy leads from a frame to the kernel.

On the wire a frame of L bytes is L (4 bytes, big-endian) and its bytes, cut into records of up to `RECORD_BYTES` and
wrapped: sealed on a connection of its own (`sealing`), as they are on a libp2p stream, which is encrypted already. The
end of a connection is not authenticated: it says no more than that the link is lost.

Sockets and not asyncio's streams, for three reasons: those copy every byte once more, a cancelled read can lose what it
had taken, and a failed write loses what had arrived before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Protocol

from hivetrain.averaging.codecs import Bytes, require_size
from hivetrain.averaging.transport import FRAME_LENGTH_BYTES, MAX_FRAME_BYTES, LinkLost, Traffic
from hivetrain.errors import Fault, PeerFault

RECORD_BYTES = 1 << 20  # measured: sealed, 0.44 CPU seconds per GB and both ends, 0.62 with records of 64 KiB
CLOSE_TIMEOUT_S = 5.0
LINGER_S = 2.0
LONG_FRAME_BYTES = 64 << 10  # other tasks get a turn before each frame that follows one of this size
READ_AHEAD_BYTES = 16 << 10
MAX_HELD_BYTES = 16 << 10
_DISCARD_BYTES = 64 << 10
_EMPTY = memoryview(b"")


class NotSealed(Exception):
    """Bytes that the peer at the other end did not wrap."""


class Wrapping(Protocol):
    """What becomes of one direction's records on their way. Records come in order."""

    @property
    def overhead(self) -> int:
        """Bytes by which a wrapped record is longer."""
        ...

    def wrap(self, record: Bytes, header: bytes, out: memoryview) -> None:
        """Write ``record``, wrapped, to ``out``; ``header`` is its frame's length as it travels."""
        ...

    def unwrap(self, wrapped: memoryview, header: bytes, out: memoryview) -> None:
        """Write the record to ``out``.

        Raises:
            NotSealed: it is not the one that comes next.
        """
        ...


class Clear:
    """A `Wrapping` that leaves records as they are."""

    overhead = 0

    def wrap(self, record: Bytes, header: bytes, out: memoryview) -> None:
        out[:] = record

    def unwrap(self, wrapped: memoryview, header: bytes, out: memoryview) -> None:
        out[:] = wrapped


class FrameStream:
    """A `Stream` over a connected, non-blocking socket, which it owns. One task sends and one receives at a time.

    A cancelled `receive` loses nothing; what a cancelled `send` had begun goes out before the next frame. A short frame
    that another one follows goes to the kernel with it: one call, and one wake-up at the other end.

    Args:
        remote_peer_id: as libp2p proved it.
        sock: nothing but frames comes from it any more.
        outgoing, incoming: of the two directions.
        early: what was read from ``sock`` before.
        on_end: called once, when the socket is closed.
    """

    def __init__(
        self,
        remote_peer_id: str,
        sock: socket.socket,
        outgoing: Wrapping,
        incoming: Wrapping,
        early: bytes = b"",
        on_end: Callable[[FrameStream], None] = lambda stream: None,
    ) -> None:
        self._remote_peer_id = remote_peer_id
        self._sock = sock
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._waiting: set[asyncio.Future[None]] = set()
        self._linger: asyncio.TimerHandle | None = None
        self._closing = self._ended = False
        self._traffic = Traffic()
        # Outgoing: wrapped bytes not yet taken by the kernel, and what of the frame is not yet wrapped.
        self._outgoing = outgoing
        self._sending = asyncio.Lock()
        self._out = bytearray()
        self._unsent = _EMPTY
        self._unwrapped: memoryview | None = None
        self._out_header = b""
        self._held = b""  # short frames, wrapped, that wait for the next one
        self._sent_long = False
        # Incoming: of the frame that is on its way.
        self._incoming = incoming
        self._early = memoryview(early)
        self._in = bytearray(FRAME_LENGTH_BYTES)
        self._filled = 0
        self._size: int | None = None
        self._in_header = b""
        self._frame = _EMPTY
        self._opened = 0
        self._received_long = False
        self._proven = False  # an oversized frame's header

    @property
    def remote_peer_id(self) -> str:
        return self._remote_peer_id

    def count_into(self, traffic: Traffic) -> None:
        """Count what this stream carries from here on in ``traffic``."""
        self._traffic = traffic
        traffic.streams += 1

    # Sending

    async def send(self, frame: Bytes, more: bool = False) -> None:
        view = memoryview(frame).cast("B")
        if len(view) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes, got {len(view)}")
        async with self._sending:
            if self._sent_long:
                await asyncio.sleep(0)
            await self._drain()
            self._out_header = len(view).to_bytes(FRAME_LENGTH_BYTES, "big")
            prefix, self._held = self._held + self._out_header, b""
            if more and len(prefix) + len(view) < MAX_HELD_BYTES:
                self._hold(view, prefix)
                return
            self._wrap(view, prefix)
            self._sent_long = len(view) >= LONG_FRAME_BYTES
            try:
                await self._drain()
            except asyncio.CancelledError:
                if self._unwrapped is not None:
                    self._unwrapped = memoryview(bytes(self._unwrapped))  # the caller's buffer is its own again
                raise
            self._traffic.bytes_sent += len(view)

    def _hold(self, view: memoryview, prefix: bytes) -> None:
        self._live()
        wrapped = bytearray(len(view) + self._outgoing.overhead)
        self._outgoing.wrap(view, self._out_header, memoryview(wrapped))
        self._held = prefix + wrapped
        self._sent_long = False
        self._traffic.bytes_sent += len(view)

    def _wrap(self, view: memoryview, prefix: bytes) -> None:
        record, rest = view[:RECORD_BYTES], view[RECORD_BYTES:]
        start, stop = len(prefix), len(prefix) + len(record) + self._outgoing.overhead
        if len(self._out) < stop:
            self._out = bytearray(stop)
        out = memoryview(self._out)[:stop]
        out[:start] = prefix
        self._outgoing.wrap(record, self._out_header, out[start:])
        self._unsent, self._unwrapped = out, rest if len(rest) else None

    async def _drain(self) -> None:
        """Until the kernel has taken everything that `send` was given."""
        while True:
            while len(self._unsent):
                try:
                    sent = self._live().send(self._unsent)
                except (BlockingIOError, InterruptedError):
                    await self._wait(self._loop.add_writer, self._loop.remove_writer)
                except OSError as exc:
                    raise self._lost(f"while we sent: {exc}") from exc
                else:
                    self._unsent = self._unsent[sent:]
            if self._unwrapped is None:
                self._live()
                return
            self._wrap(self._unwrapped, b"")

    # Receiving

    async def receive(self, max_bytes: int) -> bytes:
        size = await self._next_size()
        if size > min(max_bytes, MAX_FRAME_BYTES):
            await self._prove_header(size)
            raise PeerFault(Fault.OVERSIZED, f"a frame may have {max_bytes} bytes here, {size} were announced")
        frame = bytearray(size)
        await self._read_frame(memoryview(frame))
        return bytes(frame)

    async def receive_into(self, buffer: memoryview) -> None:
        size = await self._next_size()
        if size != len(buffer):
            await self._prove_header(size)
            require_size(size, len(buffer), "a frame")
        try:
            await self._read_frame(buffer)
        except asyncio.CancelledError:
            self._frame = memoryview(bytes(buffer[: self._opened]))  # the caller's buffer is its own again
            raise

    async def _next_size(self) -> int:
        """Bytes of the frame that comes, or is on its way."""
        if self._received_long:
            self._received_long = False
            await asyncio.sleep(0)
        if self._size is None:
            await self._fill(FRAME_LENGTH_BYTES)
            self._in_header = bytes(self._in[:FRAME_LENGTH_BYTES])
            self._size, self._filled = int.from_bytes(self._in_header, "big"), 0
        return self._size

    async def _read_frame(self, target: memoryview) -> None:
        """Open record after record of the frame into ``target``, beginning with what a cancelled call had opened."""
        size = len(target)
        target[: self._opened], self._frame = self._frame[: self._opened], target
        while True:
            stop = min(size, self._opened + RECORD_BYTES)
            wrapped_bytes = stop - self._opened + self._incoming.overhead
            await self._fill(wrapped_bytes)
            wrapped = memoryview(self._in)[:wrapped_bytes]
            try:
                self._incoming.unwrap(wrapped, self._in_header, target[self._opened : stop])
            except NotSealed:
                raise self._lost("with bytes that its peer did not seal") from None
            self._filled, self._opened = 0, stop
            if stop == size:
                break
        self._size, self._opened, self._frame = None, 0, _EMPTY
        self._traffic.bytes_received += size
        self._received_long = size >= LONG_FRAME_BYTES

    async def _prove_header(self, size: int) -> None:
        """Have the frame's first record bear out its header: anybody on the way can write four bytes."""
        if not self._incoming.overhead or self._proven or self._opened:
            return
        record_bytes = min(size, RECORD_BYTES)
        wrapped_bytes = record_bytes + self._incoming.overhead
        await self._fill(wrapped_bytes)
        wrapped = memoryview(self._in)[:wrapped_bytes]
        try:
            self._incoming.unwrap(wrapped, self._in_header, memoryview(bytearray(record_bytes)))
        except NotSealed:
            raise self._lost("with a length that its peer did not seal") from None
        self._proven = True

    async def _fill(self, num_bytes: int) -> None:
        """Until so many bytes of the next header or record are in the buffer."""
        if len(self._in) < num_bytes:
            self._in += bytes(num_bytes - len(self._in))
        while self._filled < num_bytes:
            missing = num_bytes - self._filled
            if self._early:
                piece, self._early = self._early[:missing], self._early[missing:]
                self._in[self._filled : self._filled + len(piece)] = piece
                self._filled += len(piece)
                continue
            try:
                if missing < READ_AHEAD_BYTES:  # a short frame often comes with the next one behind it
                    self._early = memoryview(self._live().recv(READ_AHEAD_BYTES))
                    count, taken = len(self._early), 0
                else:
                    count = taken = self._live().recv_into(memoryview(self._in)[self._filled : num_bytes])
            except (BlockingIOError, InterruptedError):
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
            except OSError as exc:
                raise self._lost(f"while we received: {exc}") from exc
            else:
                if not count:
                    raise self._lost("at the other end")
                self._filled += taken

    # Both

    def _live(self) -> socket.socket:
        if self._closing:
            raise self._lost("here")
        return self._sock

    def _lost(self, how: str) -> LinkLost:
        return LinkLost(f"the connection to {self._remote_peer_id} ended {how}")

    async def _wait(self, watch: Callable[..., object], unwatch: Callable[[int], object]) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        fileno = self._live().fileno()
        self._waiting.add(ready)
        watch(fileno, _wake, ready)
        try:
            await ready
        finally:
            self._waiting.discard(ready)
            if not self._ended:
                unwatch(fileno)

    async def close(self) -> None:
        await self._finish_sending()
        if not self._closing:
            self._hang_up()

    async def _finish_sending(self) -> None:
        if self._held and not self._unsent and self._unwrapped is None:
            self._unsent, self._held = memoryview(self._held), b""
        if self._unsent or self._unwrapped is not None:
            with contextlib.suppress(LinkLost, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S), self._sending:
                    await self._drain()

    def _hang_up(self) -> None:
        self._closing = True
        for ready in self._waiting:
            _wake(ready)
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.end()
            return
        # Closed with unread bytes, a socket resets the connection, and what we sent last may be lost on its way.
        self._linger = self._loop.call_later(LINGER_S, self.end)
        self._loop.call_soon(self._linger_on)

    def _linger_on(self) -> None:
        if self._ended:
            return
        try:
            ended = not self._sock.recv(_DISCARD_BYTES)
        except (BlockingIOError, InterruptedError):
            self._loop.add_reader(self._sock.fileno(), self._linger_on)
        except OSError:
            self.end()
        else:
            if ended:
                self.end()
            else:
                self._loop.call_soon(self._linger_on)

    def end(self) -> None:
        """Close the socket now, whatever is under way. May be called twice."""
        if self._ended:
            return
        self._closing = self._ended = True
        for ready in self._waiting:
            _wake(ready)
        if self._linger is not None:
            self._linger.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._on_end(self)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
