"""A tracker never stops a neuron, nor slows it: each backend works on a daemon thread behind a bounded queue.

`log` copies the metrics and returns, in microseconds. What the backend raises is logged once per kind and
counted. When the backend blocks, the queue fills and the oldest records are dropped and counted. `finish` waits
for a bounded time; a thread that is still blocked then dies with the process.

One thread per backend, so that a stuck dashboard does not hold up the JSONL file.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence

from hivetrain.tracking.tracker import Abandonable, AlertLevel, Tracker, Value, plain

logger = logging.getLogger(__name__)

_Call = tuple[str, Callable[[], None]]


class SafeTracker:
    """Wraps one `Tracker` so that no call raises or waits, but for `finish`, whose wait is bounded.

    Args:
        backend: what really records.
        label: the backend's name in log lines, such as ``trackio``.
        max_queued: records that wait for a slow backend before the oldest is dropped.
        finish_timeout_s: how long `finish` waits for the queue to empty.
    """

    def __init__(
        self, backend: Tracker, *, label: str, max_queued: int = 10_000, finish_timeout_s: float = 5.0
    ) -> None:
        self.label = label
        self.num_dropped = 0  # records that the backend never saw
        self.failures: Counter[str] = Counter()  # "log: OSError" -> how often
        self._backend = backend
        self._max_queued = max_queued
        self._finish_timeout_s = finish_timeout_s
        self._queue: deque[_Call] = deque()
        self._wake = threading.Condition()
        self._finishing = False
        self._dead = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, which opens the backend. Records logged before that are kept."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker-{self.label}", daemon=True)
            self._thread.start()

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        values = plain(metrics)
        self._put("log", lambda: self._backend.log(values, step))

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        self._put("alert", lambda: self._backend.alert(title, text, level))

    def finish(self) -> None:
        """Let the backend write out its queue and close, for at most ``finish_timeout_s``."""
        self.begin_finish()
        self.join(self._finish_timeout_s)

    def begin_finish(self) -> None:
        """Take no further records; the thread closes the backend when its queue is empty."""
        with self._wake:
            self._finishing = True
            self._wake.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end. False, with a warning, when it does not within ``timeout_s``."""
        thread = self._thread
        if thread is None:
            return True
        thread.join(max(0.0, timeout_s))
        if thread.is_alive():
            with self._wake:
                num_queued = len(self._queue)
            logger.warning("tracker %s did not finish in time; %d records are not saved", self.label, num_queued)
            if isinstance(self._backend, Abandonable):
                self._attempt("abandon", self._backend.abandon)
            return False
        if self.num_dropped:
            logger.warning("tracker %s dropped %d records in all", self.label, self.num_dropped)
        return True

    def _put(self, what: str, call: Callable[[], None]) -> None:
        with self._wake:
            if self._finishing or self._dead:
                self.num_dropped += self._dead
                return
            full = len(self._queue) >= self._max_queued
            if full:
                self._queue.popleft()
                self.num_dropped += 1
            first_drop = full and self.num_dropped == 1
            self._queue.append((what, call))
            self._wake.notify()
        if first_drop:
            logger.warning("tracker %s is slow or stuck: dropping its oldest records", self.label)

    def _work(self) -> None:
        if not self._attempt("start", self._backend.start):
            with self._wake:
                self._dead = True
                self.num_dropped += len(self._queue)
                self._queue.clear()
            return
        while (call := self._next()) is not None:
            self._attempt(*call)
        self._attempt("finish", self._backend.finish)

    def _next(self) -> _Call | None:
        with self._wake:
            while not self._queue and not self._finishing:
                self._wake.wait()
            return self._queue.popleft() if self._queue else None

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # the boundary: whatever a backend raises stays in this thread
            kind = f"{what}: {type(error).__name__}"
            self.failures[kind] += 1
            if self.failures[kind] == 1:
                effect = "it stays off" if what == "start" else "further failures of this kind are only counted"
                logger.warning("tracker %s failed to %s: %s; %s", self.label, what, error, effect, exc_info=True)
            return False
        return True


class Trackers:
    """Fans out to several backends, each behind its own `SafeTracker`.

    Args:
        backends: label to backend, such as ``{"jsonl": JsonlTracker(...)}``.
        max_queued: see `SafeTracker`.
        finish_timeout_s: how long `finish` takes at most, for all backends together.
    """

    def __init__(
        self, backends: Mapping[str, Tracker], *, max_queued: int = 10_000, finish_timeout_s: float = 5.0
    ) -> None:
        self.trackers: Sequence[SafeTracker] = [
            SafeTracker(backend, label=label, max_queued=max_queued) for label, backend in backends.items()
        ]
        self._finish_timeout_s = finish_timeout_s

    def start(self) -> None:
        for tracker in self.trackers:
            tracker.start()

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step)

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        for tracker in self.trackers:
            tracker.alert(title, text, level)

    def finish(self) -> None:
        deadline = time.monotonic() + self._finish_timeout_s
        for tracker in self.trackers:
            tracker.begin_finish()
        for tracker in self.trackers:
            tracker.join(deadline - time.monotonic())
