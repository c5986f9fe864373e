"""Where asyncio's half of hivemind's libp2p daemon ends and ours begins."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from typing import Any

logger = logging.getLogger(__name__)

MAX_EARLY_BYTES = 256 << 10


def hush_the_daemons_end(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's exception handler: that hivemind lost its daemon is no news, `Swarm.alive` tells it.

    Ctrl-C in a terminal ends the daemon before us, and whatever reads from it or writes to it would leave a traceback.
    """
    task, exc = context.get("future"), context.get("exception")
    coroutine = task.get_coro() if isinstance(task, asyncio.Task) else None
    talks = getattr(coroutine, "__name__", "") in ("_read_from_persistent_conn", "_write_to_persistent_conn")
    if talks and isinstance(exc, ConnectionError):
        logger.debug("swarm: the connection to our daemon ended: %r", exc)
    else:
        loop.default_exception_handler(context)


async def detach(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[socket.socket, bytes]:
    """The socket of an asyncio stream, taken from it, and what had been read from it already.

    Raises:
        OSError, RuntimeError: it is ending.
    """
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    early = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            while piece := await reader.read(MAX_EARLY_BYTES):  # returns at once, or waits and is stopped
                early += piece
    sock = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
    sock.setblocking(False)
    writer.transport.abort()
    return sock, early
