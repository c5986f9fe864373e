"""What checking costs a validator, beside what the checked work costs its miners.

    python -m bench.attacks.cost [--quick] [--json FILE]

The embedded default's model and round: CPU seconds of a miner's round (data, inner steps, commitment) and of a
validator's check of one of its windows (data, replay, link check), by turns in one process with one thread. From their
ratio follows the cost at each share; what a share buys is 1 - (1 - share * windows / all windows)^epochs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from bench.attacks.checking import challenge, check
from bench.attacks.rounds import honest_keys, make_scene
from bench.attacks.world import World, make_world
from bench.harness import arguments, at_most, report, table
from bench.inmemory import Key
from hivetrain.contribution import Contribution
from hivetrain.data.reader import RoundData
from hivetrain.run import Recipe
from template.protocol import Train, TrainReply
from template.validator.verify import Draw

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SKIPPED, EPOCHS = (0.05, 0.1, 0.25, 0.5, 1.0), (1, 4, 16)
GOAL = 0.1

T = TypeVar("T")


def cpu_seconds(action: Callable[[], T]) -> tuple[float, T]:
    """CPU time of this process, and what came of it."""
    began = time.process_time()
    made = action()
    return time.process_time() - began, made


def one_turn(world: World, key: Key, rank: int) -> tuple[float, float]:
    """CPU seconds of one miner's round, and of the check of one of its windows."""
    seconds, contribution = cpu_seconds(lambda: mine(world, key, rank))
    if contribution.receipt.num_steps != world.parts.recipe.inner.max_steps:
        raise AssertionError(f"the data is enough for {contribution.receipt.num_steps} steps only")
    drawn = Draw(hotkey=key.hotkey, windows=(rank % contribution.receipt.num_snapshots,))
    reply = challenge(world, world.genesis, contribution, drawn, _honestly)
    spent, result = cpu_seconds(lambda: check(world, world.genesis, world.state, 0, contribution.receipt, drawn, reply))
    if result.fault is not None:
        raise AssertionError(f"an honest miner failed: {result.in_words()}")
    return seconds, spent


def mine(world: World, key: Key, rank: int) -> Contribution:
    """A miner's whole round."""
    scene = make_scene(world, world.genesis, world.state, None, 0, rank, key, None)
    return scene.contribution(scene.honest())


def _honestly(request: Train, reply: TrainReply) -> TrainReply:
    return reply


def uncached(world: World) -> World:
    """The same run, whose data is read anew whenever it is asked for."""

    def load(round_number: int, rank: int) -> RoundData:
        return world.bench.round_data(world.parts, round_number, rank)

    return dataclasses.replace(world, load_data=load)


def chance(share: float, skipped: float, num_windows: int, epochs: int) -> float:
    """That who skips so much, in as few windows as will do, is drawn in one of them."""
    windows = math.ceil(skipped * num_windows - 1e-9)
    return 1 - (1 - share * windows / num_windows) ** epochs


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    recipe = Recipe()
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, revision="pinned"))
    with tempfile.TemporaryDirectory(prefix="hivetrain-attacks-cost-") as folder:
        world = uncached(make_world(Path(folder), recipe, num_texts=120))
        turns = [one_turn(world, key, rank) for rank, key in enumerate(honest_keys(4 if options.quick else 11))][1:]
    mined, checked = (statistics.median(one) for one in zip(*turns, strict=True))
    num_windows = -(-recipe.inner.max_steps // recipe.inner.snapshot_every)
    print(f"a miner's round: {mined:.2f} CPU s; a check of one of its {num_windows} windows: {checked:.2f} CPU s")
    table(
        "Cost, and chance to be found out within 1, 4, 16 epochs by what is skipped",
        ("miners checked", "validator's CPU, of its miners'", *(f"skips {skipped:.0%}" for skipped in SKIPPED)),
        [
            (
                f"{share:g}",
                f"{share * checked / mined:.3f}",
                *(
                    " ".join(f"{chance(share, skipped, num_windows, epochs):.2f}" for epochs in EPOCHS)
                    for skipped in SKIPPED
                ),
            )
            for share in SHARES
        ],
    )
    default = recipe.scoring.check_share
    name = f"validator's CPU seconds over those of all its miners, {default:g} of them checked"
    return report([at_most(name, default * checked / mined, GOAL)], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
