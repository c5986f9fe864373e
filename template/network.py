"""One thread with one event loop: axon, dendrite and libp2p live here, the model never does.

The model's thread hands coroutines over and waits for their results; handlers on this side post to its mailbox.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from hivetrain.errors import ServiceError

T = TypeVar("T")

POLL_S = 0.1
END_S = 5.0


class GaveUp(Exception):
    """Work on the network thread was ended because its caller does not need it any more."""


class NetworkThread:
    """An asyncio loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; returns when the loop runs."""
        started = threading.Event()

        def main() -> None:
            loop = uvloop.new_event_loop()  # measured: a tenth of an all-reduce's CPU time less than asyncio's own
            asyncio.set_event_loop(loop)
            self._loop = loop
            loop.call_soon(started.set)
            try:
                loop.run_forever()
            finally:
                loop.run_until_complete(_cancel_all())
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()

        self._thread = threading.Thread(target=main, name="network", daemon=True)
        self._thread.start()
        started.wait()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Schedule ``work`` on the loop.

        Raises:
            ServiceError: the thread does not run.
        """
        if self._loop is None or not self._loop.is_running():
            work.close()
            raise ServiceError("the network thread does not run")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> T:
        """Run ``work`` on the loop and wait for it.

        Args:
            give_up: asked now and then; True ends the work.

        Raises:
            ServiceError: it took longer than ``timeout_s``, or the thread was closed.
            GaveUp: ``give_up`` said so. Either way the work has ended, or has had `END_S` to do so.
        """
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await work
            finally:
                ended.set()

        try:
            future = self.submit(watched())
        except ServiceError:
            work.close()
            raise
        give_up_at = time.monotonic() + timeout_s
        while True:
            try:
                return future.result(max(0.0, min(POLL_S, give_up_at - time.monotonic())))
            except concurrent.futures.TimeoutError:
                if future.done():  # in this very moment, or with a timeout of its own
                    return future.result()
            except concurrent.futures.CancelledError:
                raise ServiceError("the network thread was closed") from None
            late = time.monotonic() >= give_up_at
            if late or give_up():
                future.cancel()
                ended.wait(END_S)  # what it holds, such as the transport's acceptor, is wanted next
                if late:
                    raise ServiceError(f"network work took longer than {timeout_s:.1f} s")
                raise GaveUp

    def close(self) -> None:
        """Cancel what runs and stop the thread."""
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop = self._thread = None


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
