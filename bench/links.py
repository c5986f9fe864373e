"""Slow, distant links on one machine: a TCP proxy with a set bandwidth, one-way delay and loss.

    python -m bench.links [--quick] [--json FILE]

A kernel with netem does this below TCP; a proxy ends TCP on both sides of itself, so what TCP does with such a link is
modelled for each connection and direction (`Window`): a connection starts with 10 segments in flight, doubles them
every round trip, and after a loss stands still for a retransmission timeout and goes on with half of them, one more per
round trip. Bytes are delayed, never lost. Every byte also takes its turn on its sender's uplink and its receiver's
downlink (`Pipe`), which all connections of a peer share. Not modelled: queues that overflow, windows that shrink in
idle times, and the room for acknowledgements.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from bench.harness import Claim, arguments, at_most, report, table

SEGMENT_BYTES = 1460
FIRST_WINDOW_BYTES = 10 * SEGMENT_BYTES  # RFC 6928
MAX_WINDOW_BYTES = 8 << 20
MIN_TIMEOUT_S = 0.2  # Linux's shortest retransmission timeout
PIECE_BYTES = 16 << 10
READ_AHEAD_S = 0.02  # so that a late wake-up leaves no gap on the link
MAX_CONNECTIONS = 512
CONNECT_TIMEOUT_S = 10.0


class Pipe:
    """One direction of one peer's line: bytes leave it in order, at its rate. Its clock is the caller's.

    Args:
        bytes_per_s: None: any number at once.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def leaves_at(self, num_bytes: int, now: float) -> float:
        """When the last of ``num_bytes`` that come at ``now`` has left."""
        self._free_at = max(self._free_at, now) + (num_bytes / self._bytes_per_s if self._bytes_per_s else 0.0)
        return self._free_at


