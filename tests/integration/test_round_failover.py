"""What becomes of a round whose leader dies, stops or comes back, at every point where it can: one epoch, one state."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hivetrain.errors import ServiceError
from hivetrain.manifest import Ref
from hivetrain.progress import phase_at
from hivetrain.tracking.events import EventReader
from neurons.leading import LeadingNeuron
from template.anchor import find_base
from template.participant import Participation
from tests.failover_kit import END, POSITION, ROUND_END, SCHEDULE, START, Failover, open_failover, wait_for
from tests.round_kit import ROUND, shared_world

PATIENCE = SCHEDULE.leader_patience


@pytest.fixture
def net(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    world = shared_world(tmp_path_factory).fork(tmp_path / "cache")
    with open_failover(world, tmp_path) as made:
        yield made


@pytest.fixture
def alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    world = shared_world(tmp_path_factory).fork(tmp_path / "cache")
    with open_failover(world, tmp_path, num_validators=1) as made:
        yield made


@pytest.fixture
def three(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    world = shared_world(tmp_path_factory).fork(tmp_path / "cache")
    with open_failover(world, tmp_path, num_validators=3) as made:
        yield made


def said(validator: LeadingNeuron) -> list[str]:
    """Kinds of the events that it has told."""
    return [event.event for event in EventReader(validator.config.run_dir / "events.jsonl").read_new()]


def dies_in_the_exchange(net: Failover, leader: LeadingNeuron) -> None:
    """It calls its group together, and never opens a stream."""

    def die(*_: object) -> Participation:
        assert wait_for(lambda: all(miner.board.begun == 0 for miner in net.miners))
        net.kill(leader)
        raise ServiceError("killed")

    leader.take_part = die  # type: ignore[method-assign]


def dies_before_its_tag(net: Failover, leader: LeadingNeuron) -> None:
    """It holds the result and the signatures, and publishes nothing."""
    leader.publish = lambda *_: net.kill(leader)  # type: ignore[method-assign]


def test_with_a_leader_that_does_its_work_the_other_validator_only_sits(net: Failover) -> None:
    leader, standby = net.validators
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    net.join(leader)
    net.turn_until(START + 1, lambda: not net.threads[standby.identity.hotkey].is_alive(), last=END - 1)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader, len(manifest.signatures)) == (0, leader.identity.hotkey, 3)
    assert said(standby) == []
    assert net.adopt_everywhere() == ["computed"] * 5
    assert net.anchored() == {leader.identity.hotkey}


def test_where_the_leader_never_calls_the_next_one_leads_after_its_patience(net: Failover) -> None:
    leader, standby = net.validators
    net.kill(leader)
    net.run(*net.miners, standby)
    for block in range(START, START + PATIENCE):
        net.clock.turn(block)
        assert not wait_for(lambda: standby.board.begun >= 0, 0.1)
    net.clock.turn(START + PATIENCE)
    net.join(standby)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader) == (1, standby.identity.hotkey)
    assert set(manifest.signatures) == {miner.identity.hotkey for miner in net.miners}
    assert said(standby)[0] == "took_over"
    assert net.adopt_everywhere(leader) == ["computed"] * 4


@pytest.mark.slow
def test_where_two_leaders_are_dead_the_third_leads(three: Failover) -> None:
    first, second, third = three.validators
    three.kill(first)
    three.kill(second)
    three.run(*three.miners, third)
    three.turn_until(START, lambda: third.board.begun >= 0, last=END - 1)
    assert three.clock.block == START + 2 * PATIENCE
    three.join(third)
    assert three.published().manifest.attempt == 2


@pytest.mark.slow
def test_where_the_leader_dies_in_the_exchange_the_round_ends_by_the_next_one(net: Failover) -> None:
    leader, standby = net.validators
    dies_in_the_exchange(net, leader)
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    assert wait_for(lambda: standby.exchanges)
    net.turn_until(START + 1, lambda: not net.threads[standby.identity.hotkey].is_alive(), last=ROUND_END - 1)
    net.join(standby)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader) == (1, standby.identity.hotkey)
    assert set(manifest.members) == {miner.identity.hotkey for miner in net.miners}
    assert net.adopt_everywhere(leader) == ["computed"] * 4


@pytest.mark.slow
def test_members_that_wait_for_a_dead_leader_give_way_to_the_next_one(net: Failover) -> None:
    leader, standby = net.validators
    leader._awake = lambda order, _: [leader.identity.hotkey]  # type: ignore[method-assign]
    call = leader._call
    leader._call = lambda hotkeys, *rest: call(  # type: ignore[method-assign]
        set(hotkeys) - {standby.identity.hotkey}, *rest
    )
    dies_in_the_exchange(net, leader)
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    net.join(leader)
    assert [miner.board.begun for miner in net.miners] == [0, 0, 0]
    assert (standby.board.heard, [miner.exchanges for miner in net.miners]) == (-1, [[]] * 3)
    net.clock.turn(START + PATIENCE)
    net.join(standby)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader) == (1, standby.identity.hotkey)
    assert [[one.plan.attempt for one in miner.exchanges] for miner in net.miners] == [[1]] * 3
    assert net.adopt_everywhere(leader) == ["computed"] * 4


def test_who_holds_the_result_publishes_it_where_the_leader_dies_before_its_tag(net: Failover) -> None:
    leader, standby = net.validators
    dies_before_its_tag(net, leader)
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    net.join(leader)
    assert wait_for(lambda: standby.exchanges)
    for block in (START + PATIENCE, END, END + PATIENCE - 1):
        net.clock.turn(block)
        assert not wait_for(lambda: said(standby), 0.1)
    net.clock.turn(END + PATIENCE)
    net.join(standby)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader, len(manifest.signatures)) == (1, standby.identity.hotkey, 3)
    assert manifest.state_hash == leader.exchanges[0].done.state_hash  # the very result, and no second exchange
    assert [miner.board.begun for miner in net.miners] == [0, 0, 0]
    assert net.adopt_everywhere(leader) == ["computed"] * 4


def test_a_tag_whose_leader_died_before_its_anchor_is_anchored_within_the_round(net: Failover) -> None:
    leader, standby = net.validators
    leader.announce = lambda **_: net.kill(leader)  # type: ignore[method-assign]
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    net.join(leader)
    assert wait_for(lambda: standby.exchanges)
    net.clock.turn(END + PATIENCE)
    net.join(standby)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader) == (0, leader.identity.hotkey)
    assert net.anchored() == {standby.identity.hotkey}
    assert net.adopt_everywhere(leader) == ["computed"] * 4


def test_a_leader_that_stopped_before_its_tag_and_goes_on_afterwards_publishes_nothing(net: Failover) -> None:
    leader, standby = net.validators
    publish, waiting = leader.publish, []
    leader.publish = lambda *arguments: waiting.append(arguments)  # type: ignore[method-assign]
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    net.join(leader)
    assert wait_for(lambda: standby.exchanges)
    net.clock.turn(END + PATIENCE)
    net.join(standby)
    first = net.published()
    publish(*waiting[0])  # as after SIGCONT, with all that it held
    assert net.published() == first
    assert first.manifest.leader == standby.identity.hotkey
    assert said(leader) == ["lost_race"]
    assert net.anchored() == {standby.identity.hotkey}
    assert net.adopt_everywhere() == ["computed"] * 5


def test_of_two_leaders_that_publish_at_once_one_wins_and_everyone_takes_its_epoch(net: Failover) -> None:
    both = threading.Barrier(2)
    for validator in net.validators:
        hold_before_publishing(validator, both)
    net.run(*net.miners, *net.validators)
    net.clock.turn(START)
    assert wait_for(lambda: all(validator.exchanges for validator in net.validators))
    net.clock.turn(END + PATIENCE)  # the leader is about to publish still
    net.join(*net.validators)
    ref = net.published()
    assert sorted(kind for validator in net.validators for kind in said(validator)) == [
        "lost_race", "published", "took_over"
    ]  # fmt: skip
    assert net.anchored() == {ref.manifest.leader}
    assert net.adopt_everywhere() == ["computed"] * 5


def hold_before_publishing(validator: LeadingNeuron, barrier: threading.Barrier) -> None:
    publish = validator.publish

    def publish_together(*arguments: object) -> None:
        barrier.wait(30)
        publish(*arguments)  # type: ignore[arg-type]

    validator.publish = publish_together  # type: ignore[method-assign]


def test_a_leader_that_goes_on_when_the_round_is_over_publishes_nothing(alone: Failover) -> None:
    net, leader = alone, alone.validators[0]
    publish, waiting = leader.publish, []
    leader.publish = lambda *arguments: waiting.append(arguments)  # type: ignore[method-assign]
    net.run(*net.miners, leader)
    net.clock.turn(START)
    net.join(leader)
    net.clock.turn(ROUND_END)
    publish(*waiting[0])
    assert net.epoch() is None
    assert said(leader) == ["attempt_failed"]


def test_a_leader_whose_upload_outlasts_the_round_tags_nothing(alone: Failover) -> None:
    net, leader = alone, alone.validators[0]
    store = net.world.store
    resolve, publish = store.resolve, store.publish

    def upload_slowly(*arguments: Any) -> Ref:
        net.clock.turn(ROUND_END)  # as long as the last byte takes
        return publish(*arguments)

    store.publish = upload_slowly  # type: ignore[method-assign]
    net.run(*net.miners, leader)
    net.clock.turn(START)
    net.join(leader)
    assert resolve(1) is None
    assert said(leader) == ["attempt_failed"]
    assert net.anchored() == set()


def test_a_round_that_failed_wholly_publishes_nothing_keeps_its_base_and_the_next_one_works(alone: Failover) -> None:
    net, leader, base = alone, alone.validators[0], alone.world.base
    everyone, made = [*net.miners, leader], [miner.board.contribution for miner in net.miners]
    first_block = START - SCHEDULE.round_blocks
    before = phase_at(first_block, SCHEDULE)
    for neuron in everyone:
        neuron.leaders.learn(before.round, "0xdef", neuron.validators())
        neuron.begin_round(before, base)  # nobody has handed anything in: all refuse the leader's call
    net.clock.block = first_block
    leader.average_group(before, base, net.notes)
    assert leader.exchanges[0].done.state is None
    assert (net.epoch(), net.anchored(), said(leader)) == (None, set(), ["attempt_failed"])
    for neuron in everyone:
        assert find_base(neuron.read_anchors(), POSITION.round_start, neuron.store.resolve, lambda _: None) == base
        assert neuron.held is not None
        assert neuron.held.ref == base
        neuron.begin_round(POSITION, base)
    for miner, contribution in zip(net.miners, made, strict=True):
        assert contribution is not None
        miner.board.commit(contribution)
    net.run(*net.miners, leader)
    net.clock.turn(START)
    net.join(leader)
    assert len(net.published().manifest.members) == 3
    assert net.adopt_everywhere() == ["computed"] * 4


@pytest.mark.parametrize("on_hub", [False, True])
def test_an_anchor_of_junk_stops_no_stand_by(net: Failover, on_hub: bool) -> None:
    leader, standby = net.validators
    net.kill(leader)
    net.run(*net.miners, standby)
    net.clock.turn(START)
    junk = "ab" * 32
    if on_hub:  # with a tag, too, but nobody's signature
        manifest = net.world.base.manifest.model_copy(update={"epoch": 1, "round": ROUND, "nonce": "cd" * 16})
        files = {name: net.world.store.read(net.world.base, name) for name in manifest.files}
        junk = net.world.store.publish(manifest, files).manifest_sha256
    leader.announce(epoch=1, manifest=junk)
    net.turn_until(START + 1, lambda: standby.exchanges, last=END - 1)
    assert (net.clock.block, standby.exchanges[0].plan.attempt) == (START + PATIENCE, 1)
    net.join(standby)
    if not on_hub:
        assert net.published().manifest.leader == standby.identity.hotkey


def test_a_leader_that_comes_back_after_the_next_one_has_begun_is_refused_by_everyone(net: Failover) -> None:
    leader, standby = net.validators
    standby._awake = lambda order, _: [standby.identity.hotkey]  # type: ignore[method-assign]
    net.run(*net.miners, standby)
    net.clock.turn(START + PATIENCE)
    net.join(standby)
    first = net.published()
    leader.lead(POSITION, net.world.base, net.notes, 1)  # though it ought to know that it is too late
    assert net.published() == first
    assert leader.exchanges[0].done.state is None
    assert first.manifest.leader == standby.identity.hotkey


def test_a_leader_that_leads_late_gives_way_to_the_next_one_and_sits_in_its_group(net: Failover) -> None:
    leader, standby = net.validators
    plan = leader._plan(POSITION, net.notes, [v.identity.hotkey for v in net.validators], 30.0)
    assert plan is not None
    net.run(standby)  # it waits: nobody has called
    leader.board.begin_attempt(0)
    net.clock.turn(START + PATIENCE)
    net.run(*net.miners)
    done = leader.take_part(plan, None)  # alone, until attempt 1 calls it
    assert (done.outcome, done.detail) == (None, "this attempt gave way to a higher one")
    assert leader.exchanges == []
    leader.drain_mailbox()
    assert leader.exchanges[0].plan.attempt == 1
    net.join(standby)
    manifest = net.published().manifest
    assert (manifest.attempt, manifest.leader) == (1, standby.identity.hotkey)
    assert net.adopt_everywhere() == ["computed"] * 5


def test_a_stand_by_that_seems_dead_is_told_and_does_not_lead(net: Failover) -> None:
    leader, standby = net.validators
    leader._awake = lambda order, _: [leader.identity.hotkey]  # type: ignore[method-assign]
    dies_before_its_tag(net, leader)
    net.run(*net.miners, leader, standby)
    net.clock.turn(START)
    net.join(leader)
    assert (standby.board.heard, standby.exchanges) == (0, [])
    net.clock.turn(START + PATIENCE)
    assert not wait_for(lambda: standby.board.begun >= 0, 0.2)
    net.clock.turn(END)
    net.join(standby)
    assert net.epoch() is None  # who dies now takes the round along: nobody else holds its result


def test_a_miner_that_left_its_part_undone_rests_in_the_next_attempt_and_in_later_rounds(net: Failover) -> None:
    leader, _ = net.validators
    net.run(*net.miners, *net.validators)
    net.clock.turn(START)
    net.join(leader)
    done = leader.exchanges[0]
    assert done.done.outcome is not None
    part = next(part for part in done.plan.parts() if part.reducer.sends and part.stop > part.start)
    outcome = dataclasses.replace(done.done.outcome, complete=False, missing_parts=(part.index,))
    leader.exchanged(dataclasses.replace(done, done=dataclasses.replace(done.done, outcome=outcome)))
    order = [validator.identity.hotkey for validator in net.validators]
    for rounds_later, reduces in ((0, False), (3, False), (4, True)):
        position = dataclasses.replace(POSITION, round=POSITION.round + rounds_later)
        plan = leader._plan(position, net.notes, order, 10.0)
        assert plan is not None
        member = plan.member(part.reducer.hotkey)
        assert member is not None
        assert member.reduces is reduces
