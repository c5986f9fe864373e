"""Local training with published moments against one process that takes the same steps with all of the batch.

    python -m bench.loss [--quick] [--json FILE]

Three miners take H = 50 inner steps each on their assigned rows of the embedded corpus, then vector and moments
are averaged, for 600 steps; the reference is one process whose batch is the three miners' batches joined, with
its learning rate swept and the best taken. No network and no processes: this compares optimisation alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import torch
from torch import Tensor

from bench.harness import Claim, arguments, at_most, report, table
from hivetrain.data.corpus import build_corpus
from hivetrain.data.index import DatasetIndex, build_index
from hivetrain.data.reader import SegmentReader, load_heldout, load_round
from hivetrain.data.tokenizer import train_tokenizer
from hivetrain.model import Assembled, assemble
from hivetrain.run import Recipe
from hivetrain.training import InnerLoop, RoundWork, State, genesis_state, heldout_loss, outer_step, pseudo_gradient

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_MINERS = 3
SINGLE_RATES = (5e-3, 8e-3, 1.1e-2)
MAX_GAP = 0.03


@dataclass(frozen=True, slots=True)
class Folder:
    """Parquet files of one folder, as `hivetrain.data` reads them."""

    root: Path

    def list_parquet(self, folder: str) -> list[tuple[str, int]]:
        """Paths below ``folder`` and their sizes."""
        paths = sorted((self.root / folder).rglob("*.parquet"))
        return [(path.relative_to(self.root).as_posix(), path.stat().st_size) for path in paths]

    def open(self, path: str) -> BinaryIO:
        """A file for reading by range."""
        return cast("BinaryIO", (self.root / path).open("rb"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The embedded corpus, indexed, with its tokenizer and held-out batches."""

    reader: SegmentReader
    index: DatasetIndex
    tokenizer: PreTrainedTokenizerFast
    heldout: Tensor


def load_corpus(folder: Path, recipe: Recipe) -> Corpus:
    """Build, index and tokenize the corpus in ``folder``."""
    data = recipe.data
    build_corpus(folder, heldout_row_groups=data.heldout_row_groups)
    files = Folder(folder)
    index = build_index(files, data.repo, data.revision, data.config, data.heldout_row_groups)
    reader = SegmentReader(files, data.text_column, num_cached=len(index.train) + 2)
    texts = (text for group in index.train for text in reader.read(group))
    tokenizer = train_tokenizer(texts, recipe.model.vocab_size)
    heldout = load_heldout(reader, index, tokenizer, data)
    return Corpus(reader=reader, index=index, tokenizer=tokenizer, heldout=heldout)


