"""Butterfly all-reduce: every reducer averages one part for the group; everyone ends with the same bits.

Each member opens one stream to each reducer, brings its chunks of that reducer's part, and takes the part's mean home
on the same stream (`opening`); each reducer averages whoever is in by the send deadline (`serving`, `reducing`). A mean
is encoded once and signed, so all get the same bytes, from the reducer or from anyone who holds them; at the end
members compare what reducers signed, and two different means of one part are a proof.

Nothing waits past the plan's deadline, whatever a peer does. A peer's fault is a record in the outcome; our own failure
is a ServiceError; a plan that is not for us is a ValueError.

Source: Moshpit SGD, section 3, https://arxiv.org/abs/2103.03239
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.opening import obtain_part
from hivetrain.averaging.outcome import AllReduceOutcome, FaultRecord, LinkStats
from hivetrain.averaging.serving import Server
from hivetrain.averaging.state import RoundState
from hivetrain.averaging.transport import Transport
from hivetrain.identity import Identity, Verify

logger = logging.getLogger(__name__)

__all__ = ["AllReduceOutcome", "FaultRecord", "LinkStats", "all_reduce"]

WATCH_TICK_S = 0.5
STALL_S = 2.0  # a tick that comes this late: our process had stopped, and others' silence proves nothing


async def all_reduce(
    plan: GroupPlan, me: Identity, payload: bytes | None, transport: Transport, verify: Verify
) -> AllReduceOutcome:
    """Average ``payload`` with the group's, by the plan's deadline at the latest.

    Args:
        plan: the same for everyone.
        me: whose hotkey the plan names.
        payload: encoded in the plan's layout, with the root that the plan names; None where our weight is 0.
        transport: started, with no acceptor; it is ours until we return.
        verify: checks the other members' signatures.

    Returns:
        The mean as far as this node holds it, and what it saw. `vectors` have the same bits on every member whose
        `mean_sha256` is the same.

    Raises:
        ValueError: the plan is not for us.
        ServiceError: our own transport broke, or reached nobody.
    """
    state = RoundState(plan, me, payload, transport, verify)
    server = Server(state)
    transport.set_acceptor(server.accept)
    state.begin()
    tasks: list[asyncio.Task[None]] = []
    try:
        tasks.append(asyncio.create_task(_watch_ourselves(state)))
        async with asyncio.timeout_at(state.deadline) as limit:
            await _take_part(state, server, tasks)
    except TimeoutError:
        if not limit.expired():
            raise
        logger.info("the all-reduce ran into its deadline: %d parts are open", len(state.unsettled))
    finally:
        transport.set_acceptor(None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.close()
        await state.close_streams()
    server.raise_bug()
    outcome = state.outcome()
    logger.info(
        "all-reduce: round=%d attempt=%d complete=%s members_in=%d faults=%d seconds=%.2f sent=%d received=%d",
        plan.round,
        plan.attempt,
        outcome.complete,
        sum(share > 0 for share in outcome.included.values()),
        len(outcome.faults),
        outcome.seconds,
        outcome.bytes_sent,
        outcome.bytes_received,
    )
    return outcome


async def _take_part(state: RoundState, server: Server, tasks: list[asyncio.Task[None]]) -> None:
    def spawn(work: Coroutine[None, None, None]) -> None:
        tasks.append(asyncio.create_task(work))

    for part in state.parts:
        if part is state.own_part:
            spawn(server.reduce(part))
        elif part.start < part.stop:
            spawn(obtain_part(state, part))
    running: set[asyncio.Future[None]] = {*tasks[1:], server.crash}
    while running - {server.crash}:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    await server.drain()


async def _watch_ourselves(state: RoundState) -> None:
    """Notice when this process stood still (stopped, suspended, starved): then nobody's silence is held against it."""
    while True:
        began = state.now()
        await asyncio.sleep(WATCH_TICK_S)
        lag = state.now() - began - WATCH_TICK_S
        if lag > STALL_S:
            state.stalled_s += lag
