"""ALL_REDUCE: the leader names the group, calls it together, sits in it, and hears what everyone holds."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgpack

from hivetrain.averaging.butterfly import AllReduceOutcome
from hivetrain.averaging.group import GroupPlan, Member, plan_to_dict
from hivetrain.identity import Verify
from hivetrain.manifest import state_message
from hivetrain.verification.receipt import Receipt
from hivetrain.workbench import Parts
from template.anchor import Anchor
from template.dendrite import Reply
from template.participant import Participation
from template.protocol import AllReduce, AllReduceReply

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Led:
    """What leading gave.

    Attributes:
        plan: the group.
        done: what this validator holds.
        replies: what the other members say, by hotkey.
        signatures: hex signatures of members that hold the leader's very state.
    """

    plan: GroupPlan
    done: Participation
    replies: Mapping[str, AllReduceReply]
    signatures: Mapping[str, str]


def make_plan(
    *,
    parts: Parts,
    round_number: int,
    attempt: int,
    receipts: Mapping[str, Receipt],
    weights: Mapping[str, float],
    sitting: Sequence[str],
    anchors: Mapping[str, Anchor],
    duration_s: float,
    resting: Collection[str] = (),
    shares: Mapping[str, float] | None = None,
    owners: Mapping[str, str] | None = None,
) -> GroupPlan | None:
    """The group of one attempt; None when nobody has anything to send, or nobody can reduce.

    Args:
        receipts: valid ones, by hotkey.
        weights: samples that each sender's vector counts; 0 after a failed check.
        sitting: validators that reduce and send no vector.
        anchors: where everyone is reached, by hotkey; who is missing here cannot take part.
        duration_s: time for the whole exchange.
        resting: senders that reduce nothing: they left a part undone lately.
        shares: relative size of the part that a member reduces, by hotkey; 1 for who is not in it.
        owners: who was the first to announce a peer id, by peer id: of those that name it, that one is in the group.

    Who announces no address (behind a NAT) cannot be dialled: it sends over the streams that it opens, and reduces
    nothing.
    """
    shares = shares or {}
    members = [
        Member(
            hotkey=hotkey,
            peer_id=anchors[hotkey].peer_id,
            maddrs=anchors[hotkey].maddrs,
            weight=weights[hotkey],
            reduces=hotkey not in resting and bool(anchors[hotkey].maddrs),
            root=bytes.fromhex(receipt.payload_root),
            share=shares.get(hotkey, 1.0),
        )
        for hotkey, receipt in sorted(receipts.items())
        if weights.get(hotkey, 0.0) > 0 and hotkey in anchors and anchors[hotkey].peer_id
    ]
    seats = [
        Member(
            hotkey=hotkey,
            peer_id=anchors[hotkey].peer_id,
            maddrs=anchors[hotkey].maddrs,
            weight=0.0,
            reduces=bool(anchors[hotkey].maddrs),
            share=shares.get(hotkey, 1.0),
        )
        for hotkey in sitting
        if hotkey in anchors and anchors[hotkey].peer_id
    ]
    distinct = _distinct(seats, members, owners or {})
    if sum(member.sends for member in distinct) < parts.recipe.averaging.min_members:
        return None
    if not any(member.reduces for member in distinct):
        logger.warning("no group: not one of %d members can be dialled", len(distinct))
        return None
    return GroupPlan(
        run_id=parts.run_id,
        round=round_number,
        attempt=attempt,
        members=distinct,
        layout=parts.layout,
        send_deadline_s=duration_s / 2,
        deadline_s=duration_s,
        max_abs=parts.recipe.averaging.max_abs,
        mean=parts.recipe.averaging.mean,
    )


def _distinct(seats: Sequence[Member], senders: Sequence[Member], owners: Mapping[str, str]) -> tuple[Member, ...]:
    """Senders, then seats. Of those that name one peer id one stays: a seat, else its owner, else the first.

    A miner that copies another's peer id would otherwise put that one out of the group: a seat's the leader, and a
    sender's whoever sorts behind it.
    """
    seen: set[str] = set()
    kept = []
    for member in (*seats, *sorted(senders, key=lambda one: owners.get(one.peer_id) != one.hotkey)):
        if member.peer_id in seen:
            logger.warning("%s names another member's peer id and is left out", member.hotkey[:8])
            continue
        seen.add(member.peer_id)
        kept.append(member)
    return tuple(sorted(kept, key=lambda member: (not member.sends, member.hotkey if member.sends else "")))


def make_synapse(plan: GroupPlan, base_manifest: str) -> AllReduce:
    """The call that goes to every member."""
    return AllReduce(
        run_id=plan.run_id,
        round=plan.round,
        attempt=plan.attempt,
        plan=msgpack.packb(plan_to_dict(plan)),
        base_manifest=base_manifest,
    )


def make_state_synapse(plan: GroupPlan, base_manifest: str, state_hash: str) -> AllReduce:
    """The call that asks members to sign, for the plan's attempt, a state that they hold already."""
    return AllReduce(
        run_id=plan.run_id,
        round=plan.round,
        attempt=plan.attempt,
        plan=b"",
        base_manifest=base_manifest,
        want="state",
        state_hash=state_hash,
    )


def left_undone(plan: GroupPlan, outcome: AllReduceOutcome) -> set[str]:
    """Reducers whose own part is missing, was reduced by another, or whom we saw at fault with it."""
    reducers = {part.index: part.reducer.hotkey for part in plan.parts()}
    missing = {reducers[index] for index in (*outcome.missing_parts, *outcome.reduced_again)}
    return missing | {fault.hotkey for fault in outcome.faults if reducers.get(fault.part) == fault.hotkey}


def count_signatures(
    plan: GroupPlan, done: Participation, replies: Sequence[Reply[AllReduceReply]], verify: Verify
) -> Led:
    """Keep the signatures of those who hold the same state as the leader."""
    message = state_message(plan.run_id, plan.round, plan.attempt, done.state_hash)
    answered: dict[str, AllReduceReply] = {}
    signatures: dict[str, str] = {}
    for reply in replies:
        if reply.reply is None:
            logger.warning("%s did not answer AllReduce: %s", reply.hotkey[:8], reply.detail)
            continue
        answered[reply.hotkey] = reply.reply
        if not reply.reply.completed or reply.reply.state_hash != done.state_hash:
            why = reply.reply.detail or f"holds state {reply.reply.state_hash[:12]}, the leader {done.state_hash[:12]}"
            logger.warning("%s does not sign: %s", reply.hotkey[:8], why)
        elif verify(reply.hotkey, message, bytes.fromhex(reply.reply.state_signature)):
            signatures[reply.hotkey] = reply.reply.state_signature
        else:
            logger.warning("%s signed something else", reply.hotkey[:8])
    return Led(plan=plan, done=done, replies=answered, signatures=signatures)
