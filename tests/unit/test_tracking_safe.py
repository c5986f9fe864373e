"""A tracker never stops a neuron: backends that raise, block, or cannot start."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from hivetrain.tracking import JsonlTracker, RunInfo, SafeTracker, Trackers, make_tracker, read_jsonl, read_series
from hivetrain.tracking.factory import TrackerKind
from hivetrain.tracking.tracker import AlertLevel, Value


class Recorder:
    """Keeps what it is given; each method first runs ``before`` of its name."""

    def __init__(self, **before: Callable[[], object]) -> None:
        self.logged: list[tuple[dict[str, Value], int]] = []
        self.alerts: list[str] = []
        self.finished = False
        self._before = before

    def _run(self, what: str) -> None:
        if what in self._before:
            self._before[what]()

    def start(self) -> None:
        self._run("start")

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._run("log")
        self.logged.append((dict(metrics), step))

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        self._run("alert")
        self.alerts.append(f"{level}: {title}: {text}")

    def finish(self) -> None:
        self._run("finish")
        self.finished = True


def fail() -> None:
    raise OSError(28, "No space left on device")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_records_reach_the_backend_in_order_those_before_start_too() -> None:
    backend = Recorder()
    tracker = SafeTracker(backend, label="x")
    tracker.log({"loss": 3.0}, 0)
    tracker.start()
    tracker.log({"loss": 2.0}, 1)
    tracker.alert("t", "u", "warn")
    tracker.finish()
    assert backend.logged == [({"loss": 3.0}, 0), ({"loss": 2.0}, 1)]
    assert backend.alerts == ["warn: t: u"]
    assert backend.finished


def test_metrics_are_copied_when_they_are_logged() -> None:
    backend = Recorder()
    tracker = SafeTracker(backend, label="x")
    metrics = {"loss": 3.0}
    tracker.log(metrics, 0)
    metrics["loss"] = 9.0
    tracker.start()
    tracker.finish()
    assert backend.logged == [({"loss": 3.0}, 0)]


def test_a_backend_that_raises_is_warned_about_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    backend = Recorder(log=fail, alert=fail)
    tracker = SafeTracker(backend, label="disk")
    tracker.start()
    for step in range(5):
        tracker.log({"loss": 1.0}, step)
    tracker.alert("t", "u", "error")
    tracker.finish()
    assert tracker.failures == {"log: OSError": 5, "alert: OSError": 1}
    first, second = warnings_of(caplog)
    assert "disk failed to log" in first
    assert "No space left" in first
    assert "disk failed to alert" in second
    assert backend.finished


def test_a_backend_that_cannot_start_stays_off_and_its_records_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    backend = Recorder(start=fail)
    tracker = SafeTracker(backend, label="x")
    tracker.log({"loss": 1.0}, 0)
    tracker.start()
    wait_until(lambda: tracker.num_dropped == 1)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.num_dropped == 2
    assert backend.logged == []
    assert not backend.finished
    assert any("it stays off" in warning for warning in warnings_of(caplog))


def test_a_stuck_backend_neither_holds_up_log_nor_finish_and_the_oldest_go(caplog: pytest.LogCaptureFixture) -> None:
    stuck, entered = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        stuck.wait()

    backend = Recorder(log=block)
    tracker = SafeTracker(backend, label="slow", max_queued=3, finish_timeout_s=0.05)
    tracker.start()
    tracker.log({}, 0)
    assert entered.wait(10)
    for step in range(1, 8):  # returns although the backend is stuck: a blocking put would hang here
        tracker.log({}, step)
    assert tracker.num_dropped == 4
    tracker.finish()
    assert [w for w in warnings_of(caplog) if "dropping its oldest" in w] == [
        "tracker slow is slow or stuck: dropping its oldest records"
    ]
    assert any("did not finish in time; 3 records" in warning for warning in warnings_of(caplog))
    stuck.set()
    wait_until(lambda: backend.finished)
    assert [step for _, step in backend.logged] == [0, 5, 6, 7]


def test_a_backend_that_hangs_in_finish_is_told_to_let_go() -> None:
    stuck = threading.Event()

    class Holder(Recorder):
        def abandon(self) -> None:
            stuck.set()

    backend = Holder(finish=stuck.wait)
    tracker = SafeTracker(backend, label="x", finish_timeout_s=0.05)
    tracker.start()
    tracker.finish()
    wait_until(lambda: backend.finished)


def test_nothing_is_taken_after_finish() -> None:
    backend = Recorder()
    tracker = SafeTracker(backend, label="x")
    tracker.start()
    tracker.finish()
    tracker.log({"loss": 1.0}, 0)
    tracker.finish()
    assert backend.logged == []


def test_finish_without_start_returns() -> None:
    SafeTracker(Recorder(), label="x").finish()


def test_one_stuck_backend_does_not_hold_up_the_others() -> None:
    stuck = threading.Event()
    good, bad = Recorder(), Recorder(start=stuck.wait)
    trackers = Trackers({"bad": bad, "good": good}, finish_timeout_s=0.05)
    trackers.start()
    trackers.log({"loss": 1.0}, 7)
    trackers.alert("t", "u", "info")
    wait_until(lambda: bool(good.alerts))
    trackers.finish()
    assert good.logged == [({"loss": 1.0}, 7)]
    assert good.finished
    assert bad.logged == []
    stuck.set()


@pytest.mark.parametrize("kind", ["none", "trackio", "wandb"])
def test_a_folder_that_cannot_be_written_costs_one_warning_per_backend(
    kind: TrackerKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")  # root may write anywhere, but not below a file
    tracker = make_tracker(
        kind, RunInfo(project="p", name="n", group="g"), tmp_path / "file" / "x", finish_timeout_s=30
    )
    tracker.start()
    for step in range(50):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish()
    expected = {"jsonl: failed to log"} if kind == "none" else {"jsonl: failed to log", f"{kind}: failed to start"}
    logged = [w for w in warnings_of(caplog) if "failed to finish" not in w and "dropped 50" not in w]
    assert {re.sub(r"tracker (\w+) (failed to \w+):.*", r"\1: \2", w, flags=re.DOTALL) for w in logged} == expected
    assert len(logged) == len(expected)
    jsonl, *others = tracker.trackers
    assert max(jsonl.failures.values()) == 50
    assert all(other.num_dropped == 50 for other in others)


def test_a_full_disk_costs_one_warning_and_json_lines_go_on_when_there_is_space_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "m.jsonl"
    path.symlink_to("/dev/full")
    backend = JsonlTracker(path, RunInfo(project="p", name="n", group="g"))
    tracker = SafeTracker(backend, label="jsonl")
    tracker.start()
    for step in range(10):
        tracker.log({"loss": 1.0}, step)
    wait_until(lambda: sum(tracker.failures.values()) == 10)
    (warning,) = warnings_of(caplog)
    assert "No space left on device" in warning
    path.unlink()
    path.touch()
    backend._file.close()  # what was opened is the full device; a real disk keeps its file
    tracker.log({"loss": 1.0}, 10)
    tracker.finish()
    assert ["run" in record for record in read_jsonl(path)] == [True, False]
    assert read_series(path, "loss") == [(10, 1.0)]


def test_json_lines_are_written_whatever_the_kind(tmp_path: Path) -> None:
    tracker = make_tracker("none", RunInfo(project="p", name="n", group="g"), tmp_path)
    tracker.start()
    tracker.log({"train/loss": 2.5}, 1)
    tracker.finish()
    assert read_series(tmp_path / "metrics" / "n.jsonl", "train/loss") == [(1, 2.5)]


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trackio, wandb or none"):
        make_tracker("tensorboard", RunInfo(project="p", name="n", group="g"), tmp_path)  # type: ignore[arg-type]
