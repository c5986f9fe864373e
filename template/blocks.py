"""The newest block, read by one thread and known to all: nobody waits for the chain in mid-step.

An outage of the chain shows as a block that stands still; `age_s` says for how long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hivetrain.errors import ServiceError

logger = logging.getLogger(__name__)


class BlockWatcher:
    """Polls the chain's height.

    Args:
        read_block: the chain's newest block; raises ServiceError when it cannot be read.
        interval_s: time between two reads.
        clock: monotonic seconds.
    """

    def __init__(
        self, read_block: Callable[[], int], interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read_block = read_block
        self._interval_s = interval_s
        self._clock = clock
        self._block = -1
        self._read_at = clock()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = False

    @property
    def block(self) -> int:
        """The newest block that was seen, -1 before the first."""
        return self._block

    @property
    def age_s(self) -> float:
        """Seconds since the chain last answered."""
        return self._clock() - self._read_at

    def start(self) -> None:
        """Read once, then keep reading in the background.

        Raises:
            ServiceError: the first read failed.
        """
        self._set(self._read_block())
        self._thread = threading.Thread(target=self._main, name="blocks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading and wake whoever waits."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def wait(self, until: int, timeout_s: float) -> int:
        """Wait until a block ``>= until`` is seen, at most ``timeout_s``; returns the newest block."""
        with self._changed:
            self._changed.wait_for(lambda: self._block >= until or self._stop.is_set(), timeout_s)
            return self._block

    def _main(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self._set(self._read_block())
            except ServiceError as exc:
                if not self._failing:
                    logger.warning("chain does not answer, waiting for it: %s", exc)
                self._failing = True
            except Exception:  # the boundary of this loop: a thread that died would look like a silent chain
                if not self._failing:
                    logger.exception("reading the chain's height failed, trying on")
                self._failing = True

    def _set(self, block: int) -> None:
        if self._failing:
            logger.info("chain answers again at block %d", block)
        self._failing = False
        self._read_at = self._clock()
        with self._changed:
            if block > self._block:
                self._block = block
                self._changed.notify_all()
