"""Replay a miner's whole epoch from what is public, and say whether it was honest. No network, no clock.

Public are the state that it started from, the data that it was assigned, its receipt, and the step records that it
opened where a validator checked it.

The replay goes window by window, so that it never holds more than one snapshot beside the state. At the end the sketch
in the receipt says how far the miner's displacement is from the replayed one. One wrong step in many hides under that
distance, but not in its own record: a loss that is off by more than other hardware makes convicts as well. Of one that
was not honest, the first step whose record the replay contradicts is named.

Shapes: P = trainable parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hivetrain.data.reader import RoundData
from hivetrain.errors import Fault, PeerFault
from hivetrain.training.inner import StepReport, TrainingDiverged
from hivetrain.training.outer import pseudo_gradient
from hivetrain.training.state import State, at_snapshot
from hivetrain.verification.receipt import Receipt
from hivetrain.verification.sketch import count_sketch, from_hex, sketch_distance, sketch_seed
from hivetrain.verification.steps import StepRecord, WrongStep, check_samples, first_wrong_step, loss_bound, open_steps
from hivetrain.workbench import Parts

CONVICTING = 10.0
"""A loss this many times past the bound that names a step is no other hardware's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditVerdict:
    """What a whole replay says.

    Attributes:
        honest: nothing contradicts the receipt.
        distance: of the sketches: relative L2 within 9%; None where the replay ended before.
        loss: mean over the replayed steps, nats per token; None as above.
        first_wrong_step: the first step whose record is contradicted, if it was not honest and records are public.
        num_steps: replayed.
        lines: why, in words.
    """

    honest: bool
    distance: float | None
    loss: float | None
    first_wrong_step: int | None
    num_steps: int
    lines: tuple[str, ...]


def audit(
    parts: Parts,
    state: State,
    data: RoundData,
    receipt: Receipt,
    steps: bytes | None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> AuditVerdict:
    """Replay everything that ``receipt`` claims.

    Args:
        state: of the receipt's base, its base under the model.
        data: of the miner's assignment in the receipt's round.
        steps: its step records in a row; None where nobody had them opened.
    """
    try:
        records = _checked(parts, data, receipt, steps)
    except WrongStep as exc:
        lines = (f"first wrong step: {exc.step}", exc.detail)
        return AuditVerdict(honest=False, distance=None, loss=None, first_wrong_step=exc.step, num_steps=0, lines=lines)
    except PeerFault as exc:
        return _dishonest(exc.detail)
    losses: list[float] = []

    def heard(report: StepReport) -> None:
        losses.append(report.loss)
        on_step(report)

    at, done = state, 0
    try:
        while done < receipt.num_steps:
            count = min(parts.recipe.inner.snapshot_every, receipt.num_steps - done)
            work = parts.loop.run(at, data.batch, first_step=done, num_steps=count, on_step=heard)
            at, done = at_snapshot(state, work.snapshots[-1]), done + count
    except TrainingDiverged as exc:
        return _dishonest(f"the replay of what it claims diverges: {exc}", len(losses))
    return _compared(parts, state, at, receipt, losses, records)


def _checked(parts: Parts, data: RoundData, receipt: Receipt, steps: bytes | None) -> Sequence[StepRecord]:
    if receipt.data_digests != data.digests:
        raise PeerFault(Fault.WRONG_REPLAY, "the receipt's tokens are not those of its assignment")
    if receipt.num_steps > data.num_steps(parts.recipe.inner.max_steps):
        raise PeerFault(Fault.WRONG_REPLAY, f"it claims {receipt.num_steps} steps, its assignment holds fewer")
    if steps is None:
        return ()
    records = open_steps(receipt, steps, parts.recipe.data.accumulation * parts.recipe.data.batch_size)
    check_samples(records, data.samples)
    return records


def _compared(
    parts: Parts, start: State, end: State, receipt: Receipt, losses: Sequence[float], records: Sequence[StepRecord]
) -> AuditVerdict:
    moved = pseudo_gradient(start.vector, end.vector)
    ours = count_sketch(moved, sketch_seed(receipt.run_id, receipt.round))
    distance = sketch_distance(ours, from_hex(receipt.sketch))
    bound = parts.recipe.scoring.distance_zero
    mean = math.fsum(losses) / len(losses)
    lines = [
        f"sketch distance {distance:.3g} over the whole epoch, the bound is {bound:g}",
        f"mean loss {mean:.5f} in the replay, {receipt.loss:.5f} in the receipt",
    ]
    if not records:
        lines.append("no step records are public: nobody drew it this round")
    step, named = None, loss_bound(parts.recipe.inner)
    contradicted = bool(records) and first_wrong_step(records, 0, losses, CONVICTING * named) is not None
    honest = distance < bound and not contradicted
    if not honest:
        found = first_wrong_step(records, 0, losses, named) if records else None
        if found is not None:
            step = found[0]
            lines += [f"first wrong step: {step}", found[1]]
        else:
            lines.append(f"wrong between step 0 and {receipt.num_steps}")
    return AuditVerdict(
        honest=honest,
        distance=distance,
        loss=mean,
        first_wrong_step=step,
        num_steps=len(losses),
        lines=tuple(lines),
    )


def _dishonest(detail: str, num_steps: int = 0) -> AuditVerdict:
    return AuditVerdict(
        honest=False, distance=None, loss=None, first_wrong_step=None, num_steps=num_steps, lines=(detail,)
    )


__all__ = ["AuditVerdict", "audit"]
