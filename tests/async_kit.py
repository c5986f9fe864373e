"""How tests with real sockets run: within a deadline, and with no task left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

DEADLINE_S = 20.0


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    """`asyncio.run` of ``main()``, which has `DEADLINE_S`."""

    async def limited() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, "no task is left"

    asyncio.run(limited())
