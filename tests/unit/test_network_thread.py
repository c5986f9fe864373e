"""The loop in a thread of its own: hand work over, wait for it, and never for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from hivetrain.errors import ServiceError
from template.network import GaveUp, NetworkThread


@pytest.fixture
def network() -> Iterator[NetworkThread]:
    thread = NetworkThread()
    thread.start()
    yield thread
    thread.close()


async def where() -> str:
    return threading.current_thread().name


def test_work_runs_in_the_network_thread(network: NetworkThread) -> None:
    assert network.run(where(), 5) == "network"


def test_work_that_takes_too_long_is_cancelled_and_a_service_error(network: NetworkThread) -> None:
    cancelled = threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    with pytest.raises(ServiceError, match=r"longer than 0\.1 s"):
        network.run(slow(), 0.1)
    assert cancelled.wait(5)


def test_work_that_its_caller_gives_up_has_ended_when_the_caller_goes_on(network: NetworkThread) -> None:
    asked, ended = [], []

    async def endless() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    def give_up() -> bool:
        asked.append(True)
        return len(asked) >= 2

    with pytest.raises(GaveUp):
        network.run(endless(), 60, give_up)
    assert (len(asked), ended) == (2, [True])
    assert network.run(where(), 5) == "network"


def test_work_that_is_done_is_not_given_up(network: NetworkThread) -> None:
    assert network.run(where(), 5, lambda: True) == "network"


def test_an_error_of_the_work_itself_comes_back(network: NetworkThread) -> None:
    async def fails() -> None:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        network.run(fails(), 5)


def test_a_timeout_of_the_work_itself_is_not_ours(network: NetworkThread) -> None:
    async def times_out() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        network.run(times_out(), 5)


def test_the_loop_goes_on_after_work_that_failed(network: NetworkThread) -> None:
    async def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        network.run(fails(), 5)
    assert network.run(where(), 5) == "network"


def test_before_the_start_and_after_the_end_work_is_refused_and_closed() -> None:
    thread = NetworkThread()
    with pytest.raises(ServiceError, match="does not run"):
        thread.run(where(), 1)
    thread.start()
    thread.close()
    with pytest.raises(ServiceError, match="does not run"):
        thread.submit(where())


def test_closing_ends_what_runs_and_who_waits_for_it() -> None:
    thread = NetworkThread()
    thread.start()
    running, errors = threading.Event(), []

    async def endless() -> None:
        running.set()
        await asyncio.sleep(3600)

    def wait() -> None:
        try:
            thread.run(endless(), 3600)
        except ServiceError as exc:
            errors.append(str(exc))

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert running.wait(5)
    thread.close()
    waiter.join(5)
    assert errors == ["the network thread was closed"]


def test_closing_twice_and_starting_again_work() -> None:
    thread = NetworkThread()
    thread.close()
    thread.start()
    thread.close()
    thread.close()
    thread.start()
    assert thread.run(where(), 5) == "network"
    thread.close()
