"""The dashboard in a real browser, over a store that real processes wrote at the same time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from hivetrain.ports import free_port
from hivetrain.tracking import read_series, trackio_store
from tests.browser import Colour, colour_points, screenshot, visit

pytestmark = pytest.mark.slow

NEURONS = ("miner-1", "miner-2", "miner-3", "validator-1")
COLOURS: tuple[Colour, ...] = ((168, 118, 155), (232, 153, 87), (59, 130, 246), (16, 185, 129))  # trackio's palette

NEURON = """
import math, sys
from pathlib import Path
from hivetrain.tracking import RunInfo, make_tracker, metrics
name, index, folder, num_steps = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
role = name.split("-")[0]
info = RunInfo(project="hivetrain", name=name, group="run-0123", config={"role": role})
tracker = make_tracker("trackio", info, folder, finish_timeout_s=60)
tracker.start()
print("ready", flush=True)
sys.stdin.readline()
for step in range(num_steps):
    loss = 3 + index + 2 * math.exp(-step / num_steps * 3)
    values = {metrics.GLOBAL_EPOCH: step // 10}
    if role == "miner":
        values |= {metrics.TRAIN_LOSS: loss, metrics.TRAIN_TOKENS_PER_SECOND: 2000.0 + index}
    else:
        values |= {metrics.VAL_LOSS: loss}
        values |= {metrics.per_member(metrics.WEIGHT, f"uid-{uid}"): uid / 6 for uid in (1, 2, 3)}
    tracker.log(values, step)
tracker.finish()
sys.exit(any(t.num_dropped or t.failures for t in tracker.trackers))
"""


def run_neurons(folder: Path, names: tuple[str, ...], num_steps: int) -> None:
    """One process per neuron; they log at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", NEURON, name, str(index), str(folder), str(num_steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, name in enumerate(names)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.communicate("go\n", timeout=100)
        assert [process.returncode for process in processes] == [0] * len(names)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def dashboard_command(store: Path, port: int) -> list[str]:
    arguments = ["--dir", str(store), "--port", str(port), "--project", "hivetrain"]
    return [sys.executable, "-W", "error", "-m", "hivetrain.tracking.dashboard", *arguments]


@contextmanager
def dashboard(store: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        dashboard_command(store, port), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_http(f"http://127.0.0.1:{port}/version", process)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def wait_for_http(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, f"exited with {process.returncode}: {process.communicate()[0]}"
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                assert reply.status == 200
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.1)


def curves(picture: Image.Image, box: tuple[int, int, int, int]) -> dict[Colour, tuple[int, float]]:
    """Per colour with a curve inside ``box``: its width in columns, and how far it falls from left to right."""
    plot = picture.crop(box)
    found: dict[Colour, tuple[int, float]] = {}
    for colour in COLOURS:
        points = colour_points(plot, colour)
        columns = sorted({x for x, _ in points})
        if len(columns) < 100:  # the dots of legends are narrower
            continue
        third = (columns[-1] - columns[0]) / 3
        left = [y for x, y in points if x <= columns[0] + third]
        right = [y for x, y in points if x >= columns[-1] - third]
        found[colour] = (len(columns), sum(right) / len(right) - sum(left) / len(left))
    return found


@pytest.mark.browser
def test_the_browser_shows_a_falling_loss_for_every_neuron(tmp_path: Path) -> None:
    port = free_port()
    picture = tmp_path / "dashboard.png"
    boxes = ".plot-container canvas"
    with dashboard(trackio_store(tmp_path), port) as process:
        run_neurons(tmp_path, NEURONS, num_steps=40)  # the dashboard is there first, as with `hivetrain up`
        shown = visit(
            f"http://127.0.0.1:{port}/?project=hivetrain",
            picture,
            wait_for_text=[*NEURONS, "train (2)", "val (1)", "loss", "progress (1)", "weights (3)"],
            wait_for_picture=lambda image: len(curves(image, (300, 60, 1400, 1000))) == len(NEURONS),
            boxes=[boxes],
        )
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "write_token" not in output
    assert all(name in shown.dom for name in NEURONS)
    # The plots come in the order of PLOT_ORDER: the miners' loss, their speed, the validator's loss.
    with Image.open(picture) as image:
        train, val = curves(image, shown.boxes[boxes][0]), curves(image, shown.boxes[boxes][2])
    assert len(train) == 3, f"the training loss shows {len(train)} curves, expected one per miner"
    assert len(val) == 1
    assert set(train) | set(val) == set(COLOURS)
    assert all(fall > 20 for _, fall in [*train.values(), *val.values()]), (train, val)
    hosts = {url.split("/")[2] for url in shown.requested}
    assert hosts == {f"127.0.0.1:{port}"}, "the dashboard asks nobody else for anything"


@pytest.mark.browser
def test_the_browser_groups_neurons_by_run_and_by_role(tmp_path: Path) -> None:
    run_neurons(tmp_path, NEURONS, num_steps=5)
    port = free_port()
    group_by = """(() => {
        const input = document.querySelector('input[aria-label="Group by"]');
        if (!input) return false;
        const option = [...document.querySelectorAll('.options .item')].find(e => e.innerText.trim().endsWith('%s'));
        if (!option) { input.dispatchEvent(new FocusEvent('focus')); return false; }
        option.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
        return true; })()"""
    with dashboard(trackio_store(tmp_path), port):
        url = f"http://127.0.0.1:{port}/?project=hivetrain"
        visit(url, tmp_path / "run.png", steps=[group_by % "run"], wait_for_text=["run-0123", "(4)", "train (2)"])
        visit(
            url,
            tmp_path / "role.png",
            steps=[group_by % "role"],
            wait_for_text=["miner\n", "(3)", "validator\n", "(1)", "train (2)"],
        )


def test_processes_that_log_at_once_lose_nothing(tmp_path: Path) -> None:
    names = ("miner-1", "miner-2", "miner-3")
    run_neurons(tmp_path, names, num_steps=300)
    sql = "select run_name, count(distinct step) as steps, count(*) as num from metrics group by run_name order by 1"
    result = subprocess.run(
        [sys.executable, "-m", "trackio.cli", "query", "project", "--project", "hivetrain", "--sql", sql, "--json"],
        env=os.environ | {"TRACKIO_DIR": str(trackio_store(tmp_path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["rows"] == [{"run_name": name, "steps": 300, "num": 300} for name in names]
    for name in names:
        assert len(read_series(tmp_path / "metrics" / f"{name}.jsonl", "train/loss")) == 300


def test_a_taken_port_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = subprocess.run(dashboard_command(tmp_path, port), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}" in line


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_out_of_range_is_refused(tmp_path: Path, port: str) -> None:
    result = subprocess.run(dashboard_command(tmp_path, int(port)), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"--port must be in 1..65535, got {port}" in result.stderr


def test_wandb_online_with_a_dead_server_does_not_hold_the_exit(tmp_path: Path) -> None:
    code = """
import os, socket, sys
from pathlib import Path
from hivetrain.tracking import RunInfo, make_tracker
dead = socket.socket()  # accepts, and never answers
dead.bind(("127.0.0.1", 0))
dead.listen(64)
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{dead.getsockname()[1]}"
tracker = make_tracker(
    "wandb", RunInfo(project="p", name="n", group="g"), Path(sys.argv[1]), wandb_mode="online", finish_timeout_s=1
)
tracker.start()
for step in range(1000):
    tracker.log({"train/loss": 1.0}, step)
connection = dead.accept()  # wandb waits for an answer now
tracker.finish()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "WANDB_API_KEY": "0" * 40},
        capture_output=True,
        text=True,
        timeout=45,  # wandb itself waits for 90 s
    )
    assert result.returncode == 0, result.stderr
    assert "tracker wandb did not finish in time; 1000 records are not saved" in result.stderr
    assert len(read_series(tmp_path / "metrics" / "n.jsonl", "train/loss")) == 1000


@pytest.mark.browser
def test_the_screenshot_helper_names_what_is_missing(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>hello <b>world</b></p>")
    assert "<b>world</b>" in screenshot(page.as_uri(), tmp_path / "page.png", ["hello world"])
    with pytest.raises(AssertionError, match=r"\['absent'\] on the page; the page says: 'hello world'"):
        screenshot(page.as_uri(), tmp_path / "page.png", ["absent"], timeout_s=5)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1400, 1000)
