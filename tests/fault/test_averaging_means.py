"""Every mean of the recipe through the real all-reduce, audits included."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from averaging_world import World, assert_same_bits
from torch import Tensor

from hivetrain.averaging.robust import MEAN_NAMES, get_mean


def by_definition(world: World, name: str) -> dict[str, Tensor]:
    """Section by section, and block by block of each part."""
    weights = [member.weight for member in world.plan.members]
    means: dict[str, list[Tensor]] = {section.name: [] for section in world.layout.sections}
    for part in world.plan.parts():
        for first, stop in world.plan.blocks(part.start, part.stop):
            for span in world.layout.spans(first, stop):
                vectors = [one[span.section.name][span.start : span.stop] for one in world.vectors]
                means[span.section.name].append(get_mean(name)(vectors, weights))
    return {section: torch.cat(pieces) for section, pieces in means.items()}


@pytest.mark.parametrize("name", MEAN_NAMES)
def test_members_join_each_section_apart_and_audit_each_other_by_it(name: str) -> None:
    world = World(num_senders=4)
    assert any(len(list(world.layout.spans(p.start, p.stop))) > 1 for p in world.plan.parts())
    world.plan = dataclasses.replace(world.plan, mean=name)
    outcomes = world.run()
    assert_same_bits(outcomes)
    expected = by_definition(world, name)
    for outcome in outcomes.values():
        assert (outcome.complete, outcome.faults) == (True, ())
        for section, vector in expected.items():
            assert torch.equal(outcome.vectors[section], vector)


def test_one_shouting_member_of_four_moves_the_trimmed_mean_little() -> None:
    def delta(name: str) -> Tensor:
        world = World(num_senders=4)
        common = world.vectors[0]["delta"]
        for vectors in world.vectors:
            vectors["delta"] = common + 0.1 * vectors["delta"]
        world.vectors[3]["delta"] = -100.0 * common
        world.prepare()
        world.plan = dataclasses.replace(world.plan, mean=name)
        return (world.run()[0].vectors["delta"] - common).norm() / common.norm()

    assert float(delta("trimmed_mean")) < 0.2
    assert float(delta("mean")) > 10
