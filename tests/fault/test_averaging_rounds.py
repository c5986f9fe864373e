"""Many rounds, each with a fault drawn by a seed: no hang, no wrong value, nobody blamed who did nothing.

``AVERAGING_SEED=7 AVERAGING_ROUNDS=1 pytest tests/fault/test_averaging_rounds.py`` replays any of them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random

import pytest
from averaging_attacks import ATTACKS, Scene, Tasks
from averaging_world import World, assert_each_chunk_is_a_mean, blamed

from hivetrain.averaging.codecs import CODEC_NAMES
from hivetrain.averaging.group import GroupPlan

NUM_ROUNDS = int(os.environ.get("AVERAGING_ROUNDS", "200"))
NUM_FAST = 20  # of them, with every run of the suite
SEED = int(os.environ.get("AVERAGING_SEED", "0"))


def draw(seed: int) -> tuple[str, World]:
    """A fault, and a group to have it."""
    rng = random.Random(seed)
    name = rng.choice(sorted(ATTACKS))
    size = rng.randint(3, 6)
    world = World(
        num_senders=size,
        num_validators=rng.randint(1, 2),
        codec=rng.choice(["fp32", "fp16", *(codec for codec in CODEC_NAMES if codec == "int4")]),
        scale=rng.randint(1, 3),
        audit_blocks=64,
    )
    for source in range(len(world.keys)):
        for target in range(len(world.keys)):
            if source != target and rng.random() < 0.3:
                world.hub.script(world.peer(source), world.peer(target)).delay_s = rng.choice([0.001, 0.01, 0.05])
    return name, world


@pytest.mark.parametrize(
    "seed",
    [pytest.param(SEED + number, marks=pytest.mark.slow if number >= NUM_FAST else []) for number in range(NUM_ROUNDS)],
)
def test_round_with_a_random_fault(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupPlan, "block_chunks", 1)
    monkeypatch.setattr(GroupPlan, "batch_chunks", 2)
    name, world = draw(seed)
    scene = Scene(world, world.num_senders - 1, monkeypatch)
    ATTACKS[name][0](scene)

    async def script(_: World, tasks: Tasks) -> None:
        for each in scene.script:
            await each(world, tasks)

    members = [i for i in range(len(world.keys)) if i not in scene.absent]
    outcomes = world.run(only=members, script=script, may_fail=[scene.bad])
    honest = {i: outcomes[i] for i in scene.honest}
    assert_each_chunk_is_a_mean(world, honest, range(world.num_senders), scene.good_senders)
    guilty = {hotkey for outcome in honest.values() for hotkey, _ in blamed(outcome)}
    assert guilty <= {world.hotkey(scene.bad), ""}, name


def test_rounds_leave_no_task_behind() -> None:
    async def main() -> None:
        world = World(num_senders=3, num_validators=1)
        transports = {i: world.hub.transport(world.peer(i)) for i in range(4)}
        for transport in transports.values():
            await transport.start()
        await asyncio.gather(*(world.member_round(i, transports[i]) for i in range(4)))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for _ in range(20):  # those that end by themselves
            await asyncio.sleep(0)
        left = {task for task in left if not task.done()}
        assert not left
        for transport in transports.values():
            await transport.close()

    from hivetrain.averaging.memory import run_in_virtual_time

    run_in_virtual_time(main())
    gc.collect()
