"""Streams in memory with scripted faults, and an event loop of virtual time: any failure in milliseconds.

`run_in_virtual_time` runs the real code, timeouts included, on a loop that jumps to the next timer instead of waiting
for it. `MemoryHub` connects transports; a `LinkScript` on a direction of a pair says what goes wrong there.
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hivetrain.averaging.codecs import Bytes, require_size
from hivetrain.averaging.transport import Acceptor, LinkLost, Stream
from hivetrain.errors import Fault, PeerFault

T = TypeVar("T")
QUEUE_FRAMES = 8


class _JumpingSelector(selectors.SelectSelector):
    """Where the loop would sleep, its time moves on instead."""

    skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("every task waits for another, and no timer is set: a deadlock")
        if not ready and timeout:
            self.skipped_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time moves only where it would wait. It must not wait for threads or sockets."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.skipped_s

    def advance(self, seconds: float) -> None:
        """Let time pass without running anything, as if this process had been stopped."""
        self._jumping.skipped_s += seconds


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a `VirtualTimeLoop`."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


@dataclass(slots=True, kw_only=True)
class LinkScript:
    """What goes wrong from one peer to another. Frames are counted per stream, from 0.

    Attributes:
        drop_after: the stream breaks, for both ends, instead of carrying this frame.
        stall_after: this frame and all after it never arrive, and nobody is told.
        rewrite: ``rewrite(index, frame)`` is what arrives instead.
        delay_s: every frame takes this long.
        refuse: no stream can be opened.
    """

    drop_after: int | None = None
    stall_after: int | None = None
    rewrite: Callable[[int, bytes], bytes] | None = None
    delay_s: float = 0.0
    refuse: bool = False


class MemoryHub:
    """Connects the transports of one process."""

    def __init__(self) -> None:
        self.scripts: dict[tuple[str, str], LinkScript] = {}
        self._transports: dict[str, MemoryTransport] = {}

    def transport(self, peer_id: str) -> MemoryTransport:
        """A new transport of that peer."""
        return MemoryTransport(self, peer_id)

    def script(self, source: str, target: str) -> LinkScript:
        """The script of that direction, created when first asked for."""
        return self.scripts.setdefault((source, target), LinkScript())

    def attach(self, transport: MemoryTransport) -> None:
        """Make a transport reachable."""
        self._transports[transport.peer_id] = transport

    def detach(self, transport: MemoryTransport) -> None:
        """Make it unreachable."""
        self._transports.pop(transport.peer_id, None)

    def find(self, peer_id: str) -> MemoryTransport | None:
        """A started transport."""
        return self._transports.get(peer_id)


class _Pipe:
    """One direction of a stream. ``finished``: no more frames come; ``broken``: those under way are lost too."""

    def __init__(self, script: LinkScript) -> None:
        self.script = script
        self.frames: asyncio.Queue[bytes] = asyncio.Queue(QUEUE_FRAMES)
        self.finished = asyncio.Event()
        self.broken = asyncio.Event()
        self.sent = 0


async def _unless(action: Coroutine[Any, Any, T], *events: asyncio.Event) -> T:
    """``action``, or LinkLost as soon as one of the events is set."""
    work = asyncio.ensure_future(action)
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait({work, *waits}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise LinkLost("the stream ended")
    finally:
        for task in (work, *waits):
            task.cancel()


class MemoryStream:
    """One end of a stream in memory."""

    def __init__(self, remote_peer_id: str, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._remote_peer_id = remote_peer_id
        self._out = outgoing
        self._in = incoming
        self._closed = False

    @property
    def remote_peer_id(self) -> str:
        return self._remote_peer_id

    async def send(self, frame: Bytes, more: bool = False) -> None:
        script, index = self._out.script, self._out.sent
        self._out.sent += 1
        if script.delay_s:
            await asyncio.sleep(script.delay_s)
        if script.drop_after is not None and index >= script.drop_after:
            self.break_off()
        if self._closed or self._out.broken.is_set():
            raise LinkLost("the stream broke")
        if script.stall_after is not None and index >= script.stall_after:
            return
        sent = script.rewrite(index, bytes(frame)) if script.rewrite else bytes(frame)
        if self._out.frames.full():
            await _unless(self._out.frames.put(sent), self._out.broken)
        else:
            self._out.frames.put_nowait(sent)

    async def receive(self, max_bytes: int) -> bytes:
        if not self._in.frames.empty():
            frame = self._in.frames.get_nowait()
        elif self._in.broken.is_set() or self._in.finished.is_set():
            raise LinkLost("the stream ended")
        else:
            frame = await _unless(self._in.frames.get(), self._in.broken, self._in.finished)
        if len(frame) > max_bytes:
            raise PeerFault(Fault.OVERSIZED, f"a frame may have {max_bytes} bytes here, got {len(frame)}")
        return frame

    async def receive_into(self, buffer: memoryview) -> None:
        frame = await self.receive(len(buffer))
        require_size(len(frame), len(buffer), "a frame")
        buffer[:] = frame

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._in.broken.set()
        stalled = self._out.script.stall_after
        if stalled is None or self._out.sent <= stalled:
            self._out.finished.set()

    def break_off(self) -> None:
        """Break the stream for both ends, losing what is under way."""
        self._out.broken.set()
        self._in.broken.set()


class MemoryTransport:
    """A transport of one process."""

    def __init__(self, hub: MemoryHub, peer_id: str) -> None:
        self._hub = hub
        self._peer_id = peer_id
        self._acceptor: Acceptor | None = None
        self._context = contextvars.copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: list[MemoryStream] = []
        self.alive = False

    @property
    def peer_id(self) -> str:
        return self._peer_id

    def set_acceptor(self, acceptor: Acceptor | None, peer_ids: Collection[str] | None = None) -> None:
        if acceptor is not None and self._acceptor is not None:
            raise ValueError("this transport already has an acceptor")
        self._acceptor = acceptor
        self._context = contextvars.copy_context()  # as in a process of its own, not in the opener's

    async def start(self) -> None:
        self._hub.attach(self)
        self.alive = True

    async def open(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> Stream:
        await asyncio.sleep(0)
        there = self._hub.find(peer_id)
        out_script, in_script = self._hub.script(self.peer_id, peer_id), self._hub.script(peer_id, self.peer_id)
        if there is None or not self.alive or out_script.refuse:
            raise LinkLost(f"peer {peer_id} cannot be reached")
        outgoing, incoming = _Pipe(out_script), _Pipe(in_script)
        near = MemoryStream(peer_id, outgoing, incoming)
        self._streams.append(near)
        there.accept(MemoryStream(self.peer_id, incoming, outgoing))
        return near

    def accept(self, stream: MemoryStream) -> None:
        """Answer a stream that a peer opened."""
        self._streams.append(stream)
        task = asyncio.get_running_loop().create_task(self._answer(stream), context=self._context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, stream: MemoryStream) -> None:
        try:
            if self._acceptor is not None:
                await self._acceptor(stream)
        finally:
            await stream.close()

    async def close(self) -> None:
        self._hub.detach(self)
        self.alive = False
        for stream in self._streams:
            stream.break_off()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
