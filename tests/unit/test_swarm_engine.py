"""What we bend in hivemind's optimizer and averagers, without a swarm."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import time
import types
import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivetrain.trainer import averagers, engine, node

from hivetrain.errors import ConfigError, ServiceError
from hivetrain.trainer import session
from hivetrain.trainer.config import Reach, read_config
from hivetrain.trainer.initial import with_state
from hivetrain.trainer.rounds import RoundReport
from hivetrain.trainer.schedule import SwarmSchedule
from tests.swarm_kit import averager, loop

__all__ = ["loop"]  # a fixture, used by being here


def test_preparing_an_optimizer_changes_no_weight_and_counts_no_step() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = with_state(torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5))
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert weight.grad is None
    assert float(optimizer.state[weight]["step"]) == 0
    reference = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.5)
    for parameter, stepped in ((weight, optimizer), (reference, plain)):
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        stepped.step()
    assert torch.equal(weight, reference)


def test_batches_of_different_sizes_weigh_as_many_samples_as_they_have() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    gradients = averager(weight)
    for samples, value in ((1, 10.0), (3, 2.0)):
        weight.grad = torch.tensor([value])
        gradients.accumulate_grads_(samples)
    gradients.load_accumulators_into_averager_()
    with gradients.get_tensors() as (mean,):
        assert mean.item() == pytest.approx((1 * 10 + 3 * 2) / 4)


@pytest.fixture
def adamw() -> torch.optim.Optimizer:
    return with_state(torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]))


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], list[torch.Tensor]]:
    metadata, moments = averagers.dump_optimizer_state(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {"epoch": 3, "optimizer_metadata": metadata}, [*(weight.detach() for weight in weights), *moments]


def test_a_state_like_ours_is_accepted(adamw: torch.optim.Optimizer) -> None:
    assert averagers.problem_of_state(adamw, (), *state_of(adamw)) is None


def test_a_state_of_another_shape_kind_or_with_nan_is_refused_before_anything_is_copied(
    adamw: torch.optim.Optimizer,
) -> None:
    metadata, tensors = state_of(adamw)
    wrong_shape = [torch.ones(4), *tensors[1:]]
    not_finite = [torch.tensor([1.0, float("nan"), 1.0]), *tensors[1:]]
    other_kind = copy.deepcopy(metadata)
    other_kind["optimizer_metadata"][0] = {"type": "value", "value": "x"}

    def problem(metadata: Any, tensors: list[torch.Tensor]) -> str:
        return averagers.problem_of_state(adamw, (), metadata, tensors) or ""

    assert "other shapes" in problem(metadata, wrong_shape)
    assert "other shapes" in problem(metadata, tensors[:-1])
    assert "not finite" in problem(metadata, not_finite)
    assert "another one" in problem(other_kind, tensors)
    assert "epoch" in problem({**metadata, "epoch": "3"}, tensors)
    assert "epoch" in problem(None, tensors)


def state_averager() -> Any:
    """One whose process is not there, so that nothing it is asked for comes."""
    return averagers.SwarmStateAverager(
        dht=None, prefix="test", client_mode=False, start=False, notes=averagers.Notes(), codec="fp32",
        reach=Reach(host_maddrs=(), announce_maddrs=None), params=[torch.nn.Parameter(torch.ones(3))],
        optimizer=lambda groups: with_state(torch.optim.AdamW(groups)), offload_optimizer=True, custom_gradients=True,
    )  # fmt: skip


def test_a_state_that_does_not_come_in_time_is_not_loaded_and_ends_no_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    waiting = state_averager()
    waiting.downloaded_epoch = 7  # of an earlier download
    assert waiting.download(0.01) is False
    assert (waiting.downloaded_epoch, waiting.local_epoch) == (None, 0)
    assert "raise load_state_timeout" in caplog.text


@pytest.mark.parametrize(("least_epoch", "is_taken"), [(0, True), (3, True), (4, False)])
def test_a_state_older_than_asked_for_is_refused_before_anything_is_copied(
    monkeypatch: pytest.MonkeyPatch, least_epoch: int, is_taken: bool
) -> None:
    ours, theirs = state_averager(), state_averager()
    ours.local_epoch = 2
    (weight,), (their_weight,) = (one.optimizer.param_groups[0]["params"] for one in (ours, theirs))
    with torch.no_grad():
        their_weight.fill_(5.0)
    state = state_of(theirs.optimizer)
    monkeypatch.setattr(averagers.DecentralizedAverager, "load_state_from_peers", lambda self, **_: state)
    assert ours.download(1.0, least_epoch) is is_taken
    assert (ours.local_epoch, weight.tolist()) == ((3, [5.0] * 3) if is_taken else (2, [1.0] * 3))


def test_a_download_that_nobody_waits_for_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[float] = []

    async def hiveminds(self: Any, future: Any, timeout: float) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(timeout)

    monkeypatch.setattr(averagers.DecentralizedAverager, "_load_state_from_peers", hiveminds)
    with asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(state_averager()._load_state_from_peers(None, timeout=0.01), 20))
    assert ended == [0.01]


def test_whatever_is_downloaded_may_take_load_state_timeout() -> None:
    config = read_config({"opt": {"run_id": "a", "target_batch_size": 1, "load_state_timeout": 70.0}})
    asked: list[float] = []

    def download(timeout_s: float) -> bool:
        asked.append(timeout_s)
        return True

    board = types.SimpleNamespace(
        me=types.SimpleNamespace(swarm_epochs=3), others=list,
        settle=lambda download, download_s, most_samples, **_: download() and asked.extend([download_s, most_samples]),
    )  # fmt: skip
    joining = session.Session(config, None, board, [types.SimpleNamespace(peer_id="a")])
    joining.optimizer = types.SimpleNamespace(
        local_epoch=3,
        download=download,
        share_state=bool,
        flush=list,
        digest=str,
        trained_samples=0,
        can_share=True,
    )
    joining.adopt_state()
    joining.settle()
    assert asked == [pytest.approx(70.0, abs=5.0), 70.0, 70.0, 1000]


class Watching:
    """A tracker that sees one more peer training each time that it looks again."""

    def __init__(self, epoch: int = 3) -> None:
        self.global_progress = types.SimpleNamespace(num_peers=0, epoch=epoch)
        self.performance_ema, self.resets = types.SimpleNamespace(reset_timer=self.reset), 0

    def reset(self) -> None:
        self.resets += 1

    def tell_idle(self) -> None:
        assert self.global_progress.num_peers == 0, "before anything else"

    def look_again(self) -> None:
        self.global_progress.num_peers += 1


def test_so_many_peers_as_asked_for_are_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    def waits(least: int, stops_after: int = 99, epoch: int = 3) -> int:
        waited: list[float] = []
        tracker = Watching(epoch)
        staying = session.Session(None, None, None, [])
        staying.optimizer = types.SimpleNamespace(tracker=tracker, local_epoch=3)
        staying.await_peers(least, lambda: len(waited) >= stops_after, waited.append)
        assert tracker.resets == bool(waited), "waiting is no work"
        return len(waited)

    assert waits(1) == 0
    assert waits(2) == 2
    assert capsys.readouterr().out == ""
    assert waits(4) == 4
    assert capsys.readouterr().out == "Waiting for 2 more of 4 peers; Ctrl-C stops\n"
    assert waits(50, stops_after=4) == 4
    assert waits(50, epoch=4) == 0, "the swarm goes on without us"


def test_a_malformed_address_is_refused_before_the_daemon_is_started() -> None:
    config = read_config(
        {"dht": {"host_maddrs": ["/ip4/localhost/tcp/x"]}, "opt": {"run_id": "a", "target_batch_size": 1}}
    )
    with pytest.raises(ConfigError, match="host_maddrs: '/ip4/localhost/tcp/x' is not a multiaddress"):
        node.Node(config).start()


def test_the_trainers_schedule_is_a_view_that_steps_nothing() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = SwarmSchedule(optimizer)
    schedule.step()
    schedule.load_state_dict(schedule.state_dict())
    assert schedule.get_last_lr() == [0.5]
    optimizer.param_groups[0]["lr"] = 0.25
    assert schedule.get_last_lr() == [0.25]


def test_a_round_is_reported_with_peers_samples_seconds_and_bytes() -> None:
    report = RoundReport(epoch=3, peers=2, samples=130, seconds=1.2345, sent_bytes=4096)
    assert report.metrics() == {
        "swarm_epoch": 3, "swarm_peers": 2, "swarm_samples": 130, "swarm_seconds": 1.234, "swarm_sent_bytes": 4096,
    }  # fmt: skip
    assert report.postfix() == "swarm epoch 3, 2 peers, 130 samples, 1.2 s"


class Averager:
    """A state averager to whom nobody gives a state."""

    local_epoch = 3

    def step(self, **kwargs: bool) -> None: ...
    def relink(self) -> None: ...
    def _update_scheduler(self) -> None: ...
    def download(self, timeout_s: float, least_epoch: int) -> bool:
        return False


class Tracker:
    global_epoch = 9
    global_progress = types.SimpleNamespace(epoch=9)

    def pause_updates(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def report_local_progress(self, epoch: int, samples_accumulated: int) -> None: ...


def test_a_swarm_that_gives_no_state_is_asked_for_a_bounded_time() -> None:
    optimizer = object.__new__(engine.SwarmOptimizer)
    optimizer.__dict__.update(
        _parent_pid=0, scheduled_grads=None, state_averager=Averager(), tracker=Tracker(), grad_averager=None,
        client_mode=True, averaging_timeout=1.0, load_state_timeout=60.0, _failed_downloads=7,
        _behind_since=time.monotonic() - 61, _own_samples=0, _group_samples=None,
    )  # fmt: skip
    with pytest.raises(
        ServiceError, match=r"for 61 s no peer gave us the swarm's state \(it is at epoch 9, we are at 3\)"
    ):
        optimizer.load_state_from_peers()


class Source:
    """A state averager to whom a peer gives its state of ``epoch``."""

    local_epoch, state_sharing_priority = 3, 3

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch

    def step(self, **kwargs: bool) -> None: ...
    def relink(self) -> None: ...
    def _update_scheduler(self) -> None: ...
    def download(self, timeout_s: float, least_epoch: int) -> bool:
        self.local_epoch, self.asked_s = self._epoch, timeout_s
        return True


@pytest.mark.parametrize("epoch", [8, 9])
def test_who_loads_a_state_made_no_step_and_is_asked_after_those_who_have_the_newest(epoch: int) -> None:
    optimizer, source = object.__new__(engine.SwarmOptimizer), Source(epoch)
    optimizer.__dict__.update(
        _parent_pid=0, scheduled_grads=None, state_averager=source, tracker=Tracker(), grad_averager=None,
        client_mode=False, averaging_timeout=1.0, load_state_timeout=60.0, _failed_downloads=0, _own_samples=8,
        _group_samples=96,
    )  # fmt: skip
    assert optimizer.trained_samples == 96
    optimizer.load_state_from_peers()
    assert optimizer.trained_samples == 0
    assert (source.local_epoch, source.state_sharing_priority, source.asked_s) == (9, epoch, 60.0)


def test_a_step_alone_or_of_a_group_that_is_not_known_is_of_our_own_samples() -> None:
    optimizer = object.__new__(engine.SwarmOptimizer)
    optimizer.__dict__.update(_parent_pid=0, state_averager=types.SimpleNamespace(), _own_samples=8)
    for group in (None, 0):
        optimizer._group_samples = group
        assert optimizer.trained_samples == 8


def test_equal_states_are_equal_files_in_whatever_order_they_came() -> None:
    def saved(hasty: bool) -> bytes:
        weight = torch.nn.Parameter(torch.ones(3))
        inner = with_state(torch.optim.AdamW([weight]))
        if hasty:  # as one that was downloaded comes
            state = inner.state[weight]
            inner.state[weight] = {name: state[name] for name in sorted(state)}
            inner.param_groups[0] = {name: inner.param_groups[0][name] for name in reversed(inner.param_groups[0])}
        optimizer = object.__new__(engine.SwarmOptimizer)
        optimizer.__dict__.update(_parent_pid=0, state_averager=types.SimpleNamespace(optimizer=inner, local_epoch=3))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        assert torch.load(io.BytesIO(file.getvalue()))["state"]["local_epoch"] == 3
        return file.getvalue()

    assert saved(True) == saved(False)
