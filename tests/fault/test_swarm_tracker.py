"""A swarm's tracker, and a DHT that does not answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivemind.utils import MPFuture

    from hivetrain.trainer.tracker import SwarmTracker


class StuckDHT:
    """Gives no answer but those that the test gives."""

    client_mode = False

    class peer_id:
        to_bytes = staticmethod(lambda: b"peer")

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.stored: list[Any] = []

    def add_validators(self, validators: Any) -> None: ...

    def get(self, key: str, latest: bool, return_future: bool = False) -> Any:
        if return_future:
            self.asked.append(MPFuture())
            return self.asked[-1]
        return None

    def store(self, *args: Any, **kwargs: Any) -> Any:
        self.stored.append(kwargs["value"])
        stored: concurrent.futures.Future[bool] = concurrent.futures.Future()
        stored.set_result(True)
        return asyncio.wrap_future(stored) if threading.current_thread() is not threading.main_thread() else stored


@pytest.fixture
def dht() -> StuckDHT:
    return StuckDHT()


@pytest.fixture
def tracker(dht: StuckDHT) -> Iterator[SwarmTracker]:
    made = SwarmTracker(dht=dht, prefix="run", target_batch_size=100, default_refresh_period=0.0)
    made.fetched_global_progress_this_epoch.clear()
    yield made
    made.shutdown(timeout=10)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_round_does_not_wait_for_the_dht_and_its_answer_is_taken_in(dht: StuckDHT, tracker: SwarmTracker) -> None:
    until(lambda: dht.asked)
    assert tracker.lock_global_progress.acquire(timeout=1), "the lock is held while the DHT is asked"
    try:
        dht.asked[0].set_result(None)
        assert not tracker.fetched_global_progress_this_epoch.wait(0.1), "nothing changes in a round"
    finally:
        tracker.lock_global_progress.release()
    assert tracker.fetched_global_progress_this_epoch.wait(10)


def test_who_waits_tells_that_no_more_samples_come(dht: StuckDHT, tracker: SwarmTracker) -> None:
    tracker.report_local_progress(0, 8)
    until(lambda: dht.stored)
    assert dht.stored[-1]["samples_per_second"] > 0
    tracker.tell_idle()
    until(lambda: len(dht.stored) > 1)
    assert (dht.stored[-1]["samples_accumulated"], dht.stored[-1]["samples_per_second"]) == (8, 0.0)
    tracker.report_local_progress(0, 16)
    assert tracker.local_progress.samples_per_second > 0


def test_the_dht_is_asked_again_at_once_where_that_is_wanted(dht: StuckDHT, tracker: SwarmTracker) -> None:
    tracker.default_refresh_period = 1000.0
    until(lambda: dht.asked)
    dht.asked[0].set_result(None)
    assert tracker.fetched_global_progress_this_epoch.wait(10)
    until(lambda: tracker.global_progress.next_fetch_time > time.time() + 500)
    tracker.look_again()
    until(lambda: len(dht.asked) > 1)


def test_an_answer_from_before_our_epoch_does_not_count_as_news_of_it(dht: StuckDHT, tracker: SwarmTracker) -> None:
    until(lambda: dht.asked)
    with tracker.pause_updates():
        tracker.update_epoch(1)
    dht.asked[0].set_result(None)
    until(lambda: len(dht.asked) > 1)
    assert not tracker.fetched_global_progress_this_epoch.is_set()
    dht.asked[1].set_result(None)
    assert tracker.fetched_global_progress_this_epoch.wait(10)


def test_a_peer_is_seen_however_short_its_epochs_are(dht: StuckDHT, tracker: SwarmTracker) -> None:
    for epoch in range(6):
        known = len(dht.stored)
        tracker.report_local_progress(epoch, 5)
        until(lambda known=known: len(dht.stored) > known)
        with tracker.pause_updates():
            tracker.update_epoch(epoch + 1)
    assert {said["epoch"] for said in dht.stored if said and said["samples_accumulated"]} == set(range(6))


def test_a_dht_that_never_answers_does_not_keep_the_tracker_from_ending(dht: StuckDHT, tracker: SwarmTracker) -> None:
    until(lambda: dht.asked)
    tracker.report_local_progress(0, 1)
    until(lambda: dht.stored)
    tracker.report_local_progress(0, 2)  # not reported, and nothing else is for half a minute
    tracker.shutdown(timeout=10)
    until(lambda: not tracker.is_alive())
