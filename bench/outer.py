"""Outer optimizers for plain DoRA: the plain average, and Nesterov over its rate and momentum.

    python -m bench.outer [--quick] [--jobs N] [--json FILE]

The simulation is that of `bench.loss` on a tiny Llama (`bench.recipes`): 3 miners, H = 50, vector and moments averaged;
600 steps, three seeds a cell. There is one claim: that no swept cell beats the recipe's default by more than a seed's
noise. A quick run has two rounds, two cells and one seed.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.harness import Claim, arguments, at_most, report, table
from bench.loss import Corpus, Simulation, load_corpus
from bench.recipes import PLAIN_DORA, TINY
from hivetrain.run import Outer

NOISE = 0.02
"""Nats by which one seed's loss differs from another's (`bench.loss`, plain DoRA: 4.417 to 4.454)."""
NUM_SEEDS = 3
SWEEP = (
    Outer(),
    *(
        Outer(kind="nesterov", lr=lr, momentum=momentum)
        for lr, momentum in ((1.0, 0.2), (0.9, 0.5), (0.7, 0.5), (0.7, 0.9))
    ),
)

Cell = tuple[Outer, int]
"""An outer step, and a seed."""

_corpora: dict[Path, Corpus] = {}


def curve(folder: Path, cell: Cell, num_rounds: int) -> list[float]:
    """Held-out loss after every round; runs in a process of its own."""
    torch.set_num_threads(1)
    outer, seed = cell
    recipe = dataclasses.replace(PLAIN_DORA, outer=outer, model=dataclasses.replace(TINY, seed=seed))
    if folder not in _corpora:
        _corpora[folder] = load_corpus(folder / str(os.getpid()), recipe)
    return Simulation(_corpora[folder], recipe, num_rounds).together()


def show(curves: Mapping[Cell, Sequence[float]]) -> list[Claim]:
    """Print the table and return the claim."""
    num_rounds = len(next(iter(curves.values()))) - 1
    ends: dict[Outer, float] = {}
    rows = []
    for outer in dict.fromkeys(outer for outer, _ in curves):
        mine = [found for (one, _), found in curves.items() if one == outer]
        middle = statistics.fmean(found[num_rounds // 2] for found in mine)
        ends[outer] = statistics.fmean(found[-1] for found in mine)
        name = f"{outer.kind}, lr {outer.lr:g}" + (f", momentum {outer.momentum:g}" if outer.kind == "nesterov" else "")
        rows.append([name, f"{middle:.3f}", f"{ends[outer]:.3f}", " ".join(f"{found[-1]:.3f}" for found in mine)])
    steps = num_rounds * PLAIN_DORA.inner.max_steps
    columns = ["outer step", f"{steps // 2} steps", f"{steps} steps", "per seed"]
    table("Held-out loss of 3 miners, nats per token", columns, rows)
    best = min(ends.values())
    return [at_most(f"default outer step above the best of {len(ends)}, nats", ends[Outer()] - best, NOISE)]


def run(quick: bool, jobs: int | None = None) -> list[Claim]:
    """Train every cell."""
    inner = PLAIN_DORA.inner
    num_rounds = 2 if quick else inner.total_steps // inner.max_steps
    cells = [(outer, seed) for outer in SWEEP for seed in range(NUM_SEEDS)]
    if quick:
        cells = [(outer, 0) for outer in SWEEP[:2]]
    with (
        tempfile.TemporaryDirectory(prefix="hivetrain-outer-") as folder,
        ProcessPoolExecutor(jobs or min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(curve, Path(folder), cell, num_rounds) for cell in cells]
        return show({cell: future.result() for cell, future in zip(cells, futures, strict=True)})


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "", jobs=True)
    return report(run(options.quick, options.jobs), options.json)


if __name__ == "__main__":
    sys.exit(main())