class Window:
    """How much one direction of a TCP connection may have in flight. No clock.

    Source: RFC 5681 (slow start and congestion avoidance), RFC 6298 (the timeout).
    """

    def __init__(self, round_trip_s: float, loss: float, rng: random.Random) -> None:
        self._timeout_s = max(MIN_TIMEOUT_S, 2 * round_trip_s)
        self._loss = loss
        self._rng = rng
        self._threshold = float(MAX_WINDOW_BYTES)
        self.size = float(FIRST_WINDOW_BYTES)

    def acknowledge(self, num_bytes: int) -> None:
        """So many bytes have arrived, and their sender knows."""
        growth = num_bytes if self.size < self._threshold else SEGMENT_BYTES * num_bytes / self.size
        self.size = min(self.size + growth, MAX_WINDOW_BYTES)

    def stall_s(self, num_bytes: int) -> float:
        """How long the direction stands still before these bytes: 0 unless one of their segments is lost."""
        segments = -(-num_bytes // SEGMENT_BYTES)
        if not self._loss or self._rng.random() < (1 - self._loss) ** segments:
            return 0.0
        self._threshold = self.size = max(self.size / 2, 2.0 * SEGMENT_BYTES)
        return self._timeout_s


@dataclass(frozen=True, slots=True)
class PeerLink:
    """One peer's line: what it sends and what it receives, over all its connections."""

    up: Pipe
    down: Pipe

    @classmethod
    def of(cls, mbit_per_s: float | None) -> PeerLink:
        """The same rate both ways; None: no limit."""
        rate = mbit_per_s * 1e6 / 8 if mbit_per_s is not None else None
        return cls(Pipe(rate), Pipe(rate))


UNLIMITED = PeerLink(Pipe(None), Pipe(None))


@dataclass(slots=True)
class _Direction:
    """One direction of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pipes: tuple[Pipe, Pipe]
    delay_s: float
    window: Window
    in_flight: int = 0
    last_arrival: float = 0.0
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Until the sender has ended and all that it sent has arrived."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take())
            group.create_task(self._deliver())

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(2 * self.delay_s)  # the connection's own handshake
        while data := await self.reader.read(PIECE_BYTES):
            while self.in_flight and self.in_flight + len(data) > self.window.size:
                self.changed.clear()
                await self.changed.wait()
            if stall_s := self.window.stall_s(len(data)):
                await asyncio.sleep(stall_s)
            left = loop.time()
            for pipe in self.pipes:
                left = pipe.leaves_at(len(data), left)
            self.last_arrival = max(self.last_arrival, left + self.delay_s)
            self._put(data)
            await asyncio.sleep(max(0.0, left - loop.time() - READ_AHEAD_S))
        self.last_arrival = max(self.last_arrival, loop.time() + self.delay_s)
        self._put(b"")

    def _put(self, data: bytes) -> None:
        self.in_flight += len(data)
        self.queue.append((self.last_arrival, data))
        self.changed.set()

    async def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self.queue:
                self.changed.clear()
                await self.changed.wait()
            arrival, data = self.queue.popleft()
            await asyncio.sleep(max(0.0, arrival - loop.time()))
            if not data:
                if self.writer.can_write_eof():
                    self.writer.write_eof()
                return
            self.writer.write(data)
            await self.writer.drain()
            loop.call_later(self.delay_s, self._acknowledge, len(data))

    def _acknowledge(self, num_bytes: int) -> None:
        self.in_flight -= num_bytes
        self.window.acknowledge(num_bytes)
        self.changed.set()


class LinkProxy:
    """A port that leads to ``target_host:target_port`` over a line of that peer's.

    Args:
        mbit_per_s, delay_ms, loss: of the line: megabits per second each way (None: no limit), one-way delay, and
            chance of a segment of 1,460 bytes to be lost.
        link: the target's line, where several proxies lead to it; ``mbit_per_s`` is then not used.
        line_of: the line of whoever dials from an IP address; peers on one machine dial from addresses of their own
            (127.0.0.2, 127.0.0.3, ...).
        seed: of the losses.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        mbit_per_s: float | None,
        delay_ms: float,
        loss: float = 0.0,
        *,
        host: str = "127.0.0.1",
        link: PeerLink | None = None,
        line_of: Callable[[str], PeerLink] = lambda address: UNLIMITED,
        seed: int = 0,
    ) -> None:
        self._target = target_host, target_port
        self._link = link or PeerLink.of(mbit_per_s)
        self._delay_s = delay_ms / 1e3
        self._loss = loss
        self._host = host
        self._line_of = line_of
        self._rng = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        if self._server is None:
            raise ValueError("the proxy is not running: start() it first")
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, self._host, 0, limit=4 * PIECE_BYTES)

    async def close(self) -> None:
        """Break every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    far = await asyncio.open_connection(*self._target, limit=4 * PIECE_BYTES)
                await self._relay((reader, writer), far)
        finally:
            self._connections.discard(task)
            await _close(writer)

    async def _relay(
        self,
        near: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        far: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        line = self._line_of(near[1].get_extra_info("peername")[0])
        directions = [
            _Direction(near[0], far[1], (line.up, self._link.down), self._delay_s, self._window()),
            _Direction(far[0], near[1], (self._link.up, line.down), self._delay_s, self._window()),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for direction in directions:
                    group.create_task(direction.run())
        except* OSError:
            pass  # an end is gone: so is the other
        finally:
            await _close(far[1])

    def _window(self) -> Window:
        return Window(2 * self._delay_s, self._loss, self._rng)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, asyncio.CancelledError):
        await writer.wait_closed()


async def measure_delay_ms(mbit_per_s: float, delay_ms: float, loss: float, repeats: int) -> float:
    """Half of the time in which a byte comes back: the median of ``repeats``."""
    async with _to_a_server(_echo, mbit_per_s, delay_ms, loss) as [(reader, writer)]:
        times = []
        for turn in range(repeats + 1):
            began = time.perf_counter()
            writer.write(b"x")
            await reader.readexactly(1)
            if turn:  # the first also waits for the connection
                times.append(time.perf_counter() - began)
    return statistics.median(times) / 2 * 1e3


async def measure_mbit_per_s(
    mbit_per_s: float, delay_ms: float, loss: float, seconds: float, connections: int = 1
) -> float:
    """The rate of a transfer of about so many seconds, over the second half of its bytes: the window is open then."""
    total = int(mbit_per_s * 1e6 / 8 * seconds / connections)
    stamps: list[float] = []

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(total // 2)
        stamps.append(time.perf_counter())
        await reader.readexactly(total - total // 2)
        stamps.append(time.perf_counter())
        writer.write(b"x")

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(total))
        await reader.readexactly(1)

    async with _to_a_server(sink, mbit_per_s, delay_ms, loss, connections) as ends:
        await asyncio.gather(*(send(*end) for end in ends))
    stamps.sort()
    halves, ends_at = stamps[:connections], stamps[connections:]
    return connections * (total - total // 2) * 8 / 1e6 / (statistics.mean(ends_at) - statistics.mean(halves))


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(PIECE_BYTES):
        writer.write(data)


@contextlib.asynccontextmanager
async def _to_a_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    mbit_per_s: float,
    delay_ms: float,
    loss: float,
    connections: int = 1,
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await serve(reader, writer)
        await _close(writer)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    proxy = LinkProxy("127.0.0.1", server.sockets[0].getsockname()[1], mbit_per_s, delay_ms, loss)
    await proxy.start()
    ends = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(connections)]
    try:
        yield ends
    finally:
        for _, writer in ends:
            await _close(writer)
        await proxy.close()
        server.close()


def run(quick: bool) -> list[Claim]:
    """Measure what the proxy does against what it was told."""
    lines = [(100.0, 100.0), (50.0, 25.0)] if quick else [(20.0, 50.0), (100.0, 20.0), (100.0, 100.0), (400.0, 25.0)]
    seconds, repeats = (4.0, 8) if quick else (8.0, 25)
    rows, worst_rate, worst_delay = [], 0.0, 0.0
    for mbit_per_s, delay_ms in lines:
        for connections in (1, 4):
            rate = asyncio.run(measure_mbit_per_s(mbit_per_s, delay_ms, 0.0, seconds, connections))
            delay = asyncio.run(measure_delay_ms(mbit_per_s, delay_ms, 0.0, repeats))
            worst_rate = max(worst_rate, abs(rate / mbit_per_s - 1))
            worst_delay = max(worst_delay, abs(delay / delay_ms - 1))
            name = f"{mbit_per_s:g} Mbit/s, {delay_ms:g} ms, {connections} connection{'s' if connections > 1 else ''}"
            rows.append([name, f"{rate:.1f}", f"{delay:.1f}"])
    for loss, slowdown in ((1e-4, 3), (1e-3, 15)):
        rate = asyncio.run(measure_mbit_per_s(100.0, 20.0, loss, 2 * seconds / slowdown))
        rows.append([f"100 Mbit/s, 20 ms, loss {loss:g}", f"{rate:.1f}", "-"])
    table("Links, as measured through the proxy", ("set", "Mbit/s", "one-way ms"), rows)
    return [
        at_most("largest deviation of the rate from what was set, %", 100 * worst_rate, 10.0),
        at_most("largest deviation of the delay from what was set, %", 100 * worst_delay, 10.0),
    ]


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    return report(run(options.quick), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
