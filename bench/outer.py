"""Outer optimizers for plain DoRA: the plain average, and Nesterov over its rate and momentum.

    python -m bench.outer [--quick] [--json FILE]

The simulation is that of `bench.loss`: 3 miners, H = 50, vector and moments averaged; one seed, 600 steps a cell. There
is one claim: that no swept cell beats the recipe's default by more than a seed's noise.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.harness import Claim, arguments, at_most, report, table
from bench.loss import Corpus, Simulation, load_corpus
from bench.recipes import PLAIN_DORA
from hivetrain.run import Outer

NOISE = 0.02
"""Nats by which one seed's loss differs from another's (`bench.loss`: 4.417 to 4.454)."""
SWEEP = (
    Outer(),
    *(
        Outer(kind="nesterov", lr=lr, momentum=momentum)
        for lr, momentum in ((1.0, 0.2), (0.9, 0.5), (0.7, 0.5), (0.7, 0.9))
    ),
)

_corpora: dict[Path, Corpus] = {}


def cell(folder: Path, outer: Outer, num_rounds: int) -> list[float]:
    """Held-out loss after every round; runs in a process of its own."""
    torch.set_num_threads(1)
    recipe = dataclasses.replace(PLAIN_DORA, outer=outer)
    if folder not in _corpora:
        _corpora[folder] = load_corpus(folder / str(os.getpid()), recipe)
    return Simulation(_corpora[folder], recipe, num_rounds).together()


def run(quick: bool) -> list[Claim]:
    """Print the table and return the claim."""
    recipe = PLAIN_DORA
    num_rounds = 2 if quick else recipe.inner.total_steps // recipe.inner.max_steps
    sweep = SWEEP[:3] if quick else SWEEP
    with (
        tempfile.TemporaryDirectory(prefix="hivetrain-outer-") as folder,
        ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool,
    ):
        futures = [pool.submit(cell, Path(folder), outer, num_rounds) for outer in sweep]
        curves = [future.result() for future in futures]
    rows = [
        [
            f"{outer.kind}, lr {outer.lr:g}, momentum {outer.momentum:g}",
            f"{curve[num_rounds // 2]:.3f}",
            f"{curve[-1]:.3f}",
        ]
        for outer, curve in zip(sweep, curves, strict=True)
    ]
    steps = num_rounds * recipe.inner.max_steps
    table("Held-out loss of 3 miners, nats per token", ["outer step", f"{steps // 2} steps", f"{steps} steps"], rows)
    best = min(curve[-1] for curve in curves)
    return [at_most(f"default outer step above the best of {len(sweep)}, nats", curves[0][-1] - best, NOISE)]


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    return report(run(options.quick), options.json)


if __name__ == "__main__":
    sys.exit(main())