class Simulation:
    """One run's data and model, in this process.

    Args:
        corpus: what to train on.
        recipe: with its seed.
        num_rounds: how many rounds of ``recipe.inner.max_steps``.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe, num_rounds: int) -> None:
        self._corpus = corpus
        self._recipe = recipe
        self._num_rounds = num_rounds
        self._run_id = hashlib.sha256(f"bench-loss/{recipe.model.seed}".encode()).hexdigest()
        self._model: Assembled = assemble(recipe, None, len(corpus.tokenizer), "cpu")
        self._genesis = genesis_state(self._model.flat, self._model.base_sha256)
        self._batch = lru_cache(maxsize=None)(self._load)

    def _load(self, round_number: int, rank: int) -> Callable[[int], Tensor]:
        loaded = load_round(
            self._corpus.reader,
            self._corpus.index,
            self._corpus.tokenizer,
            run_id=self._run_id,
            round_number=round_number,
            rank=rank,
            data=self._recipe.data,
        )
        steps = loaded.num_steps(self._recipe.inner.max_steps)
        if steps < self._recipe.inner.max_steps:
            raise ValueError(f"round {round_number}, rank {rank}: data for {steps} steps only")
        return loaded.batch

    def _heldout(self, state: State) -> float:
        return heldout_loss(self._model.module, self._model.flat, state.vector, self._corpus.heldout, "cpu")

    def together(self) -> list[float]:
        """Held-out loss at genesis and after each round of three miners."""
        loop = InnerLoop(self._model.module, self._model.flat, self._recipe, "cpu")
        steps, state = self._recipe.inner.max_steps, self._genesis
        curve = [self._heldout(state)]
        for round_number in range(self._num_rounds):
            works = [loop.run(state, self._batch(round_number, rank), num_steps=steps) for rank in range(NUM_MINERS)]
            state = self._combine(state, works)
            curve.append(self._heldout(state))
        return curve

    def _combine(self, state: State, works: list[RoundWork]) -> State:
        """The next epoch's state from what the miners did."""
        return outer_step(
            state,
            mean([pseudo_gradient(state.vector, work.vector) for work in works]),
            mean([work.exp_avg for work in works]),
            mean([work.exp_avg_sq for work in works]),
            self._recipe.outer,
            self._recipe.inner.max_steps,
        )

    def alone(self, lr: float) -> list[float]:
        """The same for one process with the three batches joined, at peak rate ``lr``."""
        recipe = dataclasses.replace(self._recipe, inner=dataclasses.replace(self._recipe.inner, lr=lr))
        loop = InnerLoop(self._model.module, self._model.flat, recipe, "cpu")
        steps, state = recipe.inner.max_steps, self._genesis
        curve = [self._heldout(state)]
        for round_number in range(self._num_rounds):
            sources = [self._batch(round_number, rank) for rank in range(NUM_MINERS)]

            def joined(step: int, sources: list[Callable[[int], Tensor]] = sources) -> Tensor:
                return torch.cat([source(step) for source in sources], dim=1)

            work = loop.run(state, joined, num_steps=steps)
            state = dataclasses.replace(
                state,
                epoch=state.epoch + 1,
                step=state.step + steps,
                vector=work.vector,
                exp_avg=work.exp_avg,
                exp_avg_sq=work.exp_avg_sq,
            )
            curve.append(self._heldout(state))
        return curve


def mean(vectors: list[Tensor]) -> Tensor:
    """The plain mean of [P] vectors, in float32."""
    return torch.stack(vectors).mean(dim=0)


def measure(recipe: Recipe, corpus: Corpus, num_rounds: int, seeds: range) -> Claim:
    """Run every seed, print the curves, and say how far local training ends above the best reference."""
    rows: list[list[str]] = []
    together: list[float] = []
    alone: dict[float, list[float]] = {lr: [] for lr in SINGLE_RATES}
    for seed in seeds:
        seeded = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, seed=seed))
        simulation = Simulation(corpus, seeded, num_rounds)
        curve = simulation.together()
        together.append(curve[-1])
        rows.append([f"3 miners, seed {seed}, lr {recipe.inner.lr:g}", *_cells(curve)])
        for lr in SINGLE_RATES:
            curve = simulation.alone(lr)
            alone[lr].append(curve[-1])
            rows.append([f"one process, seed {seed}, lr {lr:g}", *_cells(curve)])
    steps = [str(place * recipe.inner.max_steps) for place in range(num_rounds + 1)]
    table("Held-out loss, nats per token, after so many inner steps", ["", *_thin(steps)], rows)
    best = min(statistics.fmean(losses) for losses in alone.values())
    gap = statistics.fmean(together) / best - 1
    num_steps = num_rounds * recipe.inner.max_steps
    name = f"loss gap to the best single process after {num_steps} steps, seeds: {len(seeds)}, relative"
    return at_most(name, gap, MAX_GAP)


def _cells(curve: list[float]) -> list[str]:
    return _thin([f"{loss:.3f}" for loss in curve])


def _thin(cells: list[str]) -> list[str]:
    """At most seven of them, the first and last included."""
    stride = max(1, -(-(len(cells) - 1) // 6))
    return [*cells[:-1:stride], cells[-1]]


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    recipe = Recipe()
    num_rounds, seeds = recipe.inner.total_steps // recipe.inner.max_steps, range(3)
    if options.quick:
        # The schedule stays that of the whole run: one shortened to fit leaves both sides so undertrained that
        # the gap all but vanishes.
        num_rounds, seeds = 3, range(1)
    with tempfile.TemporaryDirectory(prefix="hivetrain-loss-") as folder:
        corpus = load_corpus(Path(folder), recipe)
        claim = measure(recipe, corpus, num_rounds, seeds)
    return report([claim], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
