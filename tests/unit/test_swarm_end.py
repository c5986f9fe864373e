"""What is said when the libp2p daemon ends before its process, as Ctrl-C in a terminal makes it."""

from __future__ import annotations

import asyncio
import gc
import logging

import pytest

from hivetrain.averaging.swarm import hush_the_daemons_end


async def _read_from_persistent_conn(error: Exception) -> None:
    raise error


async def _write_to_persistent_conn(error: Exception) -> None:
    raise error


async def _anything_else(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("work", "error", "is_told"),
    [
        (_read_from_persistent_conn, ConnectionResetError(104, "reset"), False),
        (_write_to_persistent_conn, ConnectionResetError("Connection lost"), False),
        (_read_from_persistent_conn, KeyError("a bug"), True),
        (_anything_else, ConnectionResetError(104, "reset"), True),
    ],
)
def test_only_who_talks_to_the_daemon_and_lost_it_is_not_reported(
    work, error: Exception, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave_a_failed_task_behind() -> None:
        asyncio.get_running_loop().set_exception_handler(hush_the_daemons_end)
        task = asyncio.create_task(work(error))
        await asyncio.wait({task})
        del task
        gc.collect()

    with caplog.at_level(logging.WARNING):
        asyncio.run(leave_a_failed_task_behind())
    assert ("never retrieved" in caplog.text) == is_told
