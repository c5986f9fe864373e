"""The watcher of the chain's height: read by one thread, known to all."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hivetrain.errors import ChainError
from template.blocks import BlockWatcher

WAIT_S = 10.0


class FakeChain:
    """Answers each read with what a test put in; `read` returns once the watcher has taken it."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[int | ChainError] = queue.SimpleQueue()
        self.asked = threading.Semaphore(0)
        self.now = 0.0

    def __call__(self) -> int:
        self.asked.release()
        answer = self.answers.get(timeout=WAIT_S)
        if isinstance(answer, ChainError):
            raise answer
        return answer

    def say(self, answer: int | ChainError) -> None:
        """Give an answer and wait until the watcher asks for the next, so that it has taken this one in."""
        self.answers.put(answer)
        assert self.asked.acquire(timeout=WAIT_S)


@contextmanager
def watching(chain: FakeChain, first: int = 10) -> Iterator[BlockWatcher]:
    watcher = BlockWatcher(chain, interval_s=0.0, clock=lambda: chain.now)
    chain.answers.put(first)
    watcher.start()
    try:
        for _ in range(2):
            assert chain.asked.acquire(timeout=WAIT_S)
        yield watcher
    finally:
        chain.answers.put(first)
        closing = threading.Thread(target=watcher.close)
        closing.start()
        while closing.is_alive():
            chain.answers.put(first)
            closing.join(0.01)


def test_the_first_block_is_known_when_start_returns() -> None:
    with watching(FakeChain()) as watcher:
        assert watcher.block == 10


def test_before_the_start_no_block_is_known() -> None:
    assert BlockWatcher(lambda: 1, 1.0).block == -1


def test_a_first_read_that_fails_is_raised() -> None:
    def down() -> int:
        raise ChainError("no answer")

    with pytest.raises(ChainError, match="no answer"):
        BlockWatcher(down, 1.0).start()


def test_new_blocks_are_seen() -> None:
    chain = FakeChain()
    with watching(chain) as watcher:
        chain.say(12)
        assert watcher.block == 12


def test_a_block_never_goes_back() -> None:
    chain = FakeChain()
    with watching(chain) as watcher:
        chain.say(12)
        chain.say(11)
        assert watcher.block == 12


def test_an_outage_shows_as_age_and_is_over_with_the_next_answer(caplog: pytest.LogCaptureFixture) -> None:
    chain = FakeChain()
    caplog.set_level("INFO", logger="template.blocks")
    with watching(chain) as watcher:
        chain.now = 5.0
        chain.say(ChainError("down"))
        chain.say(ChainError("still down"))
        assert (watcher.block, watcher.age_s) == (10, 5.0)
        chain.say(11)
        assert (watcher.block, watcher.age_s) == (11, 0.0)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["chain does not answer, waiting for it: down"]
    assert "chain answers again at block 11" in caplog.text


def in_thread(call: Callable[[], int]) -> queue.SimpleQueue[int]:
    results: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=lambda: results.put(call()), daemon=True).start()
    return results


def test_who_waits_is_woken_by_its_block() -> None:
    chain = FakeChain()
    with watching(chain) as watcher:
        waiter = in_thread(lambda: watcher.wait(12, WAIT_S))
        chain.say(11)
        chain.say(13)
        assert waiter.get(timeout=WAIT_S) == 13


def test_a_wait_that_runs_out_gives_the_newest_block() -> None:
    with watching(FakeChain()) as watcher:
        assert watcher.wait(11, timeout_s=0.01) == 10


def test_a_block_that_is_here_is_not_waited_for() -> None:
    with watching(FakeChain()) as watcher:
        assert watcher.wait(10, timeout_s=0.0) == 10


def test_closing_wakes_who_waits() -> None:
    with watching(FakeChain()) as watcher:
        waiter = in_thread(lambda: watcher.wait(10_000, WAIT_S))
    assert waiter.get(timeout=WAIT_S) == 10
