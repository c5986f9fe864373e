"""The seam of a cheat: everything that an honest miner does in a round, each step replaceable.

A `Cheat` does the honest thing wherever a subclass says nothing else. The simulation (`bench.attacks.simulation`) and
the real miner (`bench.attacks.miner`) call the same hooks in the same order:

    train -> commit -> receipt is asked -> answer (challenges) -> bring (to the all-reduce) -> transport, beside
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from hivetrain.averaging.feedback import Remainder
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.transport import Transport
from hivetrain.contribution import Contribution, build_contribution
from hivetrain.data.reader import RoundData
from hivetrain.identity import Identity, Verify
from hivetrain.manifest import Ref
from hivetrain.training.inner import Batches, RoundWork
from hivetrain.training.state import Snapshot, State, at_snapshot
from hivetrain.verification.receipt import snapshot_steps
from hivetrain.workbench import Parts
from template.protocol import Train, TrainReply


class Kind(enum.StrEnum):
    """What a cheat saves: it decides which goal applies to its pay."""

    WHOLE = "whole"  # all of the work, or nearly: below 5% of an honest miner's pay
    PART = "part"  # a part of it: never more pay per unit of work than an honest miner
    WORKS = "works"  # nothing: it does the work, and bends what comes of it
    OUTSIDE = "outside"  # there is no work in it: an attack on the run itself


class Run(Protocol):
    """Real inner steps, which count as work done: `InnerLoop.run` without its callbacks."""

    def __call__(self, state: State, batches: Batches, *, num_steps: int, first_step: int = 0) -> RoundWork:
        """Take the steps."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One round as its miner sees it.

    Attributes:
        state: the round's, of ``base``.
        previous: the epoch before it; None in the first round.
        data: what is assigned to us.
        num_steps: what an honest miner takes.
        run: the only way to do work.
        load_data: anybody's tokens, by rank.
        victim: rank of an honest miner.
        stolen: what that one does in this round, as if it had leaked; no work of ours.
    """

    parts: Parts
    base: Ref
    state: State
    previous: State | None
    data: RoundData
    round_number: int
    rank: int
    num_steps: int
    identity: Identity
    remainder: Remainder | None
    run: Run
    load_data: Callable[[int], RoundData]
    victim: int
    stolen: Callable[[], RoundWork]

    def steps(self) -> list[int]:
        """After how many steps snapshots are due."""
        return snapshot_steps(self.num_steps, self.parts.recipe.inner.snapshot_every)

    def honest(self) -> RoundWork:
        """The honest work."""
        return self.run(self.state, self.data.batch, num_steps=self.num_steps)

    def contribution(self, work: RoundWork) -> Contribution:
        """What is committed of ``work``, by the honest code."""
        return build_contribution(
            parts=self.parts,
            base=self.base,
            start=self.state,
            work=work,
            data=self.data,
            round_number=self.round_number,
            rank=self.rank,
            identity=self.identity,
            remainder=self.remainder,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Other code in the cheat's own process: ``bad(real, ...)`` runs instead of ``module.name``."""

    module: ModuleType | type
    name: str
    bad: Callable[..., Any]


class Cheat:
    """An honest miner; subclasses bend it. One instance lives as long as its miner does, so it may remember.

    Args:
        name: as `hivetrain up --attack` takes it.
        what: what it does, in one sentence.
        kind: what it saves.
        small_rates: the simulation measures its link's rate even below a megabyte.
        resting: what it does from a challenge on until the next one, where it then does something else.
    """

    kind = Kind.WORKS
    small_rates = False
    resting: Cheat | None = None

    def __init__(self, name: str, what: str, kind: Kind | None = None) -> None:
        self.name = name
        self.what = what
        if kind is not None:
            self.kind = kind

    def train(self, scene: Scene) -> RoundWork:
        """What it has to show for its round."""
        return scene.honest()

    def commit(self, scene: Scene, work: RoundWork) -> Contribution:
        """What it commits to of ``work``."""
        return scene.contribution(work)

    def receipt(self, asked: int, honest: bytes) -> bytes:
        """What it answers when it is asked for its receipt, for the ``asked``-th time from 0."""
        return honest

    def answer(self, request: Train, honest: TrainReply) -> TrainReply | None:
        """What it answers to a challenge; None: nothing, in time."""
        return honest

    def bring(self, contribution: Contribution) -> bytes:
        """The payload that it brings to the all-reduce."""
        return contribution.payload

    def transport(self, real: Transport, plan: GroupPlan) -> Transport:
        """What carries its all-reduce."""
        return real

    async def beside(self, plan: GroupPlan, me: Identity, transport: Transport, verify: Verify) -> None:
        """What it does to the group while the all-reduce runs."""

    def peer_id(self, mine: str, others: Sequence[str]) -> str:
        """The libp2p peer that it announces as its own. ``others`` are those of honest miners."""
        return mine

    def patches(self) -> tuple[Patch, ...]:
        """Other code that it runs."""
        return ()


# -- claims that are not true ---------------------------------------------------------------------------------


def claimed(scene: Scene, snapshots: Sequence[Snapshot], losses: Sequence[float] | None = None) -> RoundWork:
    """Snapshots as if all of the round's steps had led there; its counts are those of an honest receipt."""
    data, last = scene.parts.recipe.data, snapshots[-1]
    samples = scene.num_steps * data.batch_size * data.accumulation
    known = list(losses or (scene.base.manifest.val_loss,))
    return RoundWork(
        vector=last.vector,
        exp_avg=last.exp_avg,
        exp_avg_sq=last.exp_avg_sq,
        losses=tuple((known * scene.num_steps)[: scene.num_steps]),
        num_steps=scene.num_steps,
        num_samples=samples,
        num_tokens=samples * data.seq_len,
        snapshots=tuple(snapshots),
        seconds=0.0,
        compute_seconds=0.0,
    )


def invented(scene: Scene, vector: Callable[[int], Tensor]) -> RoundWork:
    """``vector(step)`` at every snapshot, with the moments of the round's state."""
    state = scene.state
    snapshots = [
        Snapshot(step=step, vector=vector(step), exp_avg=state.exp_avg, exp_avg_sq=state.exp_avg_sq)
        for step in scene.steps()
    ]
    return claimed(scene, snapshots)


def with_last(work: RoundWork, vector: Tensor) -> RoundWork:
    """``work`` whose last snapshot has another vector."""
    last = dataclasses.replace(work.snapshots[-1], vector=vector)
    return dataclasses.replace(work, vector=vector, snapshots=(*work.snapshots[:-1], last))


def in_windows(scene: Scene, num_steps: Mapping[int, int]) -> RoundWork:
    """Real steps, but only ``num_steps[window]`` of them in the windows that it names, the first of each."""
    snapshots: list[Snapshot] = []
    losses: list[float] = []
    first = 0
    for window, end in enumerate(scene.steps()):
        start = at_snapshot(scene.state, snapshots[-1]) if snapshots else scene.state
        wanted = min(end - first, num_steps.get(window, end - first))
        if wanted > 0:
            done = scene.run(start, scene.data.batch, num_steps=wanted, first_step=first)
            reached, new = done.snapshots[-1], list(done.losses)
        else:
            reached, new = Snapshot(step=0, vector=start.vector, exp_avg=start.exp_avg, exp_avg_sq=start.exp_avg_sq), []
        snapshots.append(dataclasses.replace(reached, step=end))
        losses += (new or losses[-1:] or [scene.base.manifest.val_loss]) * (end - first)
        losses = losses[:end]
        first = end
    return claimed(scene, snapshots, losses)
