"""Three cheats among ten miners: what does the model lose?

    python -m bench.attacks.loss [--quick] [--json FILE] [--cheats NAME NAME NAME]

Two runs of the same rounds in memory, in production code: seven honest miners alone, and with three cheats beside them.
Challenges are drawn, who is caught loses its weight and sits its cooldown out, the mean takes in whom the leader lets
in, and what the gates refuse is not published.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.attacks.catalogue import CATALOGUE, make_cheat
from bench.attacks.cheat import Cheat
from bench.attacks.checking import judge
from bench.attacks.group import exchange, plan_group, publish
from bench.attacks.rounds import honest_keys, make_scene
from bench.attacks.world import VALIDATOR, World, make_world, tiny
from bench.harness import at_most, report, table
from bench.inmemory import Key
from hivetrain.contribution import Contribution
from hivetrain.manifest import Ref
from hivetrain.scoring import CheckResult, MovingAverage
from hivetrain.training.state import State
from template.validator.collect import Collected
from template.validator.publish import NotPublished
from template.validator.reward import round_weights, score_miners
from template.validator.verify import draw

HONEST, ROUNDS, QUICK_ROUNDS = 7, 20, 6
SETS = (
    ("random", "copy", "skip-50"),
    ("sign-flip", "scale-5", "noise-30"),
)
MAX_GAP = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Held-out losses after every round, how many rounds were refused, and how often a cheat was in the mean."""

    losses: list[float]
    refused: int
    cheated: int


def run(world: World, names: Sequence[str], num_rounds: int) -> Trace:
    """One run of honest miners and these cheats, from genesis."""
    cheats = [make_cheat(name) for name in names]
    keys = honest_keys(HONEST + len(cheats))
    average = MovingAverage(None, world.parts.recipe.scoring)
    base, state, previous = world.genesis, world.state, None
    losses, refused, cheated = [base.manifest.val_loss], 0, 0
    for number in range(num_rounds):
        made = _contributions(world, keys, cheats, base, state, previous, number)
        checks = _checks(world, made, cheats, base, state, number, average)
        receipts = {key.hotkey: one.receipt for key, one in made.items()}
        weights = round_weights(receipts, checks, average, number)
        inside = {key: one for key, one in made.items() if weights[key.hotkey] > 0}
        plan = plan_group(world, number, {key.hotkey: receipts[key.hotkey] for key in inside})
        outcome = exchange(plan, {key: one.payload for key, one in inside.items()})[VALIDATOR.hotkey]
        cheated += sum(key in inside for key in keys[HONEST:])
        scores = score_miners(
            miners=[key.hotkey for key in keys],
            collected=Collected(receipts=receipts),
            checks=checks,
            seen=[(plan, outcome)],
            average=average,
            round_number=number,
            scoring=world.parts.recipe.scoring,
        )
        average.update(number, scores, set(receipts))
        try:
            following = publish(world, base, state, plan, outcome, list(inside), receipts, gated=True)
        except NotPublished:
            refused += 1
        else:
            previous = state
            base, state = following
        losses.append(base.manifest.val_loss)
    return Trace(losses=losses, refused=refused, cheated=cheated)


def _contributions(
    world: World,
    keys: Sequence[Key],
    cheats: Sequence[Cheat],
    base: Ref,
    state: State,
    previous: State | None,
    number: int,
) -> dict[Key, Contribution]:
    made: dict[Key, Contribution] = {}
    first = world.parts.loop.run(state, world.load_data(number, 0).batch, num_steps=world.parts.recipe.inner.max_steps)
    for rank, key in enumerate(keys):
        scene = make_scene(world, base, state, previous, number, rank, key, first)
        if rank < HONEST:
            made[key] = scene.contribution(scene.honest())
        else:
            cheat = cheats[rank - HONEST]
            made[key] = cheat.commit(scene, cheat.train(scene))
    return made


def _checks(
    world: World,
    made: dict[Key, Contribution],
    cheats: Sequence[Cheat],
    base: Ref,
    state: State,
    number: int,
    average: MovingAverage,
) -> dict[str, CheckResult | None]:
    checks: dict[str, CheckResult | None] = {}
    for rank, (key, one) in enumerate(made.items()):
        drawn = draw(
            block_hash=hashlib.sha256(f"block {number}".encode()).hexdigest(),
            validator=VALIDATOR.hotkey,
            miner=key.hotkey,
            coins=hashlib.sha256(f"coins {number}".encode()).digest(),
            num_snapshots=one.receipt.num_snapshots,
            scoring=world.parts.recipe.scoring,
            owes=average.owes(key.hotkey),
        )
        if drawn.windows:
            answer = cheats[rank - HONEST].answer if rank >= HONEST else lambda _, reply: reply
            checks[key.hotkey] = judge(world, base, state, number, one, drawn, answer)
    return checks


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.attacks.loss", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, one set of cheats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    parser.add_argument("--cheats", nargs=3, metavar="NAME", choices=tuple(CATALOGUE), help="these three alone")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    num_rounds = QUICK_ROUNDS if options.quick else ROUNDS
    sets = [tuple(options.cheats)] if options.cheats else SETS[:1] if options.quick else SETS
    recipe = tiny(num_rounds)
    with tempfile.TemporaryDirectory(prefix="hivetrain-attacks-loss-") as folder:
        traces: dict[tuple[str, ...], Trace] = {}
        for place, names in enumerate([(), *sets]):
            traces[names] = run(make_world(Path(folder) / str(place), recipe), names, num_rounds)
            print(f"{', '.join(names) or 'honest'}: {traces[names].losses[-1]:.4f}", flush=True)
    alone = traces.pop(())
    rows = [
        (
            ", ".join(names) or "none",
            *(f"{trace.losses[at]:.3f}" for at in _places(num_rounds)),
            str(trace.refused),
            f"{trace.cheated / (3 * num_rounds):.0%}" if names else "-",
        )
        for names, trace in [((), alone), *traces.items()]
    ]
    columns = ("cheats", *(f"round {at}" for at in _places(num_rounds)), "rounds refused", "cheats in the mean")
    table(f"Held-out loss of {HONEST} honest miners, and three cheats beside them", columns, rows)
    return report(
        [
            at_most(
                f"loss with {', '.join(names)} beside {HONEST} honest miners, over that without, less 1",
                trace.losses[-1] / alone.losses[-1] - 1,
                MAX_GAP,
            )
            for names, trace in traces.items()
        ],
        options.json,
    )


def _places(num_rounds: int) -> list[int]:
    return sorted({0, num_rounds // 4, num_rounds // 2, 3 * num_rounds // 4, num_rounds})


if __name__ == "__main__":
    raise SystemExit(main())
