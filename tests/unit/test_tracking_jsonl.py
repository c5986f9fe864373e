"""JSON lines: torn lines, short writes, values that JSON cannot hold."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from hivetrain.tracking.jsonl import MAX_LINE_BYTES, JsonlTracker, LineFile, read_jsonl, read_series
from hivetrain.tracking.tracker import RunInfo

INFO = RunInfo(project="p", name="miner-1", group="run-1", config={"lr": 0.004, "bound": math.inf})


def test_a_run_its_metrics_and_its_alerts_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "miner-1.jsonl"
    tracker = JsonlTracker(path, INFO, clock=lambda: 100.0)
    tracker.start()
    tracker.log({"train/loss": 4.5, "train/step": 1, "note": "x"}, step=1)
    tracker.alert("left out", "miner-2 was late", "warn")
    tracker.finish()
    start, log, alert = read_jsonl(path)
    assert start == {
        "time": 100.0,
        "run": {"project": "p", "name": "miner-1", "group": "run-1"},
        "config": {"lr": 0.004, "bound": None},
        "pid": os.getpid(),
    }
    assert log == {"time": 100.0, "step": 1, "metrics": {"train/loss": 4.5, "train/step": 1, "note": "x"}}
    assert alert == {"time": 100.0, "alert": {"title": "left out", "text": "miner-2 was late", "level": "warn"}}


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    tracker = JsonlTracker(path, INFO)
    for step, loss in enumerate((2.0, math.nan, math.inf)):
        tracker.log({"train/loss": loss}, step)
    assert "NaN" not in path.read_text()
    assert read_series(path, "train/loss") == [(0, 2.0), (1, None), (2, None)]


def test_the_next_writer_starts_on_a_fresh_line_after_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":0,"metrics":{"loss":9.0}}\n{"step":1,"metr')
    assert read_series(path, "loss") == [(0, 9.0)]
    file = LineFile(path)
    file.append({"step": 2, "metrics": {"loss": 7.0}})
    file.append({"step": 3, "metrics": {"loss": 6.0}})
    file.close()
    assert read_series(path, "loss") == [(0, 9.0), (2, 7.0), (3, 6.0)]
    assert path.read_bytes().count(b"\n") == 4


def test_a_short_write_raises_and_costs_only_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    file = LineFile(path)
    file.append({"step": 0, "metrics": {"loss": 9.0}})
    write = os.write
    with monkeypatch.context() as patch:  # what a disk does with its last free bytes
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        with pytest.raises(OSError, match="wrote 10 of"):
            file.append({"step": 1, "metrics": {"loss": 8.0}})
    file.append({"step": 2, "metrics": {"loss": 7.0}})
    file.close()
    assert read_series(path, "loss") == [(0, 9.0), (2, 7.0)]


def test_a_line_past_the_limit_is_refused_and_not_written(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="at most"):
        file.append({"text": "x" * MAX_LINE_BYTES})
    assert not (tmp_path / "m.jsonl").exists()


def test_foreign_lines_are_skipped_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        b"\xff\xfe\n[]\n3\n\n" + b"[" * 100_000 + b'\n{"step":1,"metrics":{"loss":1}}\n{"step":"x","metrics":1}\n'
    )
    assert read_series(path, "loss") == [(1, 1.0)]
    assert list(read_jsonl(tmp_path / "none.jsonl")) == []
