"""Who may call, how often, and who is served first.

Facts come from the cached metagraph through one seam, so that a request never waits for the chain. Everything
here runs before a request's body is trusted; nothing here reads it.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from template.protocol import IsAlive


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronFacts:
    """What the cached metagraph knows of a registered hotkey. ``stake`` is in TAO."""

    uid: int
    stake: float
    validator_permit: bool


Registry = Callable[[str], NeuronFacts | None]
"""``registry(hotkey)``: its facts, or None when it is not registered. Never blocks, never raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether a call may go on. ``status`` is the HTTP status of a refusal, ``reason`` is shown to the caller."""

    allowed: bool
    status: int = 200
    reason: str = ""


ALLOWED = Decision(allowed=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """The rules of `--blacklist.*`.

    `IsAlive` is open to any registered hotkey. Every other route costs work, so it takes a validator: a permit
    (unless ``force_validator_permit`` is off) and ``min_stake``.
    """

    registry: Registry
    min_stake: float = 0.0  # TAO
    force_validator_permit: bool = True
    allow_non_registered: bool = False
    denied: frozenset[str] = frozenset()
    open_routes: frozenset[str] = frozenset({IsAlive.route})

    def __post_init__(self) -> None:
        if not self.min_stake >= 0:
            raise ValueError(f"blacklist.min_stake must be >= 0, got {self.min_stake}")

    def facts(self, hotkey: str) -> NeuronFacts | None:
        """What the metagraph knows of ``hotkey``."""
        return self.registry(hotkey)

    def check(self, hotkey: str, route: str) -> Decision:
        """Decide on a call by its claimed (or proven) hotkey alone."""
        if hotkey in self.denied:
            return _refused("this hotkey is denied here")
        facts = self.registry(hotkey)
        if facts is None and not self.allow_non_registered:
            return _refused("hotkey is not registered on this subnet")
        if route in self.open_routes:
            return ALLOWED
        if self.force_validator_permit and not (facts is not None and facts.validator_permit):
            return _refused("this route takes a validator permit")
        stake = facts.stake if facts is not None else 0.0
        if stake < self.min_stake:
            return _refused(f"this route takes a stake of at least {self.min_stake:g} TAO, got {stake:g}")
        return ALLOWED

    def priority(self, hotkey: str) -> float:
        """Larger is served first: the stake, in TAO."""
        facts = self.registry(hotkey)
        return facts.stake if facts is not None else 0.0


def _refused(reason: str) -> Decision:
    return Decision(allowed=False, status=403, reason=reason)


class Busy(Exception):
    """No room for this request now; the caller gets a 429 and may come again."""


@dataclass(slots=True)
class _Usage:
    tokens: float
    refilled_at: float
    in_flight: int = 0


class RateLimiter:
    """A token bucket and a bound on requests in flight, per key.

    Memory is bounded: past ``max_keys`` the key that was idle longest is forgotten, which costs nothing but the
    memory of its bucket.

    Args:
        rate_per_s: refill, in requests per second.
        burst: requests that may come at once after a pause.
        max_in_flight: requests of one key that may be in progress.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        rate_per_s: float,
        burst: int,
        max_in_flight: int,
        max_keys: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._max_in_flight = max_in_flight
        self._max_keys = max_keys
        self._clock = clock
        self._usage: OrderedDict[str, _Usage] = OrderedDict()

    @contextmanager
    def admit(self, key: str) -> Iterator[None]:
        """Hold one place of ``key`` for the duration of the block.

        Raises:
            Busy: too many requests per second, or in flight.
        """
        usage = self._touch(key)
        if usage.in_flight >= self._max_in_flight:
            raise Busy(f"{usage.in_flight} requests in flight, the limit is {self._max_in_flight}")
        if usage.tokens < 1:
            raise Busy(f"more than {self._rate_per_s:g} requests per second")
        usage.tokens -= 1
        usage.in_flight += 1
        try:
            yield
        finally:
            usage.in_flight -= 1

    def _touch(self, key: str) -> _Usage:
        now = self._clock()
        usage = self._usage.get(key)
        if usage is None:
            self._forget_idle()
            usage = self._usage[key] = _Usage(tokens=float(self._burst), refilled_at=now)
        else:
            self._usage.move_to_end(key)
            usage.tokens = min(self._burst, usage.tokens + (now - usage.refilled_at) * self._rate_per_s)
            usage.refilled_at = now
        return usage

    def _forget_idle(self) -> None:
        while len(self._usage) >= self._max_keys:
            idle = next((key for key, usage in self._usage.items() if usage.in_flight == 0), None)
            if idle is None:
                raise Busy(f"{len(self._usage)} callers in flight")
            del self._usage[idle]


@dataclass(order=True, slots=True)
class _Waiter:
    rank: tuple[float, int]  # (-priority, arrival)
    turn: asyncio.Future[None] = field(compare=False)


class PriorityGate:
    """A bounded number of requests inside, a bounded number waiting; the largest stake enters first.

    Args:
        max_inside: requests that may be in progress.
        max_waiting: requests that may wait; past it the lowest priority is turned away, be it the newcomer's.
    """

    def __init__(self, *, max_inside: int, max_waiting: int) -> None:
        self._max_inside = max_inside
        self._max_waiting = max_waiting
        self._inside = 0
        self._arrivals = 0
        self._waiting: list[_Waiter] = []

    @asynccontextmanager
    async def admit(self, priority: float, timeout_s: float) -> AsyncIterator[None]:
        """Wait for a place, and hold it for the duration of the block.

        Raises:
            Busy: no place within ``timeout_s``, or turned away for somebody of higher priority.
        """
        if self._inside >= self._max_inside:
            await self._wait_turn(priority, timeout_s)
        else:
            self._inside += 1
        try:
            yield
        finally:
            self._leave()

    async def _wait_turn(self, priority: float, timeout_s: float) -> None:
        self._arrivals += 1
        waiter = _Waiter((-priority, self._arrivals), asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, waiter)
        if len(self._waiting) > self._max_waiting:
            last = max(self._waiting)
            self._drop(last)
            last.turn.set_exception(Busy("busy with callers of higher stake"))
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.turn
        except BaseException as exc:
            if waiter in self._waiting:
                self._drop(waiter)
            elif waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.exception() is None:
                self._leave()  # the place was handed over in the same tick in which we gave up: pass it on
            if isinstance(exc, TimeoutError):
                raise Busy(f"no place within {timeout_s:g} s") from exc
            raise

    def _drop(self, waiter: _Waiter) -> None:
        self._waiting.remove(waiter)
        heapq.heapify(self._waiting)

    def _leave(self) -> None:
        """Hand our place to the next waiter that still waits; it is never empty in between."""
        while self._waiting:
            waiter = heapq.heappop(self._waiting)
            if not waiter.turn.done():
                waiter.turn.set_result(None)
                return
        self._inside -= 1


__all__ = [
    "AccessPolicy",
    "Busy",
    "Decision",
    "NeuronFacts",
    "PriorityGate",
    "RateLimiter",
    "Registry",
]
