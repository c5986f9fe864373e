"""What a leader may publish, and what every neuron refuses to start from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from hivetrain.averaging.butterfly import AllReduceOutcome, FaultRecord
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.errors import Fault, HubConflict
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import MAX_RUNS, Manifest, Ref, parse_manifest, state_message
from hivetrain.training.outer import outer_step
from hivetrain.training.state import State, state_hash
from hivetrain.verification.receipt import Receipt
from template.acceptance import why_unacceptable
from template.chain.keys import WalletIdentity, verify
from template.participant import Participation
from template.validator.lead import Led
from template.validator.publish import (
    PUBLISH_TRIES,
    NotPublished,
    check_gates,
    publish_epoch,
    put_epoch,
    sent_weights,
    sign_manifest,
)
from tests.round_kit import ROUND, VALIDATOR, World, identity, shared_world

MEMBERS = {name: identity(name) for name in ("miner", "miner-2", "miner-3")}
A, B, C = (one.hotkey for one in MEMBERS.values())
WEIGHTS = {A: 100.0, B: 100.0, C: 100.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    return shared_world(tmp_path_factory)


@pytest.fixture(scope="module")
def next_state(shared: World) -> State:
    work = shared.work()
    recipe = shared.parts.recipe
    delta = shared.state.vector - work.vector
    return outer_step(shared.state, delta, work.exp_avg, work.exp_avg_sq, recipe.outer, recipe.inner.max_steps)


@pytest.fixture
def world(shared: World, tmp_path: Path) -> World:
    return shared.fork(tmp_path)


def signature(world: World, member: WalletIdentity, digest: str) -> str:
    return member.sign(state_message(world.parts.run_id, ROUND, 0, digest)).hex()


def led_by(
    world: World,
    state: State | None,
    signers: tuple[str, ...] = ("miner", "miner-2", "miner-3"),
    weights: dict[str, float] | None = None,
    included: dict[str, float] | None = None,
    faults: tuple[FaultRecord, ...] = (),
    roots: Mapping[str, str] = MappingProxyType({}),
) -> Led:
    """What leading gave: three members of weight 100 and the leader, who sends nothing."""
    weights = WEIGHTS if weights is None else weights
    members = tuple(
        Member(
            hotkey=hotkey,
            peer_id=hotkey,
            maddrs=(),
            weight=weight,
            reduces=True,
            root=bytes.fromhex(roots.get(hotkey, "00" * 32)),
        )
        for hotkey, weight in weights.items()
    )
    seat = Member(hotkey=VALIDATOR.hotkey, peer_id="leader", maddrs=(), weight=0.0, reduces=True)
    plan = GroupPlan(
        run_id=world.parts.run_id,
        round=ROUND,
        attempt=0,
        members=(*members, seat),
        layout=world.parts.layout,
        send_deadline_s=1.0,
        deadline_s=2.0,
        max_abs=1e3,
    )
    outcome = AllReduceOutcome(
        vectors={},
        mean_sha256="",
        complete=True,
        missing_parts=(),
        included=dict.fromkeys(weights, 1.0) if included is None else included,
        faults=faults,
        links=(),
        bytes_sent=10,
        bytes_received=20,
        seconds=0.5,
    )
    digest = state_hash(state) if state is not None else "aa" * 32
    done = Participation(outcome=outcome, state=state, state_hash=digest)
    signatures = {MEMBERS[name].hotkey: signature(world, MEMBERS[name], digest) for name in signers}
    return Led(plan=plan, done=done, replies={}, signatures=signatures)


def with_quorum(world: World, quorum: float) -> World:
    gates = dataclasses.replace(world.parts.recipe.gates, quorum=quorum)
    recipe = dataclasses.replace(world.parts.recipe, gates=gates)
    return dataclasses.replace(world, parts=dataclasses.replace(world.parts, recipe=recipe))


# -- gates ---------------------------------------------------------------------------------------------------


def test_two_of_three_equal_members_are_exactly_the_quorum(world: World) -> None:
    check_gates(world.parts, led_by(world, None, ("miner", "miner-2")), 5.0, 5.0)


def test_just_under_the_quorum_makes_no_epoch(world: World) -> None:
    led = led_by(world, None, ("miner", "miner-2"), weights={**WEIGHTS, C: 100.5})
    with pytest.raises(NotPublished, match=r"hold 200 of 300\.5 samples signed the state, the quorum is 0\.67"):
        check_gates(world.parts, led, 5.0, 5.0)


def test_the_quorum_is_the_recipes(world: World) -> None:
    led = led_by(world, None, ("miner",))
    check_gates(with_quorum(world, 1 / 3).parts, led, 5.0, 5.0)
    with pytest.raises(NotPublished):
        check_gates(with_quorum(world, 1.0).parts, led_by(world, None, ("miner", "miner-2")), 5.0, 5.0)


def test_a_sender_whose_vector_is_not_in_the_mean_has_no_say(world: World) -> None:
    led = led_by(world, None, ("miner", "miner-2"), included={A: 1.0, B: 0.0, C: 1.0})
    assert sent_weights(led) == {A: 100.0, C: 100.0}
    with pytest.raises(NotPublished, match="hold 100 of 200"):
        check_gates(world.parts, led, 5.0, 5.0)


def test_a_mean_of_nobody_makes_no_epoch(world: World) -> None:
    with pytest.raises(NotPublished, match="hold 0 of 0"):
        check_gates(world.parts, led_by(world, None, included={}), 5.0, 5.0)


def test_a_loss_at_the_tolerance_passes_and_past_it_does_not(world: World) -> None:
    led = led_by(world, None)
    check_gates(world.parts, led, 4.0 * 1.05, 4.0)
    with pytest.raises(NotPublished, match=r"held-out loss 4\.2100 is worse than 4\.2000"):
        check_gates(world.parts, led, 4.21, 4.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_makes_no_epoch(world: World, loss: float) -> None:
    with pytest.raises(NotPublished):
        check_gates(world.parts, led_by(world, None), loss, 5.0)


# -- publishing ----------------------------------------------------------------------------------------------


def publish(
    world: World, led: Led, store: MemoryStore | None = None, receipts: Mapping[str, Receipt] | None = None
) -> Ref:
    return publish_epoch(
        store=store or world.store,
        parts=world.parts,
        base=world.base,
        led=led,
        val_loss=5.0,
        block=77,
        identity=VALIDATOR,
        receipts=receipts or {},
    )


def roots_of(receipts: Mapping[str, Receipt]) -> dict[str, str]:
    return {hotkey: receipt.payload_root for hotkey, receipt in receipts.items()}


def test_the_manifest_names_the_members_receipts_and_what_its_mean_lacks(world: World, next_state: State) -> None:
    receipts = {one.hotkey: world.contribution(one, rank).receipt for rank, one in enumerate(MEMBERS.values())}
    led = led_by(world, next_state, included={A: 1.0, B: 0.5, C: 0.0}, roots=roots_of(receipts))
    assert led.done.outcome is not None
    outcome = dataclasses.replace(led.done.outcome, left_out={B: ((0, 2), (5, 6))})
    led = dataclasses.replace(led, done=dataclasses.replace(led.done, outcome=outcome))
    manifest = publish(world, led, MemoryStore(), receipts).manifest
    assert manifest.receipts == {A: receipts[A].sha256(), B: receipts[B].sha256()}
    assert manifest.left_out == {B: ((0, 2), (5, 6))}
    assert parse_manifest(manifest.to_bytes()) == manifest


def test_a_receipt_of_another_vector_than_the_plans_is_not_named(world: World, next_state: State) -> None:
    receipts = {one.hotkey: world.contribution(one, rank).receipt for rank, one in enumerate(MEMBERS.values())}
    led = led_by(world, next_state, roots={**roots_of(receipts), B: "ff" * 32})
    manifest = publish(world, led, MemoryStore(), receipts).manifest
    assert set(manifest.receipts) == {A, C}
    assert B in manifest.members


def test_who_was_left_out_in_too_many_places_is_not_named(world: World, next_state: State) -> None:
    receipts = {one.hotkey: world.contribution(one, rank).receipt for rank, one in enumerate(MEMBERS.values())}
    led = led_by(world, next_state, roots=roots_of(receipts))
    assert led.done.outcome is not None
    runs = tuple((2 * i, 2 * i + 1) for i in range(MAX_RUNS + 1))
    outcome = dataclasses.replace(led.done.outcome, left_out={A: runs, B: runs[1:]})
    led = dataclasses.replace(led, done=dataclasses.replace(led.done, outcome=outcome))
    manifest = publish(world, led, MemoryStore(), receipts).manifest
    assert (set(manifest.receipts), set(manifest.left_out)) == ({B, C}, {B})
    assert A in manifest.members


def why(world: World, manifest: Manifest, gone: Collection[str] = ()) -> str | None:
    """What every neuron says of a manifest."""
    return why_unacceptable(
        manifest,
        run_id=world.parts.run_id,
        schema_hash=world.parts.schema_hash,
        quorum=world.parts.recipe.gates.quorum,
        registered=lambda hotkey: hotkey not in gone,
        base_epoch=world.parts.recipe.adapter.base_epoch,
        why_no_publisher=lambda hotkey, *_: None if hotkey == VALIDATOR.hotkey else f"not led by {hotkey}",
        verify=verify,
    )


def test_a_published_epoch_is_accepted_and_loads_to_the_same_state(world: World, next_state: State) -> None:
    ref = publish(world, led_by(world, next_state))
    assert world.store.latest() == ref
    assert why(world, ref.manifest) is None
    loaded = world.bench.load_state(ref, world.parts)
    assert state_hash(loaded) == state_hash(next_state)
    assert (loaded.epoch, loaded.step) == (1, world.parts.recipe.inner.max_steps)


def test_the_manifest_says_what_happened(world: World, next_state: State) -> None:
    fault = FaultRecord(hotkey=B, fault=Fault.LATE, detail="came late", part=0)
    stranger = FaultRecord(hotkey="", fault=Fault.IMPOSTOR, detail="peer x", part=-1)
    led = led_by(world, next_state, ("miner", "miner-3"), included={A: 1.0, C: 0.5}, faults=(fault, stranger))
    manifest = publish(world, led).manifest
    assert (manifest.epoch, manifest.round, manifest.attempt, manifest.block) == (1, ROUND, 0, 77)
    assert manifest.parent == world.base.manifest_sha256
    assert manifest.members == tuple(sorted((A, C)))
    assert (manifest.weights, manifest.samples) == ({A: 100.0, C: 100.0}, 200)
    assert [(entry.hotkey, entry.fault) for entry in manifest.faults] == [(B, "late")]
    assert set(manifest.signatures) == {A, C}
    assert (manifest.val_loss, manifest.allreduce_bytes, manifest.allreduce_seconds) == (5.0, 30, 0.5)


def test_of_two_leaders_of_one_epoch_the_second_loses_cleanly(world: World, next_state: State) -> None:
    first = publish(world, led_by(world, next_state))
    with pytest.raises(HubConflict):
        publish(world, led_by(world, next_state))
    assert world.store.latest() == first


# -- what is refused -----------------------------------------------------------------------------------------


def resigned(manifest: Manifest, by: WalletIdentity = VALIDATOR, **changes: object) -> Manifest:
    """The manifest with other content, signed again as its leader would."""
    changed = Manifest.model_validate({**manifest.model_dump(), **changes, "leader": by.hotkey})
    return parse_manifest(sign_manifest(changed, by).to_bytes())


@pytest.fixture
def manifest(world: World, next_state: State) -> Manifest:
    return publish(world, led_by(world, next_state)).manifest


def test_genesis_needs_its_leaders_signature_and_no_members(world: World) -> None:
    assert why(world, world.base.manifest) is None
    forged = world.base.manifest.model_copy(update={"val_loss": 0.1})
    assert "not signed by its leader" in str(why(world, forged))


def test_signing_again_alone_changes_nothing(world: World, manifest: Manifest) -> None:
    assert why(world, resigned(manifest)) is None


@pytest.mark.parametrize("forged", ["", "zz", "00" * 64, "abc"])
def test_a_forged_leader_signature_is_refused(world: World, manifest: Manifest, forged: str) -> None:
    reason = why(world, manifest.model_copy(update={"leader_signature": forged}))
    assert reason == f"not signed by its leader {VALIDATOR.hotkey}"


def test_content_that_was_changed_after_signing_is_refused(world: World, manifest: Manifest) -> None:
    assert "not signed" in str(why(world, manifest.model_copy(update={"val_loss": 1.0})))


def test_another_run_is_refused(world: World, manifest: Manifest) -> None:
    assert str(why(world, resigned(manifest, run_id="ff" * 32))).startswith("run ffffffffffff, ours is")


def test_another_schema_is_refused(world: World, manifest: Manifest) -> None:
    assert str(why(world, resigned(manifest, schema_hash="ff" * 32))).startswith("schema ffffffffffff, ours is")


def test_who_was_not_to_lead_that_attempt_is_refused_though_everybody_signed(world: World, manifest: Manifest) -> None:
    usurper = identity("validator-2")
    assert why(world, resigned(manifest, usurper)) == f"not led by {usurper.hotkey}"


def test_without_the_leaders_or_the_members_signatures_a_manifest_is_refused(world: World, manifest: Manifest) -> None:
    assert why(world, manifest) is None
    assert "not signed by its leader" in str(why(world, manifest.model_copy(update={"leader_signature": ""})))
    assert "hold 0 of 300" in str(why(world, resigned(manifest, signatures={})))


def test_too_few_member_signatures_are_refused(world: World, manifest: Manifest) -> None:
    two = {hotkey: manifest.signatures[hotkey] for hotkey in (A, B)}
    assert why(world, resigned(manifest, signatures=two)) is None
    one = {A: manifest.signatures[A]}
    assert "hold 100 of 300 samples signed, the quorum is 0.67" in str(why(world, resigned(manifest, signatures=one)))


def test_a_signature_under_anothers_name_does_not_count(world: World, manifest: Manifest) -> None:
    copied = dict.fromkeys((A, B, C), manifest.signatures[A])
    assert "hold 100 of 300" in str(why(world, resigned(manifest, signatures=copied)))


def test_signatures_of_who_is_no_member_do_not_count(world: World, manifest: Manifest) -> None:
    outsider = identity("outsider")
    signatures = {outsider.hotkey: signature(world, outsider, manifest.state_hash)}
    assert "hold 0 of 300" in str(why(world, resigned(manifest, signatures=signatures)))


@pytest.mark.parametrize("name", ["state_hash", "round", "attempt"])
def test_members_signatures_count_for_the_state_round_and_attempt_that_they_signed(
    world: World, manifest: Manifest, name: str
) -> None:
    changes: dict[str, object] = {"state_hash": "ee" * 32, "round": ROUND + 1, "attempt": 1}
    assert "hold 0 of 300" in str(why(world, resigned(manifest, **{name: changes[name]})))


def test_an_epoch_of_nobody_is_refused(world: World, manifest: Manifest) -> None:
    assert "hold 0 of 0" in str(why(world, resigned(manifest, weights={}, members=())))


def test_the_signature_of_who_is_not_registered_does_not_count(world: World, next_state: State) -> None:
    manifest = publish(world, led_by(world, next_state), MemoryStore()).manifest
    assert why(world, manifest, gone=set(manifest.weights)) is not None


# -- a stolen token ------------------------------------------------------------------------------------------


def refused_unless(leader: str) -> Callable[[Manifest], str | None]:
    return lambda manifest: None if manifest.leader == leader else f"led by {manifest.leader}"


def epoch_of(world: World, number: int, leader: str, nonce: str) -> Manifest:
    changes = {"epoch": number, "files": {}, "leader": leader, "nonce": nonce * 16}
    return world.base.manifest.model_copy(update=changes)


def test_who_tags_first_without_the_keys_stops_nobody(world: World) -> None:
    for number in (1, 2, 500):
        world.store.publish(epoch_of(world, number, "thief", "f"), {})
    ours = epoch_of(world, 1, A, "a")
    assert put_epoch(world.store, ours, {}, why_refused=refused_unless(A)).manifest == ours
    assert world.store.epochs() == [0, 1]


@pytest.mark.parametrize(("num_tags", "is_published"), [(1, True), (2, True), (9, False)])
def test_who_tags_again_while_we_publish_is_cleared_again_but_not_for_ever(
    world: World, num_tags: int, is_published: bool
) -> None:
    ours, tries = epoch_of(world, 1, A, "a"), itertools.count()

    def tag_again() -> None:
        if next(tries) < num_tags:
            world.store.publish(epoch_of(world, 1, "thief", "f"), {})

    with contextlib.nullcontext() if is_published else pytest.raises(HubConflict):
        assert put_epoch(world.store, ours, {}, tag_again, refused_unless(A)).manifest == ours
    assert next(tries) == min(num_tags + 1, PUBLISH_TRIES)


def test_an_epoch_that_may_stand_is_left_to_its_publisher(world: World) -> None:
    theirs = world.store.publish(epoch_of(world, 1, A, "b"), {})
    with pytest.raises(HubConflict):
        put_epoch(world.store, epoch_of(world, 1, A, "a"), {}, why_refused=refused_unless(A))
    assert world.store.resolve(1) == theirs
