"""Honest miners on other machines: does a check ever fail one? Distances beside the bound.

    python -m bench.honest [--quick] [--json FILE] [--keep DIR] [--checks N]

A miner runs windows of a round with another thread count, batch split, attention kernel or order of rows, or in bf16
where the validator replays in fp32; the validator judges its snapshots with the production replay. States are those of
a run that goes on while it is checked, so that early and late steps are both among them. On a machine with a GPU miners
are there, and the validator on the CPU, too. What is done lies in `--keep DIR`, where a later call goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bench.attacks.world import TINY, World, make_world
from bench.harness import Claim, at_most, report, table
from hivetrain.model.assemble import assemble
from hivetrain.run import DISTANCES, Recipe
from hivetrain.training.inner import Batches, InnerLoop
from hivetrain.training.state import Snapshot, State, at_snapshot
from hivetrain.verification.replay import WindowVerdict, replay_window

QUICK_CHECKS, ALL_CHECKS = 200, 3_000
NUM_TEXTS = 400
WINDOWS_PER_ROUND = 2
"""Checked windows of each variant and round: the first one, from the state, and a later one, from a snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way in which a miner's machine may differ.

    Attributes:
        threads: of the miner.
        attention: its kernel.
        batches: what it makes of a batch [accumulation, batch, seq]; the same samples.
        precision: of the miner; the validator replays in fp32.
        device: of the miner.
    """

    name: str
    threads: int = 1
    attention: str = ""
    batches: Callable[[Tensor], Tensor] = lambda ids: ids
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    @property
    def bounds(self) -> tuple[float, float]:
        """Distances up to which it is paid in full, and from which it is a lie: those of a recipe in its precision."""
        return DISTANCES[self.precision]["distance_full"], DISTANCES[self.precision]["distance_zero"]


def split(ids: Tensor) -> Tensor:
    """As many micro-batches as there are samples."""
    return ids.reshape(-1, 1, ids.shape[-1])


def joined(ids: Tensor) -> Tensor:
    """One micro-batch."""
    return ids.reshape(1, -1, ids.shape[-1])


def reversed_rows(ids: Tensor) -> Tensor:
    """The samples of a micro-batch from last to first."""
    return ids.flip(1)


VARIANTS = (
    Variant(name="the same machine"),
    Variant(name="2 threads", threads=2),
    Variant(name="4 threads", threads=4),
    Variant(name="batch split into single samples", batches=split),
    Variant(name="batch in one piece", batches=joined),
    Variant(name="rows in another order", batches=reversed_rows),
    Variant(name="attention: eager", attention="eager"),
    Variant(name="attention: sdpa", attention="sdpa"),
    Variant(
        name="2 threads, eager, split, other order", threads=2, attention="eager", batches=lambda b: split(b.flip(1))
    ),
    Variant(name="bf16 against fp32", precision="bf16"),
)
ON_GPU = (
    Variant(name="GPU against CPU", device="cuda"),
    Variant(name="GPU in bf16 against CPU in fp32", device="cuda", precision="bf16"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check."""

    variant: str
    step: int
    window: int
    vector: float
    exp_avg: float
    exp_avg_sq: float

    @property
    def worst(self) -> float:
        """What is scored."""
        return max(self.vector, self.exp_avg, self.exp_avg_sq)


class Machines:
    """A validator's loop, and one for each way of computing that a miner may have."""

    def __init__(self, world: World, recipe: Recipe) -> None:
        self._world = world
        self._recipe = recipe
        self._loops: dict[tuple[str, str, str], InnerLoop] = {}

    def loop(self, variant: Variant) -> InnerLoop:
        """The miner's."""
        key = (variant.attention, variant.precision, variant.device)
        if key not in self._loops:
            inner = dataclasses.replace(self._recipe.inner, precision=variant.precision)
            recipe = dataclasses.replace(self._recipe, inner=inner)
            made = assemble(recipe, None, len(self._world.parts.tokenizer), variant.device)
            if variant.attention:
                set_attention(made.module, variant.attention)
            self._loops[key] = InnerLoop(made.module, made.flat, recipe, variant.device)
        return self._loops[key]

    def check(self, variant: Variant, state: State, data: Batches, window: int, every: int) -> WindowVerdict:
        """A miner's run to the end of ``window``, judged as a validator does."""
        with threads(variant.threads):
            work = self.loop(variant).run(
                state, lambda step: variant.batches(data(step)), num_steps=(window + 1) * every
            )
        opened: Snapshot | None = work.snapshots[window - 1] if window else None
        return replay_window(self._world.parts.loop, state, data, claimed=work.snapshots[window], opened=opened)


