"""Step records: what a miner says of each inner step, opened when it is checked, and the first that is wrong.

A record is the step's number, its loss and its samples; the receipt's ``steps_root`` commits to all of them. They are
opened whole: eight bytes per sample. Where a replay misses, they say at which step the miner left the path: the loss
before step i + 1 depends on every step up to i.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hivetrain.errors import Fault, PeerFault
from hivetrain.run import Inner
from hivetrain.verification.merkle import MerkleTree, leaf_digest
from hivetrain.verification.receipt import Receipt

MAX_STEPS_BYTES = 64 << 20
LOSS_BOUND_FP32 = 1e-3
LOSS_BOUND_BF16 = 1e-2
"""Nats per token by which an honest step's loss may be off in a replay.

Measured over 50 steps of the embedded default on CPU: other batch splits and row orders 1.4e-6, thread counts 0, bf16
autocast against fp32 1e-3. The step after one that was skipped is off by 1e-2 and more. The bound names a step; whether
a window failed is for its distance to say.
"""

MEAN_TOLERANCE = 1e-6

Samples = Callable[[int], Sequence[tuple[int, int]]]
"""``samples(i)``: the (slot, window) pairs that the assignment gives inner step i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One opened record."""

    step: int
    loss: float
    samples: tuple[tuple[int, int], ...]


def record_size_bytes(samples_per_step: int) -> int:
    """Bytes of one record."""
    return 12 + 8 * samples_per_step


def loss_bound(inner: Inner) -> float:
    """How far an honest record's loss may be from the replayed one."""
    return LOSS_BOUND_BF16 if inner.precision == "bf16" else LOSS_BOUND_FP32


def open_steps(receipt: Receipt, raw: bytes, samples_per_step: int) -> tuple[StepRecord, ...]:
    """The records that ``receipt`` commits to, from their bytes in a row.

    Raises:
        PeerFault: REFUSED for another size; NOT_COMMITTED where they do not open the root; NOT_FINITE or WRONG_REPLAY
            where their losses are not numbers, or their mean is not the receipt's loss.
    """
    size = record_size_bytes(samples_per_step)
    if len(raw) != size * receipt.num_steps:
        detail = f"opened {len(raw)} bytes of step records, expected {receipt.num_steps} of {size}"
        raise PeerFault(Fault.REFUSED, detail)
    if not opens(receipt, raw, samples_per_step):
        raise PeerFault(Fault.NOT_COMMITTED, f"the step records do not open {receipt.steps_root[:12]}")
    records = tuple(_parse(raw[at : at + size]) for at in range(0, len(raw), size))
    for record in records:
        if not math.isfinite(record.loss):
            raise PeerFault(Fault.NOT_FINITE, f"committed to a loss of {record.loss} in step {record.step}")
    mean = math.fsum(record.loss for record in records) / len(records)
    if not abs(mean - receipt.loss) <= MEAN_TOLERANCE * max(1.0, abs(mean)):
        raise PeerFault(
            Fault.WRONG_REPLAY, f"the receipt's loss is {receipt.loss:.6f}, the mean of its step records {mean:.6f}"
        )
    return records


def opens(receipt: Receipt, raw: bytes, samples_per_step: int) -> bool:
    """Whether ``raw`` are the very records that ``receipt`` commits to, whoever shows them."""
    size = record_size_bytes(samples_per_step)
    if len(raw) != size * receipt.num_steps:
        return False
    pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
    return MerkleTree([leaf_digest(piece) for piece in pieces]).root.hex() == receipt.steps_root


def _parse(raw: bytes) -> StepRecord:
    step, loss, *flat = struct.unpack(f"<Qf{(len(raw) - 12) // 4}I", raw)
    return StepRecord(step=step, loss=loss, samples=tuple(zip(flat[::2], flat[1::2], strict=True)))


def check_samples(records: Sequence[StepRecord], samples: Samples) -> None:
    """Every record must be of its own step, and of the samples that the assignment gives it.

    Raises:
        PeerFault: WRONG_REPLAY; names the first step that is not.
    """
    for place, record in enumerate(records):
        if record.step != place:
            raise WrongStep(place, f"record {place} says step {record.step}")
        if list(record.samples) != list(samples(place)):
            raise WrongStep(place, f"step {place} took other samples than it was assigned")


class WrongStep(PeerFault):
    """WRONG_REPLAY at a step that is known."""

    def __init__(self, step: int, detail: str) -> None:
        super().__init__(Fault.WRONG_REPLAY, detail)
        self.step = step


def first_wrong_step(
    records: Sequence[StepRecord], first_step: int, losses: Sequence[float], bound: float
) -> tuple[int, str] | None:
    """The first step whose recorded loss is not the replayed one, and what it says; None where all agree.

    Args:
        first_step: the step that ``losses`` begin with.
        losses: replayed, one per step; shorter where the replay diverged.
    """
    for step, loss in enumerate(losses, start=first_step):
        claimed = records[step].loss
        if not abs(claimed - loss) <= bound:
            return step, f"step {step}: its record says loss {claimed:.5f}, replay gives {loss:.5f}"
    return None


__all__ = [
    "MAX_STEPS_BYTES",
    "StepRecord",
    "WrongStep",
    "check_samples",
    "first_wrong_step",
    "loss_bound",
    "open_steps",
    "opens",
    "record_size_bytes",
]
