"""Every fault of `averaging_attacks`: what the honest hold, whom they blame, and how long it takes."""

from __future__ import annotations

import pytest
from averaging_attacks import ATTACKS, Scene, Tasks
from averaging_world import World, assert_each_chunk_is_a_mean, blamed, verify

from hivetrain.averaging.butterfly import proves_two_averages, proves_wrong_average
from hivetrain.averaging.codecs import CODEC_NAMES
from hivetrain.averaging.group import GroupPlan

CODECS = [name for name in ("fp32", "int4") if name in CODEC_NAMES]
COST_S = {"nothing": 4.0, "stall": 12.0, "deadline": 60.0}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches to a part without megabytes."""
    monkeypatch.setattr(GroupPlan, "block_chunks", 1)
    monkeypatch.setattr(GroupPlan, "batch_chunks", 2)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("name", ATTACKS)
def test_one_bad_member(name: str, size: int, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrange, expected = ATTACKS[name]
    world = World(num_senders=size, num_validators=1, codec=codec, scale=3, audit_blocks=64)
    scene = Scene(world, size - 1, monkeypatch)
    arrange(scene)

    async def script(_: World, tasks: Tasks) -> None:
        for each in scene.script:
            await each(world, tasks)

    members = [i for i in range(size + 1) if i not in scene.absent]
    outcomes = world.run(only=members, script=script, may_fail=[scene.bad])
    honest = {i: outcomes[i] for i in scene.honest}

    choices = {"in": [range(size)], "out": [scene.good_senders]}.get(expected.bad_is, [range(size), scene.good_senders])
    assert_each_chunk_is_a_mean(world, honest, *choices)

    bad = world.hotkey(scene.bad)
    faults = {fault for outcome in honest.values() for hotkey, fault in blamed(outcome) if hotkey == bad}
    assert {hotkey for outcome in honest.values() for hotkey, _ in blamed(outcome)} <= {bad, ""}
    assert faults <= expected.blame
    assert faults or not (expected.blame and expected.certain)

    if expected.proven:
        for outcome in honest.values():
            evidence = next(record.evidence for record in outcome.faults if record.evidence)
            proofs = (
                proves_two_averages(evidence, world.plan, verify),
                proves_wrong_average(evidence, world.plan, verify),
            )
            assert bad in proofs
    assert max(outcome.seconds for outcome in honest.values()) <= COST_S[expected.cost]