def make_recipe(num_checks: int, num_variants: int) -> Recipe:
    """128 tokens a step, and a schedule as long as the run. bf16 strays further the fewer tokens there are."""
    num_rounds = -(-num_checks // (WINDOWS_PER_ROUND * num_variants))
    return dataclasses.replace(
        TINY,
        data=dataclasses.replace(TINY.data, batch_size=4, seq_len=32),
        inner=dataclasses.replace(TINY.inner, total_steps=num_rounds * TINY.inner.max_steps),
    )


def set_attention(module: torch.nn.Module, name: str) -> None:
    """Have every layer compute attention with that kernel."""
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


@contextlib.contextmanager
def threads(num: int) -> Iterator[None]:
    """So many threads for torch, and one again afterwards."""
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def run(world: World, variants: Sequence[Variant], num_checks: int, keep: Path | None) -> list[Result]:
    """So many checks, by turns of the variants, along one run; those that were kept are not done again."""
    recipe = world.parts.recipe
    machines = Machines(world, recipe)
    every = recipe.inner.snapshot_every
    results = read(keep)
    state, round_number = world.state, 0
    per_round = WINDOWS_PER_ROUND * len(variants)
    while len(results) < num_checks:
        data = world.load_data(round_number, 0)
        if (round_number + 1) * per_round > len(results):
            # The later window moves from round to round.
            last = 1 + round_number % (recipe.inner.max_steps // every - 1)
            new = [
                judged(machines.check(variant, state, data.batch, window, every), variant, state, window)
                for variant in variants
                for window in (0, last)
            ]
            results = [*results[: round_number * per_round], *new]
            write(keep, results)
        work = world.parts.loop.run(state, data.batch, num_steps=recipe.inner.max_steps)
        last_one = work.snapshots[-1]
        state = dataclasses.replace(
            at_snapshot(state, last_one), epoch=state.epoch + 1, step=state.step + recipe.inner.max_steps
        )
        round_number += 1
    return results


def judged(verdict: WindowVerdict, variant: Variant, state: State, window: int) -> Result:
    """A verdict, as it is kept."""
    return Result(
        variant=variant.name,
        step=state.step,
        window=window,
        vector=verdict.distance_vector,
        exp_avg=verdict.distance_exp_avg,
        exp_avg_sq=verdict.distance_exp_avg_sq,
    )


def read(keep: Path | None) -> list[Result]:
    """What an earlier call did."""
    path = keep / "honest.jsonl" if keep is not None else None
    if path is None or not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def write(keep: Path | None, results: Sequence[Result]) -> None:
    """Keep what is done."""
    if keep is None:
        return
    keep.mkdir(parents=True, exist_ok=True)
    temporary = keep / "honest.tmp"
    temporary.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in results))
    temporary.replace(keep / "honest.jsonl")


def show(results: Sequence[Result], variants: Sequence[Variant]) -> list[Claim]:
    """The table, and what has to hold."""
    bounds = {variant.name: variant.bounds for variant in variants}
    rows = []
    for name, (full, zero) in bounds.items():
        found = [one for one in results if one.variant == name]
        vector, exp_avg, exp_avg_sq = (
            max(getattr(one, part) for one in found) for part in ("vector", "exp_avg", "exp_avg_sq")
        )
        rows.append(
            (
                name,
                str(len(found)),
                f"{statistics.median(one.worst for one in found):.1e}",
                *(f"{value:.1e}" for value in (vector, exp_avg, exp_avg_sq)),
                f"{full:g}",
                str(sum(one.worst >= full for one in found)),
                f"{zero:g}",
                str(sum(one.worst >= zero for one in found)),
            )
        )
    table(
        "Relative L2 distance of honest windows, beside the bounds",
        (
            *("the miner", "checks", "median", "largest: vector", "exp_avg", "exp_avg_sq"),
            *("full pay to", "less than full", "a lie from", "failed"),
        ),
        rows,
    )
    failed = sum(one.worst >= bounds[one.variant][1] for one in results)
    less = sum(one.worst >= bounds[one.variant][0] for one in results)
    return [
        at_most(f"honest miners that failed, of {len(results)} checks", failed, 0),
        at_most(f"honest miners that lost pay, of {len(results)} checks", less, 0),
    ]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.honest", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CHECKS} checks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what is done here, and go on from it")
    parser.add_argument("--checks", type=int, help="how many; default: 3,000")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    num_checks = options.checks or (QUICK_CHECKS if options.quick else ALL_CHECKS)
    variants = (*VARIANTS, *(ON_GPU if torch.cuda.is_available() else ()))
    with tempfile.TemporaryDirectory(prefix="hivetrain-honest-") as folder:
        world = make_world(Path(folder), make_recipe(num_checks, len(variants)), num_texts=NUM_TEXTS)
        results = run(world, variants, num_checks, options.keep)
    return report(show(results, variants), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
