"""A member that nobody can dial, as behind a NAT: it sends, takes its means home, audits, and is blamed for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from averaging_attacks import ATTACKS, Scene
from averaging_world import World, assert_each_chunk_is_a_mean, assert_mean, assert_same_bits, blamed

from hivetrain.averaging.group import GroupPlan

HIDDEN, BAD = 1, 2


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPlan, "block_chunks", 1)
    monkeypatch.setattr(GroupPlan, "batch_chunks", 2)


def hidden_world(*hidden: int, codec: str = "fp32", num_senders: int = 3) -> World:
    """Nobody can open a stream to the hidden ones, who therefore reduce nothing."""
    reducers = [i for i in range(num_senders + 1) if i not in hidden]
    world = World(
        num_senders=num_senders,
        num_validators=1,
        codec=codec,
        audit_blocks=64,
        reducers=reducers,
        scale=3,
        hidden=hidden,
    )
    for target in hidden:
        for i in range(num_senders + 1):
            world.hub.script(world.peer(i), world.peer(target)).refuse = True
    return world


@pytest.mark.parametrize("codec", ["fp32", "int4"])
@pytest.mark.parametrize("hidden", [(HIDDEN,), (0, HIDDEN)])
def test_it_takes_part_and_nobody_is_blamed(hidden: tuple[int, ...], codec: str) -> None:
    world = hidden_world(*hidden, codec=codec)
    outcomes = world.run()
    assert_same_bits(outcomes)
    assert_mean(world, outcomes, range(3))
    assert all(outcome.faults == () for outcome in outcomes.values())
    assert max(outcome.seconds for outcome in outcomes.values()) < 4.0


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_what_others_cannot_audit_it_audits_for_them(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is checked without its vector, which it alone has; its evidence convinces everyone."""
    world = hidden_world(HIDDEN, codec=codec)
    scene = Scene(world, BAD, monkeypatch)
    ATTACKS["wrong average"][0](scene)
    outcomes = world.run()
    honest = {i: outcomes[i] for i in scene.honest}
    assert_each_chunk_is_a_mean(world, honest, [0, 1, 2], [0, 1])
    for outcome in honest.values():
        assert blamed(outcome) == {(world.hotkey(BAD), "wrong_average")}


def test_one_that_dies_costs_the_others_their_patience_and_not_the_deadline() -> None:
    world = hidden_world(HIDDEN)
    for i in range(4):
        for j in range(4):
            world.hub.script(world.peer(i), world.peer(j)).delay_s = 0.1

    async def kill(_: World, tasks: dict[int, Any]) -> None:
        await asyncio.sleep(2.0)
        tasks[HIDDEN].cancel()

    outcomes = world.run(script=kill, may_fail=[HIDDEN])
    survivors = {i: outcomes[i] for i in (0, 2, 3)}
    assert_each_chunk_is_a_mean(world, survivors, [0, 1, 2], [0, 2])
    for outcome in survivors.values():
        assert blamed(outcome) <= {(world.hotkey(HIDDEN), "absent")}
        assert outcome.seconds < 12.0
