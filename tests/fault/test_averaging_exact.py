"""What the all-reduce computes where nothing goes wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from averaging_world import World, assert_mean, assert_same_bits


@pytest.mark.parametrize("codec", ["fp32", "fp16"])
@pytest.mark.parametrize("num_validators", [0, 1])
@pytest.mark.parametrize("num_senders", [1, 2, 3, 5])
def test_everyone_ends_with_the_bits_of_the_weighted_mean(num_senders: int, num_validators: int, codec: str) -> None:
    world = World(num_senders=num_senders, num_validators=num_validators, codec=codec)
    outcomes = world.run()
    assert len(outcomes) == num_senders + num_validators
    assert_mean(world, outcomes, range(num_senders))
    assert_same_bits(outcomes)
    for outcome in outcomes.values():
        assert outcome.faults == ()
        assert outcome.missing_parts == ()
        assert outcome.included == {world.hotkey(i): 1.0 for i in range(num_senders)}


def test_a_healthy_round_waits_for_no_deadline() -> None:
    outcomes = World(num_validators=1).run()
    assert all(outcome.seconds < 1.0 for outcome in outcomes.values())


def test_the_mean_is_the_one_that_numpy_computes_with_separate_operations() -> None:
    world = World(num_senders=3)
    outcome = world.run()[0]
    total = np.float32(0)
    acc = np.zeros(world.layout.sections[0].num_elements, dtype=np.float32)
    for i in range(3):
        weight = np.float32(world.plan.members[i].weight)
        acc = np.add(acc, np.multiply(world.vectors[i]["delta"].numpy(), weight))
        total = np.float32(total + weight)
    assert np.array_equal(outcome.vectors["delta"].numpy(), acc / total)


def test_bytes_are_counted_on_both_ends_of_every_link() -> None:
    world = World(num_senders=3, num_validators=1, audit_blocks=0)
    outcomes = world.run()
    sent = {(i, link.hotkey): link.bytes_sent for i, o in outcomes.items() for link in o.links}
    received = {(i, link.hotkey): link.bytes_received for i, o in outcomes.items() for link in o.links}
    for i in range(4):
        for j in range(4):
            if i != j:
                assert sent[i, world.hotkey(j)] == received[j, world.hotkey(i)] > 0
    size = world.layout.size_bytes
    assert sum(outcome.bytes_sent for outcome in outcomes.values()) == sum(
        outcome.bytes_received for outcome in outcomes.values()
    )
    # 3 senders bring all but their own part, 4 members take home all but their own.
    total_parts = sum(
        world.layout.range_bytes(part.start, part.stop) * ((2 if part.reducer.sends else 3) + 3)
        for part in world.plan.parts()
    )
    assert sum(outcome.bytes_sent for outcome in outcomes.values()) == total_parts
    assert size < total_parts


def test_slow_links_are_measured() -> None:
    world = World(num_senders=2, num_validators=1)
    for j in (1, 2):
        world.hub.script(world.peer(0), world.peer(j)).delay_s = 0.5
    outcome = world.run()[2]
    slow, fast = (next(link for link in outcome.links if link.hotkey == world.hotkey(i)) for i in (0, 1))
    assert slow.first_byte_s is not None
    assert fast.first_byte_s is not None
    assert slow.first_byte_s >= 0.5 > fast.first_byte_s
    assert slow.seconds >= 0.5 > fast.seconds


def test_members_that_do_not_reduce_get_the_mean_too() -> None:
    world = World(num_senders=4, num_validators=1, reducers=[1, 4])
    outcomes = world.run()
    assert_mean(world, outcomes, range(4))
    assert_same_bits(outcomes)


def test_a_single_value_is_averaged_by_more_members_than_there_are_chunks() -> None:
    world = World(num_senders=10)
    outcomes = world.run()  # 9 chunks: one reducer has none
    assert_mean(world, outcomes, range(10))
    assert_same_bits(outcomes)


def test_blocks_of_many_chunks_arrive_whole() -> None:
    world = World(num_senders=2, scale=40)
    outcomes = world.run()
    assert_mean(world, outcomes, range(2))
    assert torch.isfinite(outcomes[0].vectors["delta"]).all()
