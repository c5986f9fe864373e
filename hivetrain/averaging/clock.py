"""The times of one all-reduce on one node, and how long that node itself stood still.

The loop's clock is the only clock: a test turns it (`memory.run_in_virtual_time`). Times of the plan, from this node's
own start:

    0 ........ send_deadline ........ fetch ....... fetch_close .. confirm_close .. deadline
      vectors, means          the last means     parts reduced again     agreement

A process that was stopped, suspended or starved finds every timer run out when it wakes. So a timer that measures
someone else's silence is a `Patience`, and the time for which we stood still is given back to all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import TracebackType

from hivetrain.averaging.group import GroupPlan

logger = logging.getLogger(__name__)

TICK_S = 0.5
STANDSTILL_S = 2.0  # a tick that comes this late: our process had stopped, and others' silence proves nothing


class Signal:
    """Wakes everyone who waits at that moment."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake them."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, until: float | None = None) -> None:
        """Until somebody notifies, or loop time ``until``."""
        event = self._event
        if until is None:
            await event.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await event.wait()


class Clock:
    """The plan's times on this node's clock. ``begin`` starts it."""

    def __init__(self, plan: GroupPlan) -> None:
        self._plan = plan
        self._begin = 0.0
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._patient: set[Patience] = set()
        self.stalled_s = 0.0

    def begin(self) -> None:
        """Start."""
        self._begin = self.now()
        self._schedule()

    def stop(self) -> None:
        """Watch ourselves no longer."""
        if self._timer is not None:
            self._timer.cancel()

    @staticmethod
    def now() -> float:
        """The loop's clock, in seconds."""
        return asyncio.get_running_loop().time()

    def awake(self) -> float:
        """As `now`, less what we stood still."""
        return self.now() - self.stalled_s

    @property
    def elapsed(self) -> float:
        """Seconds since we began."""
        return self.now() - self._begin

    @property
    def begin_awake(self) -> float:
        """`awake` at our start."""
        return self._begin

    @property
    def send_deadline(self) -> float:
        """Loop time after which a part's first reducer accepts no vector."""
        return self._begin + self._plan.send_deadline_s

    @property
    def fetch_at(self) -> float:
        """Loop time after which a part's first reducer is waited for no more."""
        return self._into_window(0.5)

    @property
    def fetch_close(self) -> float:
        """Loop time after which a mean counts as missing."""
        return self._into_window(0.8)

    @property
    def confirm_close(self) -> float:
        """Loop time after which nobody is waited for."""
        return self._into_window(0.9)

    @property
    def deadline(self) -> float:
        """Loop time at which everything ends."""
        return self._into_window(1.0)

    def _into_window(self, share: float) -> float:
        window = self._plan.deadline_s - self._plan.send_deadline_s
        return self.send_deadline + share * window

    def patience(self, seconds: float, until: float) -> Patience:
        """A context that ends with TimeoutError ``seconds`` after it was last fed, or at ``until``."""
        return Patience(self, seconds, until)

    def watch(self, patience: Patience) -> None:
        """Give our standstills back to that patience."""
        self._patient.add(patience)

    def unwatch(self, patience: Patience) -> None:
        """No longer."""
        self._patient.discard(patience)

    def _schedule(self) -> None:
        self._due = self.now() + TICK_S
        self._timer = asyncio.get_running_loop().call_at(self._due, self._tick)

    def _tick(self) -> None:
        # A plain callback: it runs before those of every timer that was due after it, and can still move them.
        lag = self.now() - self._due
        if lag > STANDSTILL_S:
            logger.warning("this process stood still for %.1f s", lag)
            self.stalled_s += lag
            for patience in self._patient:
                patience.shift(lag)
        self._schedule()


class Patience:
    """See `Clock.patience`."""

    def __init__(self, clock: Clock, seconds: float, until: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._until = until
        self._limit = asyncio.timeout_at(min(clock.now() + seconds, until))

    async def __aenter__(self) -> Patience:
        await self._limit.__aenter__()
        self._clock.watch(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.unwatch(self)
        await self._limit.__aexit__(kind, error, trace)

    def feed(self) -> None:
        """There was progress."""
        self._move(min(self._clock.now() + self._seconds, self._until))

    def hold(self) -> None:
        """It is not the peer that we wait for: until `feed`, only ``until`` counts."""
        self._move(self._until)

    def shift(self, seconds: float) -> None:
        """We stood still for so long."""
        when = self._limit.when()
        if when is not None:
            self._move(min(when + seconds, self._until))

    def _move(self, when: float) -> None:
        if not self._limit.expired():
            self._limit.reschedule(when)
