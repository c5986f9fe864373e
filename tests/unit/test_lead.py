"""Who sits in the group that the leader names, and whose signatures it counts."""

from __future__ import annotations

import dataclasses

import pytest

from hivetrain.averaging.butterfly import AllReduceOutcome, FaultRecord
from hivetrain.averaging.group import GroupPlan, plan_from_dict, plan_to_dict
from hivetrain.errors import Fault
from hivetrain.manifest import state_message
from hivetrain.verification.receipt import Receipt
from hivetrain.workbench import Parts
from template.anchor import Anchor
from template.dendrite import Failure, Reply
from template.handlers import parse_plan
from template.participant import Participation, make_reply
from template.protocol import AllReduceReply
from template.validator.lead import count_signatures, left_undone, make_plan, make_state_synapse, make_synapse
from tests.keys import TestIdentity, verify
from tests.round_kit import ROUND, World, identity, shared_world

MINERS = [identity(name) for name in ("miner", "miner-2", "miner-3")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


@pytest.fixture(scope="module")
def receipts(world: World) -> dict[str, Receipt]:
    return {miner.hotkey: world.contribution(miner, rank).receipt for rank, miner in enumerate(MINERS)}


def anchors_of(*hotkeys: str) -> dict[str, Anchor]:
    return {hotkey: Anchor(peer_id=f"peer-{hotkey}"[:64], maddrs=("/ip4/10.0.0.1/tcp/1",)) for hotkey in hotkeys}


def plan_of(
    world: World,
    receipts: dict[str, Receipt],
    weights: dict[str, float] | None = None,
    anchors: dict[str, Anchor] | None = None,
    sitting: tuple[str, ...] = ("leader", "second"),
    parts: Parts | None = None,
) -> GroupPlan | None:
    return make_plan(
        parts=parts or world.parts,
        round_number=ROUND,
        attempt=1,
        receipts=receipts,
        weights=dict.fromkeys(receipts, 16.0) if weights is None else weights,
        sitting=sitting,
        anchors=anchors_of(*receipts, *sitting) if anchors is None else anchors,
        duration_s=20.0,
    )


def made(plan: GroupPlan | None) -> GroupPlan:
    assert plan is not None
    return plan


def test_senders_come_in_the_order_of_their_hotkeys_and_seats_after_them(
    world: World, receipts: dict[str, Receipt]
) -> None:
    plan = made(plan_of(world, receipts))
    assert [member.hotkey for member in plan.members] == [*sorted(receipts), "leader", "second"]
    assert [member.weight for member in plan.members] == [16.0, 16.0, 16.0, 0.0, 0.0]
    assert [member.root for member in plan.members[:3]] == [
        bytes.fromhex(receipts[hotkey].payload_root) for hotkey in sorted(receipts)
    ]
    assert (plan.run_id, plan.round, plan.attempt) == (world.parts.run_id, ROUND, 1)
    assert (plan.send_deadline_s, plan.deadline_s) == (10.0, 20.0)


def test_the_synapse_carries_the_very_plan(world: World, receipts: dict[str, Receipt]) -> None:
    plan = made(plan_of(world, receipts))
    synapse = make_synapse(plan, world.base.manifest_sha256)
    assert parse_plan(synapse.plan) == plan
    assert (synapse.run_id, synapse.round, synapse.attempt) == (plan.run_id, plan.round, plan.attempt)
    synapse.to_bytes()


def test_who_weighs_nothing_does_not_send(world: World, receipts: dict[str, Receipt]) -> None:
    first, *others = sorted(receipts)
    plan = made(plan_of(world, receipts, weights={first: 0.0, **dict.fromkeys(others, 4.0)}))
    assert plan.member(first) is None


def test_who_cannot_be_reached_is_left_out(world: World, receipts: dict[str, Receipt]) -> None:
    _, second, third = sorted(receipts)
    anchors = {**anchors_of(second, third, "leader"), third: Anchor()}
    plan = made(plan_of(world, receipts, anchors=anchors))
    assert [member.hotkey for member in plan.members] == [second, "leader"]


def test_without_a_sender_there_is_no_group(world: World, receipts: dict[str, Receipt]) -> None:
    assert plan_of(world, {}) is None
    assert plan_of(world, receipts, weights=dict.fromkeys(receipts, 0.0)) is None
    assert plan_of(world, receipts, anchors=anchors_of("leader")) is None


def needing(parts: Parts, members: int) -> Parts:
    averaging = dataclasses.replace(parts.recipe.averaging, min_members=members)
    return dataclasses.replace(parts, recipe=dataclasses.replace(parts.recipe, averaging=averaging))


def test_fewer_senders_than_the_recipe_asks_for_make_no_group(world: World, receipts: dict[str, Receipt]) -> None:
    assert plan_of(world, receipts, parts=needing(world.parts, 3)) is not None
    assert plan_of(world, receipts, parts=needing(world.parts, 4)) is None


def test_of_two_miners_with_one_peer_id_one_sends(world: World, receipts: dict[str, Receipt]) -> None:
    first, second, third = sorted(receipts)
    anchors = anchors_of(*receipts, "leader", "second")
    anchors[third] = anchors[second]
    plan = made(plan_of(world, receipts, anchors=anchors))
    assert [member.hotkey for member in plan.members] == [first, second, "leader", "second"]
    assert plan_of(world, receipts, anchors=anchors, parts=needing(world.parts, 3)) is None


def test_a_miner_that_copies_the_leaders_peer_id_puts_itself_out(world: World, receipts: dict[str, Receipt]) -> None:
    first, second, third = sorted(receipts)
    anchors = anchors_of(*receipts, "leader", "second")
    anchors[first] = anchors["leader"]
    plan = made(plan_of(world, receipts, anchors=anchors))
    assert [member.hotkey for member in plan.members] == [second, third, "leader", "second"]


def test_every_address_that_an_anchor_may_hold_is_one_that_members_accept(
    world: World, receipts: dict[str, Receipt]
) -> None:
    anchors = {hotkey: Anchor(peer_id=hotkey[:64], maddrs=("x" * 120, "y")) for hotkey in (*receipts, "leader")}
    plan = made(plan_of(world, receipts, anchors=anchors))
    assert plan_from_dict(plan_to_dict(plan)) == plan


# -- signatures ----------------------------------------------------------------------------------------------

KEYS = {key.hotkey: key for key in (TestIdentity(1), TestIdentity(2))}
GOOD, BAD = KEYS
STATE = "aa" * 32


def replied(plan: GroupPlan, hotkey: str, **changes: object) -> Reply[AllReduceReply]:
    message = state_message(plan.run_id, plan.round, plan.attempt, STATE)
    fields: dict[str, object] = {
        "run_id": plan.run_id,
        "round": plan.round,
        "attempt": plan.attempt,
        "accepted": True,
        "completed": True,
        "state_hash": STATE,
        "state_signature": KEYS[hotkey].sign(message).hex(),
    }
    return Reply(hotkey=hotkey, reply=AllReduceReply.model_validate({**fields, **changes}))


def signers(plan: GroupPlan, bad: Reply[AllReduceReply]) -> set[str]:
    done = Participation(outcome=None, state=None, state_hash=STATE)
    return set(count_signatures(plan, done, [replied(plan, GOOD), bad], verify).signatures)


def test_who_holds_the_leaders_state_and_signs_it_counts(world: World, receipts: dict[str, Receipt]) -> None:
    plan = made(plan_of(world, receipts))
    assert signers(plan, replied(plan, BAD)) == {GOOD, BAD}


@pytest.mark.parametrize(
    "changes",
    [
        {"completed": False},
        {"accepted": False, "completed": False, "state_hash": "", "state_signature": ""},
        {"state_hash": "bb" * 32},
        {"state_signature": ""},
        {"state_signature": "00" * 64},
    ],
)
def test_who_holds_or_signs_something_else_does_not(
    world: World, receipts: dict[str, Receipt], changes: dict[str, object]
) -> None:
    plan = made(plan_of(world, receipts))
    assert signers(plan, replied(plan, BAD, **changes)) == {GOOD}


def test_a_signature_of_another_attempt_does_not_count(world: World, receipts: dict[str, Receipt]) -> None:
    plan = made(plan_of(world, receipts))
    message = state_message(plan.run_id, plan.round, plan.attempt - 1, STATE)
    assert signers(plan, replied(plan, BAD, state_signature=KEYS[BAD].sign(message).hex())) == {GOOD}


def test_a_member_that_does_not_answer_does_not_sign(world: World, receipts: dict[str, Receipt]) -> None:
    plan = made(plan_of(world, receipts))
    silent: Reply[AllReduceReply] = Reply(hotkey=BAD, failure=Failure.TIMEOUT, detail="no whole reply")
    done = Participation(outcome=None, state=None, state_hash=STATE)
    led = count_signatures(plan, done, [replied(plan, GOOD), silent], verify)
    assert (set(led.replies), set(led.signatures)) == ({GOOD}, {GOOD})


def test_a_member_that_saw_very_many_faults_still_answers(world: World, receipts: dict[str, Receipt]) -> None:
    plan = made(plan_of(world, receipts))
    seen = [FaultRecord(hotkey=GOOD, fault=Fault.LATE, detail="x" * 300, part=part) for part in range(2000)]
    stranger = FaultRecord(hotkey="", fault=Fault.IMPOSTOR, detail="peer x", part=-1)
    outcome = AllReduceOutcome(
        vectors={},
        mean_sha256="",
        complete=False,
        missing_parts=(0,),
        included={},
        faults=(stranger, *seen),
        links=(),
        bytes_sent=0,
        bytes_received=0,
        seconds=1.0,
    )
    reply = make_reply(plan, Participation(outcome=outcome, state=None, detail="a part of the mean is missing"))
    assert (reply.completed, len(reply.faults)) == (False, 1023)
    assert len(reply.to_bytes()) < type(make_synapse(plan, "0" * 64)).max_reply_bytes


def test_who_left_a_part_undone_lately_sends_and_reduces_nothing(world: World, receipts: dict[str, Receipt]) -> None:
    tired = sorted(receipts)[0]
    plan = make_plan(
        parts=world.parts,
        round_number=ROUND,
        attempt=0,
        receipts=receipts,
        weights=dict.fromkeys(receipts, 16.0),
        sitting=("leader",),
        anchors=anchors_of(*receipts, "leader"),
        duration_s=20.0,
        resting={tired},
    )
    member = made(plan).member(tired)
    assert member is not None
    assert (member.sends, member.reduces) == (True, False)
    assert tired not in {part.reducer.hotkey for part in made(plan).parts()}


def test_parts_are_sized_by_what_was_measured(world: World, receipts: dict[str, Receipt]) -> None:
    fast, slow, unknown = sorted(receipts)
    plan = made(
        make_plan(
            parts=world.parts,
            round_number=ROUND,
            attempt=0,
            receipts=receipts,
            weights=dict.fromkeys(receipts, 16.0),
            sitting=("leader",),
            anchors=anchors_of(*receipts, "leader"),
            duration_s=20.0,
            shares={fast: 2.0, slow: 0.5, "leader": 1.5},
        )
    )
    assert [member.share for member in plan.members] == [2.0, 0.5, 1.0, 1.5]
    sizes = {part.reducer.hotkey: part.stop - part.start for part in plan.parts()}
    assert sizes[fast] > sizes[unknown] > sizes[slow]


def test_who_cannot_be_dialled_sends_and_reduces_nothing(world: World, receipts: dict[str, Receipt]) -> None:
    hidden, *_ = sorted(receipts)
    anchors = anchors_of(*receipts, "leader", "second")
    anchors[hidden] = Anchor(peer_id="peer-behind-a-nat")
    anchors["second"] = Anchor(peer_id="peer-of-a-shy-validator")
    plan = made(plan_of(world, receipts, anchors=anchors))
    assert [(m.hotkey, m.sends) for m in plan.members if not m.reduces] == [(hidden, True), ("second", False)]
    assert plan_from_dict(plan_to_dict(plan)) == plan


def test_where_nobody_can_be_dialled_there_is_no_group(world: World, receipts: dict[str, Receipt]) -> None:
    anchors = {hotkey: Anchor(peer_id=f"peer-{hotkey}"[:64]) for hotkey in (*receipts, "leader")}
    assert plan_of(world, receipts, anchors=anchors) is None


def test_a_state_synapse_names_the_state_and_carries_no_plan(world: World, receipts: dict[str, Receipt]) -> None:
    plan = dataclasses.replace(made(plan_of(world, receipts)), attempt=2)
    synapse = make_state_synapse(plan, world.base.manifest_sha256, STATE)
    assert (synapse.want, synapse.attempt, synapse.state_hash, synapse.plan) == ("state", 2, STATE, b"")
    synapse.to_bytes()


def test_who_left_its_part_undone_or_spoilt_it_is_named_and_who_sent_badly_is_not(
    world: World, receipts: dict[str, Receipt]
) -> None:
    plan = made(plan_of(world, receipts))
    missing, spoilt, sender = (part.reducer.hotkey for part in plan.parts()[:3])
    faults = (
        FaultRecord(hotkey=spoilt, fault=Fault.WRONG_AVERAGE, detail="two means", part=1),
        FaultRecord(hotkey=sender, fault=Fault.LATE, detail="late", part=1),
        FaultRecord(hotkey="", fault=Fault.IMPOSTOR, detail="peer x", part=-1),
    )
    outcome = AllReduceOutcome(
        vectors={},
        mean_sha256="",
        complete=False,
        missing_parts=(0,),
        included={},
        faults=faults,
        links=(),
        bytes_sent=0,
        bytes_received=0,
        seconds=1.0,
    )
    assert left_undone(plan, outcome) == {missing, spoilt}


def test_who_copies_a_miners_peer_is_left_out_and_not_the_miner(world: World, receipts: dict[str, Receipt]) -> None:
    thief, victim, _ = sorted(receipts)  # where nothing else decides, the first one stays
    anchors = anchors_of(*receipts, "leader", "second")
    anchors[thief] = anchors[victim]
    owners = {anchors[victim].peer_id: victim}
    plan = made(
        make_plan(
            parts=world.parts,
            round_number=ROUND,
            attempt=0,
            receipts=receipts,
            weights=dict.fromkeys(receipts, 16.0),
            sitting=("leader",),
            anchors=anchors,
            duration_s=20.0,
            owners=owners,
        )
    )
    assert plan.member(thief) is None
    assert plan.member(victim) is not None
    senders = [member.hotkey for member in plan.members if member.sends]
    assert senders == sorted(senders)
