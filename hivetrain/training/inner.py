"""The inner loop: a miner's local AdamW steps, and the very same code that a validator replays them with.

It is a pure function of state, batches and recipe. AdamW acts on one flat leaf, with its moments and its step
count preset from the published state, so that a round starts where the last one ended, on every node alike.
Snapshots every K steps are what a receipt commits to.

Shapes: P = trainable parameters; a batch is [accumulation, batch, seq] of token ids.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hivetrain import run
from hivetrain.errors import HivetrainError, SchemaMismatch
from hivetrain.model.vector import FlatVector
from hivetrain.training.state import Snapshot, State

logger = logging.getLogger(__name__)

Batches = Callable[[int], Tensor]
"""``batches(i)``: token ids [accumulation, batch, seq] of the round's inner step i, counted from 0."""


class TrainingDiverged(HivetrainError):
    """A loss, a gradient or a parameter is not finite. Names the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One inner step. Loss is in nats per token, before the step; the norm is before clipping."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundWork:
    """What a miner did in one round, or what a replay of a part of it gave. Tensors: float32 [P] on the CPU.

    Attributes:
        vector, exp_avg, exp_avg_sq: where it ended.
        losses: nats per token, one per step.
        snapshots: every K steps, and the end; the start is the state itself and not among them.
        seconds: wall time of the whole loop.
        compute_seconds: of that, forward, backward and update: without waiting for data or copying snapshots.
    """

    vector: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    losses: tuple[float, ...]
    num_steps: int
    num_samples: int
    num_tokens: int
    snapshots: tuple[Snapshot, ...]
    seconds: float
    compute_seconds: float


def learning_rate(step: int, inner: run.Inner, merge_every: int = 0) -> float:
    """The rate of global inner step ``step``, counted from 0: linear warm-up, cosine, then constant at the end.

    After every merge, each ``merge_every`` epochs of `Inner.max_steps`, it warms up again over
    `Inner.rewarm_steps` to what the schedule says (https://arxiv.org/abs/2307.05695, section 3).
    """
    since_merge = step % (merge_every * inner.max_steps) if merge_every else step
    rewarming = since_merge < step and since_merge < inner.rewarm_steps
    return _scheduled(step, inner) * ((since_merge + 1) / inner.rewarm_steps if rewarming else 1.0)


def _scheduled(step: int, inner: run.Inner) -> float:
    if step < inner.warmup_steps:
        return inner.lr * (step + 1) / inner.warmup_steps
    span = max(1, inner.total_steps - inner.warmup_steps)
    progress = min(1.0, (step - inner.warmup_steps) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return inner.lr * (inner.final_lr_ratio + (1 - inner.final_lr_ratio) * cosine)


class InnerLoop:
    """Inner steps over one model. Not thread-safe: one thread owns the model.

    Args:
        model: the module that `attach_adapter` returned, on ``device``.
        flat: its trainable vector.
        recipe: the run's.
        device: where batches are sent.
    """

    def __init__(self, model: nn.Module, flat: FlatVector, recipe: run.Recipe, device: torch.device | str) -> None:
        self.model = model
        self.flat = flat
        self.recipe = recipe
        self.device = torch.device(device)

    def run(
        self,
        state: State,
        batches: Batches,
        *,
        num_steps: int,
        first_step: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> RoundWork:
        """Take up to ``num_steps`` inner steps from ``state``; the model is left where they end.

        Args:
            state: the round's state, or `at_snapshot(state, snapshot)` for a later window of it.
            batches: called once per step, with ``first_step``, ``first_step + 1``, ...
            num_steps: at most so many.
            first_step: inner steps of this round that lie behind ``state``'s vector.
            should_stop: asked before every step.
            on_step: told after every step.

        Raises:
            TrainingDiverged: a value that is not finite; the model then holds nothing of use.
            SchemaMismatch: the state is not of this model.
        """
        started = time.perf_counter()
        stepper = _Stepper(self, state, state.step + first_step)
        losses: list[float] = []
        snapshots: list[Snapshot] = []
        num_samples = num_tokens = 0
        compute_seconds = 0.0
        for index in range(first_step, first_step + num_steps):
            if should_stop():
                break
            ids = self._batch(batches, index)
            step_started = time.perf_counter()
            loss, grad_norm, lr = stepper.step(ids)
            seconds = time.perf_counter() - step_started
            compute_seconds += seconds
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise TrainingDiverged(f"inner step {index}: loss {loss}, gradient norm {grad_norm}")
            losses.append(loss)
            num_samples += ids.shape[0] * ids.shape[1]
            num_tokens += ids.numel()
            if (index + 1) % self.recipe.inner.snapshot_every == 0:
                snapshots.append(stepper.snapshot(index + 1))
            if on_step is not None:
                on_step(
                    StepReport(
                        step=index, loss=loss, grad_norm=grad_norm, lr=lr, num_tokens=ids.numel(), seconds=seconds
                    )
                )
        end = first_step + len(losses)
        if losses and (not snapshots or snapshots[-1].step != end):
            snapshots.append(stepper.snapshot(end))
        last = snapshots[-1] if snapshots else stepper.snapshot(end)
        if not bool(torch.isfinite(last.vector).all()):
            raise TrainingDiverged(f"the vector is not finite after inner step {end - 1}")
        return RoundWork(
            vector=last.vector,
            exp_avg=last.exp_avg,
            exp_avg_sq=last.exp_avg_sq,
            losses=tuple(losses),
            num_steps=len(losses),
            num_samples=num_samples,
            num_tokens=num_tokens,
            snapshots=tuple(snapshots),
            seconds=time.perf_counter() - started,
            compute_seconds=compute_seconds,
        )

    def _batch(self, batches: Batches, index: int) -> Tensor:
        ids = batches(index)
        if ids.ndim != 3:
            raise ValueError(f"a batch must be [accumulation, batch, seq], got {list(ids.shape)}")
        return ids.to(self.device, non_blocking=True)


class _Stepper:
    """AdamW over one flat leaf, from a published state."""

    def __init__(self, loop: InnerLoop, state: State, global_step: int) -> None:
        for name, moment in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            if moment.shape != loop.flat.values.shape:
                raise SchemaMismatch(f"the state's {name} must be [{loop.flat.size}], got {list(moment.shape)}")
        inner = loop.recipe.inner
        device = loop.flat.values.device
        loop.flat.load_(state.vector)
        self._model = loop.model
        self._flat = loop.flat
        self._inner = inner
        self._merge_every = loop.recipe.adapter.merge_every
        self._global_step = global_step
        self._leaf = nn.Parameter(loop.flat.values)
        self._leaf.grad = loop.flat.grad
        self._optimizer = torch.optim.AdamW(
            [self._leaf],
            lr=inner.lr,
            betas=(inner.beta1, inner.beta2),
            eps=inner.eps,
            weight_decay=inner.weight_decay,
            fused=True,
        )
        self._moments: dict[str, Tensor] = {
            "step": torch.tensor(float(global_step), device=device),
            "exp_avg": state.exp_avg.to(device, copy=True),
            "exp_avg_sq": state.exp_avg_sq.to(device, copy=True),
        }
        self._optimizer.state[self._leaf] = self._moments
        self._autocast = inner.precision == "bf16"

    def step(self, ids: Tensor) -> tuple[float, float, float]:
        """One inner step on ``ids`` [accumulation, batch, seq]: loss, gradient norm and rate."""
        lr = learning_rate(self._global_step, self._inner, self._merge_every)
        self._optimizer.param_groups[0]["lr"] = lr
        grad = self._flat.grad
        grad.zero_()
        num_micro = ids.shape[0]
        total = torch.zeros((), device=ids.device)
        for micro in ids:
            loss = self._loss(micro)
            total += loss.detach()
            (loss if num_micro == 1 else loss / num_micro).backward()  # type: ignore[no-untyped-call]
        norm = torch.linalg.vector_norm(grad)
        grad.mul_((self._inner.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self._optimizer.step()
        self._global_step += 1
        # The only wait for the device in a step.
        mean_loss, grad_norm = torch.stack((total / num_micro, norm)).tolist()
        return mean_loss, grad_norm, lr

    def _loss(self, ids: Tensor) -> Tensor:
        with torch.autocast(device_type=ids.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            loss: Tensor = self._model(input_ids=ids, labels=ids).loss
        return loss

    def snapshot(self, step: int) -> Snapshot:
        return Snapshot(
            step=step,
            vector=self._flat.values.detach().to("cpu", copy=True),
            exp_avg=self._moments["exp_avg"].to("cpu", copy=True),
            exp_avg_sq=self._moments["exp_avg_sq"].to("cpu", copy=True),
        )
