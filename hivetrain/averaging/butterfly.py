"""Butterfly all-reduce: every reducer averages one part for the group; everyone ends with the same bits.

Each member brings its chunks of a part to the part's reducer and takes the mean home on the same stream, both at once
and batch by batch (`opening`, `reduction`). A mean is encoded once and signed, so all get the same bytes, from the
reducer or from anyone who holds them. Where a reducer fails the next in line reduces the part again. Every member
recomputes some blocks of what it gets (`auditing`): a wrong mean is proved, void for everyone, and made again. At the
end members compare what they hold (`agreement`).

Nothing waits past the plan's deadline, whatever a peer does. A peer's fault is a record in the outcome; our own failure
is a ServiceError; a plan that is not for us is a ValueError.

Reading order: group, messages, results, means, reducing, reduction, opening, serving, auditing, agreement.
Source: Moshpit SGD, section 3, https://arxiv.org/abs/2103.03239
"""

from __future__ import annotations

import asyncio
import logging

from hivetrain.averaging.agreement import Agreement
from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.opening import Opener
from hivetrain.averaging.outcome import AllReduceOutcome, FaultRecord, LinkStats
from hivetrain.averaging.peers import Peers
from hivetrain.averaging.proofs import proves_two_averages, proves_wrong_average
from hivetrain.averaging.serving import Server
from hivetrain.averaging.signed import Signed
from hivetrain.averaging.state import RoundState
from hivetrain.averaging.tally import make_outcome
from hivetrain.averaging.transport import Transport
from hivetrain.identity import Identity, Verify
from hivetrain.verification.merkle import MerkleTree

logger = logging.getLogger(__name__)

__all__ = [
    "AllReduceOutcome",
    "FaultRecord",
    "LinkStats",
    "all_reduce",
    "proves_two_averages",
    "proves_wrong_average",
]


async def all_reduce(
    plan: GroupPlan,
    me: Identity,
    payload: Bytes | None,
    transport: Transport,
    verify: Verify,
    tree: MerkleTree | None = None,
    memory: bytearray | None = None,
) -> AllReduceOutcome:
    """Average ``payload`` with the group's, by the plan's deadline at the latest.

    Args:
        plan: the same for everyone.
        me: whose hotkey the plan names.
        payload: encoded in the plan's layout, with the root that the plan names, and left as it is until we return;
            None where our weight is 0.
        transport: started, with no acceptor; it is ours until we return.
        verify: checks the other members' signatures.
        tree: over the payload's chunks, where it is at hand; otherwise they are hashed once more.
        memory: as many bytes as the layout's, which the caller keeps from round to round; the outcome's fp32 vectors
            are views on it. None: memory of this round's own.

    Returns:
        The mean as far as this node holds it, and what it saw. `vectors` have the same bits on every member whose
        `mean_sha256` is the same.

    Raises:
        ValueError: the plan is not for us.
        ServiceError: our own transport broke, or reached nobody.
    """
    state = RoundState(plan, me, payload, transport, verify, tree, memory)
    signed = Signed(state)
    peers = Peers(state, signed)
    agreement = Agreement(state, signed, peers)
    server = Server(state, signed, peers, agreement)
    transport.set_acceptor(server.accept, {member.peer_id for member in plan.members})
    state.clock.begin()
    opener = Opener(state, signed, peers)
    parts = [asyncio.create_task(opener.see_through(holding)) for holding in state.holdings.values()]
    agreed = asyncio.create_task(agreement.run())
    try:
        async with asyncio.timeout_at(state.clock.deadline) as limit:
            # Parts are seen through for as long as anybody may find them wrong: the agreement ends the round.
            running: set[asyncio.Future[None]] = {*parts, agreed, state.crash}
            while not agreed.done():
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
    except TimeoutError:
        if not limit.expired():
            raise
        logger.info("the all-reduce ran into its deadline")
    finally:
        transport.set_acceptor(None)
        state.clock.stop()
        for task in (*parts, agreed):
            task.cancel()
        await asyncio.gather(*parts, agreed, return_exceptions=True)
        await server.close()
        await peers.close()
        await state.close_streams()
    if state.crash.done():
        state.crash.result()
    outcome = make_outcome(state)
    state.release()
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
