"""Cheats in what a miner has to show for its round: the vector, the data, the steps, the state that it starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bench.attacks.cheat import Cheat, Kind, Scene, claimed, in_windows, invented, with_last
from hivetrain.training.inner import Batches, RoundWork
from hivetrain.training.state import Snapshot, State

TYPICAL_MOVE = 0.01
"""How far a value moves in a round, about."""


def noise(scene: Scene, salt: int = 0) -> Tensor:
    """Normal noise of a vector's shape, other in every round."""
    generator = torch.Generator().manual_seed(1000 * scene.round_number + salt)
    return torch.randn(scene.state.vector.numel(), generator=generator)


def with_noise(scene: Scene, work: RoundWork, share: float) -> RoundWork:
    """``work`` whose final vector has noise of ``share`` of what the whole round moved it."""
    made = noise(scene)
    moved = torch.linalg.vector_norm(work.vector - scene.state.vector)
    return with_last(work, work.vector + made * (share * moved / torch.linalg.vector_norm(made)))


class Invented(Cheat):
    """No step at all: a random walk for a vector."""

    kind = Kind.WHOLE

    def train(self, scene: Scene) -> RoundWork:
        made = TYPICAL_MOVE * noise(scene)
        return invented(scene, lambda step: scene.state.vector + made * (step / scene.num_steps))


class Zero(Cheat):
    """No step at all: the state as it was."""

    kind = Kind.WHOLE

    def train(self, scene: Scene) -> RoundWork:
        return invented(scene, lambda step: scene.state.vector)


class Scaled(Cheat):
    """Honest work, and a final vector that went ``factor`` times as far."""

    def __init__(self, name: str, what: str, factor: float) -> None:
        super().__init__(name, what)
        self._factor = factor

    def train(self, scene: Scene) -> RoundWork:
        work, start = scene.honest(), scene.state.vector
        return with_last(work, start + self._factor * (work.vector - start))


class Noisy(Cheat):
    """Honest work, and noise on the final vector."""

    def __init__(self, name: str, what: str, share: float) -> None:
        super().__init__(name, what)
        self._share = share

    def train(self, scene: Scene) -> RoundWork:
        return with_noise(scene, scene.honest(), self._share)


class Stale(Cheat):
    """The moves of its first round, again and again."""

    kind = Kind.WHOLE

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self._first: tuple[State, RoundWork] | None = None

    def train(self, scene: Scene) -> RoundWork:
        if self._first is None:
            work = scene.honest()
            self._first = scene.state, work
            return work
        start, work = self._first
        now = scene.state.vector
        moved = [dataclasses.replace(one, vector=now + (one.vector - start.vector)) for one in work.snapshots]
        return claimed(scene, moved, work.losses)


class Copy(Cheat):
    """Another miner's snapshots, with noise or without."""

    kind = Kind.WHOLE

    def __init__(self, name: str, what: str, share: float = 0.0) -> None:
        super().__init__(name, what)
        self._share = share

    def train(self, scene: Scene) -> RoundWork:
        work = scene.stolen()
        copied = claimed(scene, work.snapshots, work.losses)
        return with_noise(scene, copied, self._share) if self._share else copied


class OwnBase(Cheat):
    """Goes on from where its own last round ended, as if that were the published state."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)
        self._last: Snapshot | None = None

    def train(self, scene: Scene) -> RoundWork:
        start = scene.state
        if self._last is not None:
            last = self._last
            start = dataclasses.replace(start, vector=last.vector, exp_avg=last.exp_avg, exp_avg_sq=last.exp_avg_sq)
        work = scene.run(start, scene.data.batch, num_steps=scene.num_steps)
        self._last = work.snapshots[-1]
        return work


class OldState(Cheat):
    """Starts from the epoch before the round's."""

    def train(self, scene: Scene) -> RoundWork:
        return scene.run(scene.previous or scene.state, scene.data.batch, num_steps=scene.num_steps)


def without(scene: Scene, share: float) -> dict[int, int]:
    """Steps left in each window where ``share`` of them are left out at the round's end, in as few as will do."""
    left = max(1, round(share * scene.num_steps))
    ends = scene.steps()
    taken: dict[int, int] = {}
    for window in reversed(range(len(ends))):
        size = ends[window] - (ends[window - 1] if window else 0)
        skipped = min(size, left)
        left -= skipped
        if skipped:
            taken[window] = size - skipped
    return taken


class Skips(Cheat):
    """Leaves steps out, in as few windows as will do: spread out they would lie in every window that can be drawn."""

    kind = Kind.PART

    def __init__(self, name: str, what: str, share: float) -> None:
        super().__init__(name, what)
        self._share = share

    def train(self, scene: Scene) -> RoundWork:
        return in_windows(scene, without(scene, self._share))


class SkipsEverywhere(Cheat):
    """Leaves the last step of every window out."""

    kind = Kind.PART

    def train(self, scene: Scene) -> RoundWork:
        ends = scene.steps()
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return in_windows(scene, {window: size - 1 for window, size in enumerate(sizes)})


class OtherBatches(Cheat):
    """Every step, or a part of them, on other batches than the assigned ones."""

    def __init__(self, name: str, what: str, kind: Kind, batches: Callable[[Scene], Batches]) -> None:
        super().__init__(name, what, kind)
        self._batches = batches

    def train(self, scene: Scene) -> RoundWork:
        work = scene.run(scene.state, self._batches(scene), num_steps=scene.num_steps)
        return claimed(scene, work.snapshots, work.losses)


def half_sequences(scene: Scene) -> Batches:
    """The first half of every window."""
    return lambda step: scene.data.batch(step)[..., : scene.parts.recipe.data.seq_len // 2]


def half_batches(scene: Scene) -> Batches:
    """Half of the samples of every micro-batch."""
    return lambda step: scene.data.batch(step)[:, : max(1, scene.parts.recipe.data.batch_size // 2)]


def others_data(scene: Scene) -> Batches:
    """What is assigned to another miner."""
    return scene.load_data(scene.victim).batch


def own_data_twice(scene: Scene) -> Batches:
    """The first half of its data, then the same again."""
    half = max(1, scene.num_steps // 2)
    return lambda step: scene.data.batch(step % half)


def one_batch(scene: Scene) -> Batches:
    """Its first batch in every step."""
    return lambda step: scene.data.batch(0)


class PrefixThenGarbage(Cheat):
    """Half of the steps, then a random walk."""

    kind = Kind.PART

    def train(self, scene: Scene) -> RoundWork:
        left = without(scene, 0.5)
        work, made = in_windows(scene, left), TYPICAL_MOVE * noise(scene)
        bent = [
            dataclasses.replace(one, vector=one.vector + made * one.step) if window in left else one
            for window, one in enumerate(work.snapshots)
        ]
        return claimed(scene, bent, work.losses)
