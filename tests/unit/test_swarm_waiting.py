"""When a peer of a swarm waits for its group, and when it goes on; no processes, no network."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import time
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from hivetrain.trainer import averagers, engine
    from hivetrain.trainer.averagers import AveragingStage

from hivetrain.trainer.exchange import Averaged
from hivetrain.trainer.finite import all_finite
from hivetrain.trainer.tracker import Reports

LOOKING, FORMED = AveragingStage.LOOKING_FOR_GROUP, AveragingStage.AWAITING_TRIGGER


@dataclass
class Control:
    """A step that hivemind has scheduled."""

    stage: Any = LOOKING
    triggered: bool = False
    ended: bool = False
    cancelled: bool = False
    trigger: asyncio.Event = field(default_factory=asyncio.Event)

    def done(self) -> bool:
        return self.ended

    def cancel(self) -> None:
        self.cancelled = True

    async def wait_for_trigger(self) -> None:
        await self.trigger.wait()
        self.triggered = True


@dataclass
class Notes:
    due: float = math.inf


@dataclass
class Group:
    """A gradient averager whose group takes calls."""

    notes: Notes
    calls: list[float] = field(default_factory=list)

    def call_group(self, in_s: float) -> None:
        self.calls.append(in_s)
        self.notes.due = time.monotonic() + in_s


STEP_S = 1e4  # no test takes half of one


def optimizer(gradients: Control | None, state: Control | None = None, peers: int = 2, epoch: int = 3) -> Any:
    made, notes = object.__new__(engine.SwarmOptimizer), Notes()
    made.__dict__.update(
        _parent_pid=0, scheduled_grads=gradients, scheduled_state=state, grad_averager=Group(notes),
        matchmaking_time=1e6, allreduce_timeout=1e6, _waits_since=None, _failed_downloads=0, _notes=notes,
        _steps_s=[STEP_S], _is_last_step=lambda: False, state_averager=types.SimpleNamespace(local_epoch=3),
        tracker=types.SimpleNamespace(
            global_progress=types.SimpleNamespace(num_peers=peers), global_epoch=epoch, ready_to_update_epoch=True,
            estimated_next_update_time=0.0,
        ),
    )  # fmt: skip
    return made


def test_training_goes_on_until_the_group_is_formed() -> None:
    control = Control()
    waiting = optimizer(control)
    assert waiting._goes_on()
    control.stage = FORMED
    assert not waiting._goes_on(), "nobody has called it for later"


@pytest.mark.parametrize(
    "control", [None, Control(ended=True), Control(triggered=True)], ids=["none", "failed", "used"]
)
def test_where_no_group_is_looked_for_any_more_the_step_is_taken(control: Control | None) -> None:
    assert not optimizer(control)._goes_on()


def test_alone_a_peer_waits_for_nobody() -> None:
    assert not optimizer(Control(), peers=1)._goes_on()


def test_the_states_group_is_waited_for_as_long_as_it_is_looked_for_and_the_matchmaking_lasts() -> None:
    state = Control()
    waiting = optimizer(Control(stage=FORMED), state)
    assert waiting._goes_on()
    waiting.matchmaking_time = 0.0
    assert not waiting._goes_on()
    waiting.matchmaking_time = 1e6
    state.ended = True
    assert not waiting._goes_on()


def test_a_group_is_looked_for_early_once_and_never_alone() -> None:
    def looks(eta_s: float, control: Control | None = None, peers: int = 2) -> bool:
        made = optimizer(control, peers=peers)
        made.matchmaking_time = 10.0
        made.tracker.estimated_next_update_time = engine.get_dht_time() + eta_s
        return bool(made._looks_for_groups(control))

    assert looks(14.0)
    assert not looks(1000.0)
    assert not looks(float("inf"))
    assert not looks(14.0, Control())
    assert looks(14.0, Control(ended=True))
    assert not looks(14.0, peers=1)


def test_who_is_called_comes_after_the_step_whose_end_is_nearest() -> None:
    waiting = optimizer(Control(stage=FORMED), Control())
    assert not waiting._is_called()
    for in_steps, comes in ((1.0, False), (0.6, False), (0.4, True), (0.0, True), (-3.0, True)):
        waiting._notes.due = time.monotonic() + in_steps * STEP_S
        assert waiting._is_called() == comes
        assert waiting._goes_on() != comes


def test_a_group_is_called_once_for_the_end_of_the_step_after_which_the_swarm_has_its_samples() -> None:
    def calls(eta_s: float, control: Control | None, state: Control | None = None, **changed: Any) -> list[float]:
        made = optimizer(control, state)
        made.tracker.estimated_next_update_time = engine.get_dht_time() + eta_s
        made.__dict__.update(changed)
        made._maybe_schedule_gradient_averaging()
        made._maybe_schedule_gradient_averaging()
        return list(made.grad_averager.calls)

    formed = Control(stage=FORMED)
    assert calls(0.9 * STEP_S, formed) == [STEP_S]
    assert calls(-1.0, formed) == [STEP_S]
    assert calls(1.1 * STEP_S, formed) == []
    assert calls(math.inf, formed) == []
    assert calls(0.0, Control()) == []
    assert calls(0.0, formed, Control()) == [], "the state's group is still looked for"
    assert calls(0.0, formed, Control(stage=FORMED)) == [STEP_S]
    assert calls(0.0, formed, Control(), matchmaking_time=0.0, _waits_since=0.0) == [STEP_S]


@pytest.mark.parametrize(
    "changed", [{"allreduce_timeout": 5 * STEP_S}, {"_is_last_step": lambda: True}], ids=["long steps", "its last step"]
)
def test_who_has_long_steps_or_no_other_calls_nobody_and_comes_at_once(changed: dict[str, Any]) -> None:
    waiting = optimizer(Control(stage=FORMED))
    waiting.__dict__.update(changed)
    waiting._maybe_schedule_gradient_averaging()
    assert waiting.grad_averager.calls == []
    assert not waiting._goes_on()
    waiting._notes.due = time.monotonic() + 0.4 * STEP_S
    assert waiting._is_called()


def test_who_is_called_for_later_than_its_last_step_comes_at_that_ones_end() -> None:
    waiting = optimizer(Control(stage=FORMED))
    waiting._notes.due = time.monotonic() + 9 * STEP_S
    assert waiting._goes_on()
    waiting._is_last_step = lambda: True
    assert waiting._is_called()
    assert not waiting._goes_on()


def test_a_pause_between_two_steps_is_no_measure_of_a_step() -> None:
    waiting = optimizer(None)
    waiting._steps_s = [0.1, 60.0, 0.1]
    assert waiting._step_s() == 0.1
    waiting._steps_s = []
    assert waiting._step_s() == 0.0


def test_reports_that_come_soon_after_another_are_left_out_but_not_that_of_a_new_epoch() -> None:
    clock = [100.0]
    alarm = Reports(lambda: clock[0])

    def reports(epoch: int, samples: int, after_s: float) -> bool:
        alarm.clear()
        clock[0] += after_s
        alarm.note(epoch, samples)
        alarm.set()
        return alarm.is_set()

    assert reports(3, 4, 0.0)
    assert not reports(3, 8, 0.4)
    assert reports(3, 12, 0.2)
    assert reports(4, 0, 0.1)
    assert reports(4, 4, 0.1), "an epoch's first"
    assert not reports(4, 8, 0.1)
    assert reports(4, 0, 0.1), "samples were dropped"


def test_a_call_to_another_group_than_ours_is_not_heard() -> None:
    for control in (None, Control(), Control(stage=FORMED, ended=True), Control(stage=FORMED, triggered=True)):
        waiting = optimizer(control)
        waiting._notes.due = 0.0
        assert not waiting._is_called()


@pytest.mark.parametrize("control", [None, Control(), Control(ended=True)], ids=["no group", "looking", "failed"])
def test_who_was_left_behind_loads_what_the_others_have(control: Control | None) -> None:
    loaded: list[int] = []
    waiting = optimizer(control, epoch=4)
    waiting.load_state_from_peers = lambda least_epoch: loaded.append(least_epoch)
    waiting._update_global_epoch(None)
    assert loaded == [4], "a state as old as ours lacks the step that we missed"


def test_who_has_a_group_of_the_same_epoch_steps_with_it() -> None:
    assert not optimizer(Control(stage=FORMED), epoch=4)._is_left_behind()
    assert not optimizer(None)._is_left_behind()
    local = optimizer(None, epoch=4)
    local.grad_averager = None  # with local updates, everyone steps alone
    assert not local._is_left_behind()


def test_who_is_given_no_state_after_some_tries_steps_alone() -> None:
    waiting = optimizer(None, epoch=4)
    for failed in range(engine.LEFT_BEHIND_TRIES):
        waiting._failed_downloads = failed
        assert waiting._is_left_behind()
    waiting._failed_downloads = engine.LEFT_BEHIND_TRIES
    assert not waiting._is_left_behind()


class Meeting:
    def __init__(self) -> None:
        self.broken, self.closed = asyncio.Event(), False
        self.calls: list[float] = []

    async def call(self, in_s: float) -> None:
        self.calls.append(in_s)

    async def close(self) -> None:
        self.closed = True


def averager(meetings: list[Meeting]) -> Any:
    made = object.__new__(averagers.SwarmGradientAverager)
    opening = asyncio.get_running_loop().create_future()
    opening.set_result(None)
    left = list(meetings)
    made.__dict__.update(
        _opening=opening, notes=Notes(due=0.0), _meetings={}, _parent_pid=0, _popen=None, _closed=False,
        _meet=lambda group: left.pop(0),
    )  # fmt: skip
    return made


async def look(step: Control) -> Any:
    return types.SimpleNamespace(group_id=b"group")


def test_a_group_that_falls_apart_before_it_is_used_is_replaced() -> None:
    async def main() -> None:
        first, second = Meeting(), Meeting()
        step, bent = Control(), averager([first, second])
        looking = asyncio.create_task(bent._look_for_group(look, step))
        await asyncio.sleep(0)
        first.broken.set()
        while b"group" not in bent._meetings or bent._meetings[b"group"][1] is not second:
            await asyncio.sleep(0)
            step.trigger.set() if first.closed else None
        assert (await looking).group_id == b"group"
        assert first.closed
        assert not second.closed
        assert bent.notes.due == math.inf

    asyncio.run(main())


def test_a_call_goes_by_the_pipe_to_the_newest_group() -> None:
    async def main() -> None:
        here, there = multiprocessing.Pipe()
        meeting, bent = Meeting(), averager([])
        bent.__dict__.update(_outer_pipe=here, _meeting=meeting)
        bent.notes.due = math.inf
        bent.call_group(5.0)
        assert bent.notes.due == pytest.approx(time.monotonic() + 5.0, abs=1.0)
        method, args, kwargs = there.recv()
        await getattr(bent, method)(*args, **kwargs)
        assert meeting.calls == [5.0]

    asyncio.run(main())


def test_a_cancelled_step_leaves_its_group() -> None:
    async def main() -> None:
        meeting = Meeting()
        looking = asyncio.create_task(averager([meeting])._look_for_group(look, Control()))
        for _ in range(5):
            await asyncio.sleep(0)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        assert meeting.closed

    asyncio.run(main())


def test_notes_tell_whose_vectors_the_newest_mean_is_of() -> None:
    notes = averagers.Notes()
    for sent in (7, 5):
        notes.take(Averaged(mean=None, weights={"a": 2.0, "b": 0.0, "c": 4.0}, sent_bytes=sent))
    assert (notes.members, notes.weight, notes.sent_bytes) == (2, 6.0, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_values_are_finite_and_infinite_ones_are_found(dtype: torch.dtype) -> None:
    large = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite([torch.ones(2), large])
    assert all_finite([])
    for bad in ("inf", "-inf", "nan"):
        assert not all_finite([torch.ones(2), torch.tensor([1.0, float(bad)], dtype=dtype)])
