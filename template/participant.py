"""Taking part in one all-reduce: the same steps for a miner, a sitting validator and the leader."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.transport import Transport
from hivetrain.errors import ServiceError
from hivetrain.identity import Identity, Verify
from hivetrain.manifest import state_message
from hivetrain.training.outer import outer_step
from hivetrain.training.state import State, state_hash
from hivetrain.verification.merkle import MerkleTree
from hivetrain.workbench import DELTA, EXP_AVG, EXP_AVG_SQ, Parts
from template.network import GaveUp, NetworkThread
from template.protocol import AllReduceReply, Link, MemberFault

logger = logging.getLogger(__name__)

MAX_FAULTS = 1024  # what an AllReduceReply holds
GRACE_S = 5.0
"""How much longer than the plan's deadline the model's thread waits for the network's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Participation:
    """What one all-reduce gave here.

    Attributes:
        outcome: None where the exchange could not run at all (our own failure), or gave way to a higher attempt.
        state: the next state, None where a part is missing.
        state_hash: its hash, "" without one.
        signature: hex, over `hivetrain.manifest.state_message`; "" without a state.
        detail: in words, where something is missing.
    """

    outcome: AllReduceOutcome | None
    state: State | None
    state_hash: str = ""
    signature: str = ""
    detail: str = ""


def take_part(
    plan: GroupPlan,
    *,
    parts: Parts,
    state: State,
    payload: bytes | None,
    identity: Identity,
    verify: Verify,
    network: NetworkThread,
    transport: Transport,
    give_way: Callable[[], bool] = lambda: False,
    tree: MerkleTree | None = None,
    memory: bytearray | None = None,
) -> Participation:
    """Exchange with the group, then take the outer step and sign what came out.

    Args:
        tree, memory: see `all_reduce`; the next state is not in ``memory``.
        give_way: asked now and then during the exchange; True ends it, for a higher attempt has begun.
    """
    work = all_reduce(plan, identity, payload, transport, verify, tree, memory)
    try:
        outcome = network.run(work, plan.deadline_s + GRACE_S, give_way)
    except GaveUp:
        logger.warning("attempt %d of round %d gives way to a higher one", plan.attempt, plan.round)
        return Participation(outcome=None, state=None, detail="this attempt gave way to a higher one")
    except (ServiceError, ValueError) as exc:  # ValueError: the plan has us at another peer id, or another payload
        logger.warning("all-reduce of round %d could not run here: %s", plan.round, exc)
        return Participation(outcome=None, state=None, detail=str(exc))
    if not outcome.complete:
        return Participation(outcome=outcome, state=None, detail="a part of the mean is missing")
    next_state = outer_step(
        state,
        outcome.vectors[DELTA],
        outcome.vectors.get(EXP_AVG),
        outcome.vectors[EXP_AVG_SQ],
        parts.recipe.outer,
        parts.recipe.inner.max_steps,
    )
    next_state = parts.base.advance(next_state)
    digest = state_hash(next_state)
    signature = identity.sign(state_message(plan.run_id, plan.round, plan.attempt, digest)).hex()
    return Participation(outcome=outcome, state=next_state, state_hash=digest, signature=signature)


def make_reply(plan: GroupPlan, done: Participation) -> AllReduceReply:
    """What a member tells the leader."""
    outcome = done.outcome
    if outcome is None:
        return AllReduceReply(
            run_id=plan.run_id,
            round=plan.round,
            attempt=plan.attempt,
            accepted=True,
            completed=False,
            detail=done.detail[:500],
        )
    return AllReduceReply(
        run_id=plan.run_id,
        round=plan.round,
        attempt=plan.attempt,
        accepted=True,
        completed=done.state is not None,
        state_hash=done.state_hash,
        state_signature=done.signature,
        included=dict(outcome.included),
        faults=tuple(
            MemberFault(hotkey=fault.hotkey, fault=fault.fault.value, detail=fault.detail[:500])
            for fault in outcome.faults[:MAX_FAULTS]
            if fault.hotkey  # a stranger who proved no hotkey is in the log, not in the blame
        ),
        bytes_sent=outcome.bytes_sent,
        bytes_received=outcome.bytes_received,
        seconds=outcome.seconds,
        links=tuple(
            Link(
                hotkey=link.hotkey,
                bytes_received=link.bytes_received,
                seconds=link.seconds,
                first_byte_s=link.first_byte_s or 0.0,
            )
            for link in outcome.links
        ),
        detail=done.detail[:500],
    )
