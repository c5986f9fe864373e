"""hivemind's tracker of the swarm's progress, as we bend it: training waits for it as little as it can.

It runs in a thread of the trainer's process. hivemind's signs and stores a report at each step, while training waits
for the interpreter, and holds the lock that a round needs for as long as the DHT takes to answer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from hivemind.optim.progress_tracker import ProgressTracker
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.asyncio import enter_asynchronously

REPORT_S = 0.5  # between two reports of our samples: no peer looks more often


class Reports(threading.Event):
    """Set where our progress is to be reported: not where only samples were added to what was reported just now.

    An epoch's first samples are reported however short it is: who reports none for two epochs, hivemind forgets.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._at, self._due = clock, 0.0, True
        self._counted = -1  # the epoch of which samples were reported last

    def note(self, epoch: int, samples: int) -> None:
        """What the next `set` is for."""
        now = self._clock()
        self._due = samples == 0 or epoch != self._counted or now >= self._at + REPORT_S
        if self._due:
            self._at = now
            self._counted = epoch if samples else -1

    def set(self) -> None:
        due, self._due = self._due, True  # without a note, it is for something else: that we leave
        if due:
            super().set()


class SwarmTracker(ProgressTracker):  # type: ignore[misc]
    """`ProgressTracker`, started.

    Attributes:
        called: whether our group averages now, whatever we know of the swarm's samples.
    """

    called: Callable[[], bool] = staticmethod(lambda: False)
    global_progress: Any
    local_progress: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, start=False)
        self.should_report_progress = Reports()
        self.start()

    def run(self) -> None:
        try:
            super().run()
        finally:
            asyncio.get_event_loop().close()

    @property
    def ready_to_update_epoch(self) -> bool:
        """Whether the swarm has its samples: as far as we know, or because a member of our group knows."""
        return self.called() or bool(super().ready_to_update_epoch)

    def tell_idle(self) -> None:
        """Tell others that we add no samples for now: from our rate they would reckon some that we do not have."""
        self.local_progress = self.local_progress.copy(update={"samples_per_second": 0.0, "time": get_dht_time()})
        self.should_report_progress.set()

    def look_again(self) -> None:
        """Ask the DHT now, whenever it would have been asked."""
        self.global_progress.next_fetch_time = 0.0
        self.global_state_updated.set()

    def report_local_progress(self, local_epoch: int, samples_accumulated: int, **kwargs: Any) -> None:
        """As hivemind's; but not every step is told to others."""
        self.should_report_progress.note(local_epoch, samples_accumulated)
        super().report_local_progress(local_epoch, samples_accumulated, **kwargs)

    def _parse_swarm_progress_data(self, metadata: Any) -> Any:
        # What the DHT holds of ourselves is older than what we know: with it, an epoch would last some steps longer.
        ours = self.local_progress
        if isinstance(metadata, dict) and metadata and (ours.samples_accumulated or self._local_public_key in metadata):
            entry = ValueWithExpiration(ours.dict(), get_dht_time() + self.metadata_expiration)
            metadata = {**metadata, self._local_public_key: entry}
        return super()._parse_swarm_progress_data(metadata)

    async def _progress_fetcher(self) -> None:
        """As hivemind's; but a round waits for an answer to be taken in, not for the DHT to give it."""
        loop = asyncio.get_running_loop()
        over = loop.run_in_executor(None, self.shutdown_triggered.wait)
        while not self.shutdown_triggered.is_set():
            pause_s = max(0.0, self.global_progress.next_fetch_time - get_dht_time())
            if await loop.run_in_executor(None, self.global_state_updated.wait, pause_s):
                self.global_state_updated.clear()
                continue
            epoch = self.local_progress.epoch
            asked = self.dht.get(self.training_progress_key, latest=True, return_future=True)
            answer = asyncio.ensure_future(asyncio.wait_for(asked, None))
            await asyncio.wait({answer, over}, return_when=asyncio.FIRST_COMPLETED)
            if self.shutdown_triggered.is_set():  # the DHT may be gone, and never answer
                answer.cancel()
                return
            found = await answer
            async with enter_asynchronously(self.lock_global_progress):
                self.global_progress = self._parse_swarm_progress_data(getattr(found, "value", None))
                if self.local_progress.epoch == epoch:  # else it is older than our epoch
                    self.fetched_global_progress_this_epoch.set()
