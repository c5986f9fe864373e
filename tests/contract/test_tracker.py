"""One suite over every tracker: what was logged is read back with the tracker's own tools.

Each tracker runs in a process of its own, warnings being errors: trackio and wandb keep state per process.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hivetrain.tracking import RunInfo, Tracker, TrackioTracker, WandbTracker
from hivetrain.tracking.jsonl import JsonlTracker, read_jsonl, read_series

Series = list[tuple[int, float | None]]

NUM_STEPS = 20
FIRST = [(step, 7.0 / (step + 1)) for step in range(NUM_STEPS)]
AFTER_RESTART: Series = [(15, 0.5), (16, None), (17, 0.25)]  # the step falls, as after a resync; one loss is NaN


def open_tracker(kind: str, folder: Path) -> Tracker:
    info = RunInfo(project="contract", name="miner-1", group="run-0123", config={"role": "miner", "lr": 0.004})
    if kind == "jsonl":
        return JsonlTracker(folder / "miner-1.jsonl", info)
    if kind == "trackio":
        return TrackioTracker(folder / "trackio", info)
    return WandbTracker(folder, info)


def log(tracker: Tracker, series: Iterable[tuple[int, float | None]]) -> None:
    tracker.start()
    for step, loss in series:
        tracker.log({"train/loss": math.nan if loss is None else loss, "train/step": step, "note": "x"}, step)
    tracker.alert("left out", "miner-2 was late", "warn")
    tracker.finish()


def in_a_process(kind: str, folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_tracker import *\n"
    code += f"log(open_tracker({kind!r}, Path({str(folder)!r})), {what})"
    # No account, no home, no way out: what a tracker wants from the network it does not get.
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "no_proxy": "", "TRACKIO_SPACE_ID": "a/b"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )


@dataclass(frozen=True)
class Logged:
    kind: str
    folder: Path
    outputs: tuple[subprocess.CompletedProcess[str], ...]


@pytest.fixture(scope="module", params=["jsonl", "trackio", "wandb"])
def logged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """A neuron that logged, ended, and logged again under the same name."""
    folder = tmp_path_factory.mktemp(request.param)
    outputs = [in_a_process(request.param, folder, what) for what in ("FIRST", "AFTER_RESTART")]
    return Logged(request.param, folder, tuple(outputs))


def command(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """The records of all offline runs, oldest run first, as ``wandb leet inspect`` reads them."""
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return [
        json.loads(line)
        for file in files
        for line in command("wandb", "leet", "inspect", "--json", str(file)).splitlines()
    ]


def trackio_rows(folder: Path, sql: str) -> list[dict[str, object]]:
    output = command(
        "trackio.cli",
        "query",
        "project",
        "--project",
        "contract",
        "--sql",
        sql,
        "--json",
        TRACKIO_DIR=str(folder / "trackio"),
    )
    rows: list[dict[str, object]] = json.loads(output)["rows"]
    return rows


def read_loss(logged: Logged) -> Series:
    if logged.kind == "jsonl":
        return read_series(logged.folder / "miner-1.jsonl", "train/loss")
    if logged.kind == "trackio":
        rows = trackio_rows(logged.folder, "select step, metrics from metrics order by id")
        pairs = [(row["step"], json.loads(str(row["metrics"]))["train/loss"]) for row in rows]
    else:
        items = [r["history"]["item"] for r in wandb_records(logged.folder) if r["type"] == "history"]
        pairs = [(item["step"], item["train/loss"]) for item in items]
    return [(int(str(step)), None if value == "NaN" else float(value)) for step, value in pairs]


def test_nothing_fails_and_nothing_is_printed(logged: Logged) -> None:
    for output in logged.outputs:
        assert output.returncode == 0, output.stderr
        assert output.stdout == ""
        expected = (
            ["TRACKIO_SPACE_ID is ignored: the tracker stays on this machine"] if logged.kind == "trackio" else []
        )
        assert output.stderr.splitlines() == expected


def test_every_step_is_read_back_a_falling_step_and_nan_included(logged: Logged) -> None:
    assert read_loss(logged) == FIRST + AFTER_RESTART


def test_the_run_keeps_its_name_group_and_config(logged: Logged) -> None:
    found: list[tuple[Any, Any, Any]]
    if logged.kind == "jsonl":
        starts = [record for record in read_jsonl(logged.folder / "miner-1.jsonl") if "run" in record]
        found = [(r["run"]["name"], r["run"]["group"], r["config"]) for r in starts]  # type: ignore[index]
    elif logged.kind == "trackio":
        rows = trackio_rows(logged.folder, "select run_name, config from configs")
        assert len(rows) == 1  # the restart continued the run
        configs = [json.loads(str(row["config"])) for row in rows]
        assert configs[0]["_Username"] is None
        found = [(row["run_name"], c["_Group"], c) for row, c in zip(rows, configs, strict=True)]
    else:
        runs = [r["run"] for r in wandb_records(logged.folder) if r["type"] == "run"]
        found = [(r["display_name"], r["run_group"], r["config"]["update"]) for r in runs]
    for name, group, config in found:
        assert (name, group) == ("miner-1", "run-0123")
        assert (config["role"], config["lr"]) == ("miner", 0.004)


def test_an_alert_is_read_back(logged: Logged) -> None:
    if logged.kind == "jsonl":
        found = [record["alert"] for record in read_jsonl(logged.folder / "miner-1.jsonl") if "alert" in record]
    elif logged.kind == "trackio":
        found = list(trackio_rows(logged.folder, "select title, text, level from alerts"))
    else:
        alerts = [r["alert"] for r in wandb_records(logged.folder) if r["type"] == "alert"]
        found = [{"title": a["title"], "text": a["text"], "level": a["level"].lower()} for a in alerts]
    assert found == [{"title": "left out", "text": "miner-2 was late", "level": "warn"}] * 2


@pytest.mark.parametrize("logged", ["wandb"], indirect=True)
def test_wandbs_own_sync_knows_the_offline_runs(logged: Logged) -> None:
    folders = [str(path) for path in (logged.folder / "wandb").glob("offline-run-*")]
    result = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *folders], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "Would sync 2 run(s)" in result.stdout + result.stderr


def test_json_lines_survive_a_kill(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from hivetrain.tracking import JsonlTracker, RunInfo
tracker = JsonlTracker(Path({str(tmp_path / "m.jsonl")!r}), RunInfo(project="p", name="n", group="g"))
tracker.start()
for step in range({NUM_STEPS}):
    tracker.log({{"train/loss": float(step)}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    assert read_series(tmp_path / "m.jsonl", "train/loss") == [(step, float(step)) for step in range(NUM_STEPS)]


def test_a_process_has_one_trackio_store(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from hivetrain.errors import ServiceError
from hivetrain.tracking import RunInfo, TrackioTracker
info = RunInfo(project="p", name="n", group="g")
first = TrackioTracker(Path({str(tmp_path / "a")!r}), info)
first.start()
try:
    TrackioTracker(Path({str(tmp_path / "b")!r}), info).start()
except ServiceError as error:
    print(error)
first.finish()
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert "one process, one store" in result.stdout, result.stderr


def test_wandb_online_without_a_key_is_refused_and_does_not_ask(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from hivetrain.errors import ConfigError
from hivetrain.tracking import RunInfo, WandbTracker
try:
    WandbTracker(Path({str(tmp_path)!r}), RunInfo(project="p", name="n", group="g"), mode="online").start()
except ConfigError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "set WANDB_API_KEY" in result.stdout, result.stderr
