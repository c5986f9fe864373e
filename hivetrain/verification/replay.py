"""Replay: recompute a window of a miner's inner steps and say how far the claim is from it.

The distance is relative L2: the error against the window's own displacement. Cosine cannot see scale and hardly
sees added noise; relative L2 sees both, and a bound of 0.05 parts honest work, in other batch splits, thread
counts and even precisions, from every cheat of the catalogue (`docs/protocol.md`, "Verification").

Vector and both moments are judged, each against its own displacement: AdamW's moments are published with the
state, and poisoned ones would harm the next round while the vector looks honest.

Shapes: P = trainable parameters.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hivetrain.training.inner import Batches, InnerLoop, TrainingDiverged
from hivetrain.training.state import Snapshot, State, at_snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowVerdict:
    """Relative L2 distances of one window; infinity where the claim is not finite or cannot be replayed.

    ``losses`` are those of the replayed steps, as far as the replay came.
    """

    distance_vector: float
    distance_exp_avg: float
    distance_exp_avg_sq: float
    losses: tuple[float, ...] = ()

    @property
    def worst(self) -> float:
        """The largest of the three: what is scored."""
        return max(self.distance_vector, self.distance_exp_avg, self.distance_exp_avg_sq)


UNREPLAYABLE = WindowVerdict(distance_vector=math.inf, distance_exp_avg=math.inf, distance_exp_avg_sq=math.inf)


def relative_l2(replayed: Tensor, claimed: Tensor, start: Tensor) -> float:
    """``||replayed - claimed|| / ||claimed - start||`` of three [P], in float64.

    Where the claim did not move at all: 0 if the replay did not either, else infinity. Infinity for any value that
    is not finite, so that no NaN can compare its way past a bound.
    """
    error = float(torch.linalg.vector_norm(replayed - claimed, dtype=torch.float64))
    displacement = float(torch.linalg.vector_norm(claimed - start, dtype=torch.float64))
    if not (math.isfinite(error) and math.isfinite(displacement)):
        return math.inf
    if displacement == 0:
        return 0.0 if error == 0 else math.inf
    return error / displacement


def replay_window(
    loop: InnerLoop, state: State, batches: Batches, *, claimed: Snapshot, opened: Snapshot | None = None
) -> WindowVerdict:
    """Recompute the window that ends at ``claimed`` and compare.

    Args:
        loop: the validator's own, with the run's recipe; its model is left where the replay ends.
        state: the round's state.
        batches: the miner's assigned data, by the round's step.
        claimed: the snapshot at the window's end, as the miner committed it.
        opened: the snapshot at its start; None where that is the state itself.

    Raises:
        ValueError: the window has no steps, or the snapshots are not of this model (check sizes on receipt).
        DataError and its like from ``batches``: ours, not the miner's.
    """
    first_step = 0 if opened is None else opened.step
    num_steps = claimed.step - first_step
    start = state if opened is None else at_snapshot(state, opened)
    if num_steps <= 0:
        raise ValueError(f"a window must end after it starts, got steps {first_step} to {claimed.step}")
    for snapshot in (claimed,) if opened is None else (opened, claimed):
        if any(tensor.shape != state.vector.shape for tensor in _tensors(snapshot)):
            raise ValueError(f"snapshot {snapshot.step} must be three vectors of {list(state.vector.shape)}")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(snapshot)):
            logger.debug("snapshot %d holds values that are not finite", snapshot.step)
            return UNREPLAYABLE
    losses: list[float] = []
    try:
        work = loop.run(
            start,
            batches,
            first_step=first_step,
            num_steps=num_steps,
            on_step=lambda report: losses.append(report.loss),
        )
    except TrainingDiverged as exc:
        logger.debug("window %d to %d diverges from the opened snapshot: %s", first_step, claimed.step, exc)
        return replace(UNREPLAYABLE, losses=tuple(losses))
    return WindowVerdict(
        distance_vector=relative_l2(work.vector, claimed.vector, start.vector),
        distance_exp_avg=relative_l2(work.exp_avg, claimed.exp_avg, start.exp_avg),
        distance_exp_avg_sq=relative_l2(work.exp_avg_sq, claimed.exp_avg_sq, start.exp_avg_sq),
        losses=tuple(losses),
    )


def _tensors(snapshot: Snapshot) -> tuple[Tensor, Tensor, Tensor]:
    return snapshot.vector, snapshot.exp_avg, snapshot.exp_avg_sq
