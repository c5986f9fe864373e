"""With which gradient a step of the swarm is made: the group's mean, or our own where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import types
import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivetrain.trainer import averagers, engine

from hivetrain.trainer.rounds import RoundReport
from tests.swarm_kit import averager, loop

__all__ = ["loop"]  # a fixture, used by being here


class Control:
    """A step of the averager that gives ``mean``, or fails with ``error``; ``late``: and succeeds all the same."""

    triggered = weight = stage = None

    def __init__(
        self, tensors: Any, mean: float | None, error: BaseException | None = None, late: bool = False
    ) -> None:
        self._tensors, self._mean, self._error = tensors, mean, error
        self._late, self._ended, self._cancelled = late, False, False

    def allow_allreduce(self) -> None:
        self.triggered = True

    def done(self) -> bool:
        return self._ended

    def exception(self) -> None: ...

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def result(self, timeout: float) -> dict[str, str]:
        if self._mean is not None:
            with self._tensors() as tensors:
                tensors[0].fill_(self._mean)
        self._ended = self._error is None or self._late
        if self._error is not None:
            raise self._error
        return {"a": "told", "b": "told"}


def in_a_round(offloaded: bool, **result: Any) -> Any:
    """An optimizer that has begun to average gradients of 2 samples, 10.0 and 2.0."""
    optimizer = with_gradients(offloaded, **result)
    assert optimizer._begin_averaging_gradients(None)
    return optimizer


def with_gradients(offloaded: bool, **result: Any) -> Any:
    weight = torch.nn.Parameter(torch.zeros(1))
    gradients = averager(weight)
    for value in (10.0, 2.0):
        weight.grad = torch.tensor([value])
        gradients.accumulate_grads_(1)
    if offloaded:
        with gradients.get_tensors() as (mean,):
            weight.grad = mean
    control = Control(gradients.get_tensors, **result)
    optimizer = object.__new__(engine.SwarmOptimizer)
    optimizer.__dict__.update(
        _parent_pid=0, averaging_timeout=1.0, status_loglevel=20, offload_optimizer=offloaded, grad_averager=gradients,
        delay_grad_averaging=False, delay_optimizer_step=False,
        _notes=types.SimpleNamespace(members=2, weight=5.0), _own_samples=2, scheduled_grads=control,
        tracker=types.SimpleNamespace(global_progress=types.SimpleNamespace(num_peers=2)),
        state_averager=types.SimpleNamespace(optimizer=torch.optim.SGD([weight])),
    )  # fmt: skip
    return optimizer


def gradient_of(optimizer: Any) -> list[float]:
    return [float(weight.grad) for group in optimizer.opt.param_groups for weight in group["params"]]


@pytest.mark.parametrize("offloaded", [True, False])
def test_a_round_that_succeeds_is_stepped_with_its_mean(offloaded: bool) -> None:
    optimizer = in_a_round(offloaded, mean=7.0)
    optimizer._average_gradients_and_load_into_optimizer(optimizer.scheduled_grads)
    assert gradient_of(optimizer) == [7.0]
    assert (optimizer._group_size, optimizer.trained_samples) == (2, 5)


@pytest.mark.parametrize("offloaded", [True, False])
@pytest.mark.parametrize(
    "error", [TimeoutError(), averagers.AllreduceException("no"), asyncio.CancelledError()], ids=repr
)
def test_a_round_that_fails_is_stepped_with_our_own_gradient(offloaded: bool, error: BaseException) -> None:
    optimizer = in_a_round(offloaded, mean=None, error=error)
    optimizer._average_gradients_and_load_into_optimizer(optimizer.scheduled_grads)
    assert gradient_of(optimizer) == [6.0]
    assert optimizer.scheduled_grads.cancelled(), "else it would write into the gradients when it finds a group"
    assert (optimizer._group_size, optimizer.trained_samples) == (1, 2)


class StateAverager:
    """One that notes what its optimizer steps with."""

    local_epoch = 3

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.averaging_in_progress = optimizer, False
        self.with_: list[float] = []

    def step(self, optimizer_step: bool = False, **kwargs: Any) -> None:
        if optimizer_step:
            self.with_ += [float(weight.grad) for group in self.optimizer.param_groups for weight in group["params"]]


class Tracker:
    global_epoch = 3

    def __init__(self, peers: int) -> None:
        self.global_progress = types.SimpleNamespace(num_peers=peers, samples_accumulated=2)

    def pause_updates(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def update_epoch(self, new_epoch: int) -> None: ...


@pytest.mark.parametrize("offloaded", [True, False])
@pytest.mark.parametrize("peers", [1, 2], ids=["alone", "no group"])
def test_a_step_without_a_group_is_of_all_our_own_batches(offloaded: bool, peers: int) -> None:
    rounds: list[RoundReport] = []
    optimizer = with_gradients(offloaded, mean=None)
    optimizer.scheduled_grads.triggered = True
    optimizer.__dict__.update(
        state_averager=StateAverager(optimizer.opt), tracker=Tracker(peers), average_state_every=10, auxiliary=False,
        client_mode=True, delay_state_averaging=False, scheduled_state=None, _on_round=rounds.append,
        _state_notes=averagers.Notes(), _failed_downloads=0, _waits_since=None,
    )  # fmt: skip
    optimizer._notes.sent_bytes = 0
    optimizer._schema_hash = optimizer._compute_schema_hash()
    optimizer._update_global_epoch(None)
    assert optimizer.state_averager.with_ == [6.0]
    assert [(report.peers, report.samples) for report in rounds] == [(1, 2)]


def test_a_round_that_succeeds_after_its_time_out_is_not_claimed_as_the_groups() -> None:
    optimizer = in_a_round(True, mean=None, error=TimeoutError(), late=True)
    optimizer._average_gradients_and_load_into_optimizer(optimizer.scheduled_grads)
    assert (optimizer._group_size, optimizer.trained_samples) == (1, 2)


def test_ctrl_c_ends_the_wait_for_a_round() -> None:
    optimizer = in_a_round(True, mean=None, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        optimizer._average_gradients_and_load_into_optimizer(optimizer.scheduled_grads)


@pytest.mark.parametrize("offloaded", [True, False])
def test_a_mean_that_is_not_finite_is_not_stepped_with(offloaded: bool, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = in_a_round(offloaded, mean=float("inf"))
    optimizer._average_gradients_and_load_into_optimizer(optimizer.scheduled_grads)
    assert gradient_of(optimizer) == [0.0]
    assert "not finite" in caplog.text
