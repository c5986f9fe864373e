"""Adapters on a pretrained base, in one process: the ground on which benchmarks compare ways of averaging.

A tiny Llama (the embedded default's) is trained whole, by one process, on 40 of the corpus's row groups: the base.
From there a group of miners trains a DoRA adapter, and nothing else, on row groups that the base never saw. Every arm
starts from the same bytes and takes the same windows at the same step: miner r has a stream of its own, and its inner
step s reads the same four windows whatever the length of a round. The yardstick is the loss on all of the corpus's
held-out windows, which share no run of eight words with what anybody trained on.

Shapes: P = trainable parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.loss import Corpus
from bench.recipes import PLAIN_DORA
from hivetrain.data.reader import pack
from hivetrain.model import assemble
from hivetrain.model.load import base_files
from hivetrain.run import Adapter, Inner, Model, Recipe
from hivetrain.training import InnerLoop, RoundWork, State, genesis_state, heldout_loss, outer_step

NUM_BASE_GROUPS = 40
BASE_STEPS = 600
BASE_BATCH = 12
WARMUP_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Means:
    """What an exchange hands to the outer step: float32 [P] each."""

    delta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


Exchange = Callable[[int, State, Sequence[RoundWork]], Means]
"""``exchange(round, start, works)``: what the group holds after a round, from what its members did."""


def adapter_recipe(seed: int) -> Recipe:
    """The embedded default with a DoRA adapter alone: what trains on a pretrained base."""
    adapter = Adapter(kind="dora", train_embeddings=False, train_norms=False)
    return dataclasses.replace(PLAIN_DORA, model=Model(seed=seed), adapter=adapter)


def pretrain(corpus: Corpus, seed: int, folder: Path, num_steps: int = BASE_STEPS) -> Path:
    """Train the whole model on the first row groups of the seed's order; the folder that holds it."""
    inner = _inner(PLAIN_DORA, lr=2e-3, warmup_steps=50, total_steps=num_steps, inner_steps=num_steps)
    recipe = dataclasses.replace(PLAIN_DORA, model=Model(seed=seed), adapter=Adapter(kind="full"), inner=inner)
    model = assemble(recipe, None, len(corpus.tokenizer), "cpu")
    windows = torch.cat(_row_groups(corpus, seed)[:NUM_BASE_GROUPS])
    generator = torch.Generator().manual_seed(seed)
    num_passes = -(-num_steps * BASE_BATCH // len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(num_passes)])

    def batch(step: int) -> Tensor:
        return windows[order[step * BASE_BATCH : (step + 1) * BASE_BATCH]].unsqueeze(0)

    loop = InnerLoop(model.module, model.flat, recipe, "cpu")
    loop.run(genesis_state(model.flat, model.base_sha256), batch, num_steps=num_steps)  # leaves the model trained
    folder.mkdir(parents=True)
    for name, data in base_files(model.module).items():
        (folder / name).write_bytes(data)
    return folder


class Adaptation:
    """A group's training from one start, under any way of exchanging.

    Args:
        corpus: what to train on.
        recipe: model, adapter and outer step; its inner rate and lengths are set per arm.
        base: folder of a pretrained base, whose row groups are then left out; None draws one.
        num_miners: of the group.
        num_steps: inner steps of every miner, over the whole run.

    Attributes:
        start: where every arm begins.

    Raises:
        ValueError: the corpus has too few windows.
    """

    def __init__(
        self,
        corpus: Corpus,
        recipe: Recipe,
        *,
        base: Path | None,
        num_miners: int,
        num_steps: int,
        warmup_steps: int = WARMUP_STEPS,
    ) -> None:
        self.num_miners = num_miners
        self.num_steps = num_steps
        self._recipe = recipe
        self._warmup_steps = warmup_steps
        self._heldout = corpus.heldout
        self._model = assemble(recipe, base, len(corpus.tokenizer), "cpu")
        self.start = genesis_state(self._model.flat, self._model.base_sha256)
        seed = recipe.model.seed
        groups = _row_groups(corpus, seed)[0 if base is None else NUM_BASE_GROUPS :]
        generator = torch.Generator().manual_seed(seed)
        streams = [torch.cat(groups[rank::num_miners]) for rank in range(num_miners)]
        self._streams = [stream[torch.randperm(len(stream), generator=generator)] for stream in streams]
        self._batch_size = recipe.data.batch_size
        fewest = min(map(len, streams)) // self._batch_size
        if fewest < num_steps:
            raise ValueError(f"the corpus has windows for {fewest} steps of {num_miners} miners, not {num_steps}")
        self._first_round: dict[tuple[float, int, int], RoundWork] = {}

    @property
    def num_params(self) -> int:
        """P."""
        return self.start.vector.numel()

    @property
    def tokens_per_step(self) -> int:
        """Of one miner."""
        return self._batch_size * self._recipe.data.seq_len

    def batch(self, rank: int, step: int) -> Tensor:
        """Token ids [1, batch, seq] of one miner's inner step, counted over the whole run."""
        return self._streams[rank][step * self._batch_size : (step + 1) * self._batch_size].unsqueeze(0)

    def _window(self, rank: int, first: int, step: int) -> Tensor:
        return self.batch(rank, first + step)

    def heldout(self, vector: Tensor) -> float:
        """Held-out loss, nats per token."""
        return heldout_loss(self._model.module, self._model.flat, vector, self._heldout, "cpu")

    def every_step(self, lr: float) -> float:
        """Held-out loss at the end where fp32 gradients are exchanged every step: one process with every batch."""

        def joined(step: int) -> Tensor:
            return torch.cat([self.batch(rank, step) for rank in range(self.num_miners)], dim=1)

        loop = self._loop(lr, self.num_steps)
        return self.heldout(loop.run(self.start, joined, num_steps=self.num_steps).vector)

    def works(self, state: State, lr: float, inner_steps: int, ranks: Sequence[int]) -> list[RoundWork]:
        """What these miners do from ``state`` in one round; of the first round every arm's is the same."""
        loop = self._loop(lr, inner_steps)
        done = []
        for rank in ranks:
            known = self._first_round.get((lr, inner_steps, rank)) if state is self.start else None
            work = known or loop.run(state, partial(self._window, rank, state.step), num_steps=inner_steps)
            if state is self.start:
                self._first_round[lr, inner_steps, rank] = work
            done.append(work)
        return done

    def local(self, lr: float, inner_steps: int, exchange: Exchange, ranks: Sequence[int] | None = None) -> float:
        """Held-out loss after rounds of ``inner_steps`` steps by the miners ``ranks`` (all of them by default)."""
        if self.num_steps % inner_steps:
            raise ValueError(f"{self.num_steps} steps are not whole rounds of {inner_steps}")
        state = self.start
        for number in range(self.num_steps // inner_steps):
            done = self.works(state, lr, inner_steps, range(self.num_miners) if ranks is None else ranks)
            means = exchange(number, state, done)
            state = outer_step(state, means.delta, means.exp_avg, means.exp_avg_sq, self._recipe.outer, inner_steps)
        return self.heldout(state.vector)

    def _loop(self, lr: float, inner_steps: int) -> InnerLoop:
        inner = _inner(
            self._recipe, lr=lr, warmup_steps=self._warmup_steps, total_steps=self.num_steps, inner_steps=inner_steps
        )
        return InnerLoop(self._model.module, self._model.flat, dataclasses.replace(self._recipe, inner=inner), "cpu")


def _inner(recipe: Recipe, *, lr: float, warmup_steps: int, total_steps: int, inner_steps: int) -> Inner:
    """The recipe's AdamW under an arm's own rate and lengths."""
    return dataclasses.replace(
        recipe.inner,
        lr=lr,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        max_steps=inner_steps,
        snapshot_every=inner_steps,
    )


def _row_groups(corpus: Corpus, seed: int) -> list[Tensor]:
    """Windows [num_windows, seq] of every training row group, in the seed's order."""
    groups = corpus.index.train
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    seq_len = corpus.heldout.shape[-1]
    return [pack(corpus.reader.read(groups[place]), corpus.tokenizer, seq_len) for place in order]
