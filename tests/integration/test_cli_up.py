"""`hivetrain up` from start to verdict, on a network of small real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fake_network import options, pids, run_fake

from hivetrain.errors import ConfigError
from neurons.plan import DirLock, holder_pid

FAKE = Path(__file__).with_name("fake_network.py")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # `up` sets variables for its children


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def num_epochs(folder: Path) -> int:
    path = folder / "epochs.json"
    return len(json.loads(path.read_text())) - 1 if path.exists() else 0


@contextlib.contextmanager
def fake_up(folder: Path, scenario: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(FAKE), str(folder), scenario, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hivetrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "neurons.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_good_run_ends_by_itself_with_status_0_and_writes_the_outcome(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    folder = tmp_path / "net"
    status, text = run_fake("good", options(folder, num_epochs=2, json_path=out, min_loss_drop=1.0))
    assert status == 0, text
    assert text.splitlines()[-1] == "2/2 epochs published · val loss 7.000 -> 6.000 · weights set"
    assert "epoch 1 published, val loss 6.5000 (1/2)" in text
    assert "validator-1 epoch 1 is on the hub" in text
    report = json.loads(out.read_text())
    assert report["ok"] is True
    assert report["failed"] == []
    assert report["epochs"][0] == {
        "epoch": 1,
        "tag": "epoch-000001",
        "state_sha256": "a" * 64,
        "val_loss": 6.5,
        "members": ["key-miner-1", "key-miner-2"],
        "allreduce": {"seconds": 0.25, "bytes": 1000, "faults": []},
    }
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1, 2]
    assert (report["val_loss_before"], report["val_loss_after"]) == (7.0, 6.0)
    assert report["weights"] == {"key-miner-1": 0.5, "key-miner-2": 0.5}
    assert report["scores"] == {"key-miner-1": {"gradient": 1.0, "steps": 1.0, "bandwidth": 0.5, "score": 0.85}}
    assert set(report["seconds"]) == {"genesis", "neurons_ready", "epochs", "total"}
    assert len(pids(folder)) == 6
    until(lambda: not any(is_alive(pid) for pid in pids(folder)), "the end of every process")
    assert holder_pid(folder) is None


def test_a_second_run_goes_on_from_the_last_epoch_on_the_same_ports(tmp_path: Path) -> None:
    run_fake("good", options(tmp_path, num_epochs=1))
    first, ports = num_epochs(tmp_path), (tmp_path / "ports.json").read_text()
    status, text = run_fake("good", options(tmp_path, num_epochs=1))
    assert status == 0, text
    assert f"epoch {first + 1} published" in text
    assert "epoch 1 published" not in text
    assert (tmp_path / "ports.json").read_text() == ports


@pytest.mark.slow
def test_fresh_starts_again_from_epoch_0(tmp_path: Path) -> None:
    run_fake("good", options(tmp_path, num_epochs=1))
    status, text = run_fake("good", options(tmp_path, num_epochs=1, fresh=True))
    assert status == 0, text
    assert "epoch 1 published" in text


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("lazy", "failed: epoch-000001 lacks miner-2 (key-miner-2) among its members"),
        ("split", "failed: miner-2 held another state than epoch-000001: bbbbbbbbbbbb, the manifest says aaaaaaaaaaaa"),
        ("unpaid", "failed: no weight on chain for miner-1 (key-miner-1)"),
        ("stingy", "failed: validator-1 (key-validator-1) has set no weights"),
        ("flat", "failed: val loss had to fall by more than 0: 7.0000 -> 7.0000"),
    ],
)
def test_what_did_not_hold_is_said_in_words_with_status_1(tmp_path: Path, scenario: str, reason: str) -> None:
    out = tmp_path / "out.json"
    status, text = run_fake(scenario, options(tmp_path / "net", num_epochs=1, json_path=out))
    assert status == 1
    assert reason in text.splitlines()
    report = json.loads(out.read_text())
    assert report["ok"] is False
    assert reason.removeprefix("failed: ") in report["failed"]


def test_a_loss_that_falls_too_little_fails(tmp_path: Path) -> None:
    status, text = run_fake("good", options(tmp_path, num_epochs=1, min_loss_drop=5.0), grace_s=600.0)  # not waited for
    assert status == 1
    assert "failed: val loss had to fall by at least 5: 7.0000 -> 6.5000" in text


@pytest.mark.slow
def test_a_run_that_publishes_nothing_ends_at_its_deadline(tmp_path: Path) -> None:
    status, text = run_fake("sterile", options(tmp_path / "net", num_epochs=1, timeout_s=3.0, json_path=tmp_path / "o"))
    assert status == 1
    assert "failed: not done after 3 s (--timeout)" in text
    assert json.loads((tmp_path / "o").read_text())["epochs"] == []
    until(lambda: not any(is_alive(pid) for pid in pids(tmp_path / "net")), "the end of every process")


@pytest.mark.slow
def test_a_genesis_that_fails_shows_why_and_can_be_tried_again(tmp_path: Path) -> None:
    status, text = run_fake("genesis", options(tmp_path, num_epochs=1))
    assert status == 1
    assert "genesis failed with status 4" in text
    assert "the corpus is empty" in text
    assert run_fake("good", options(tmp_path, num_epochs=1))[0] == 0


def test_a_neuron_that_cannot_run_ends_the_run_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hivetrain.supervisor.Backoff.delay_s", lambda self, num_failures: 0.01)
    status, text = run_fake("crash", options(tmp_path, num_epochs=1))
    assert status == 1
    assert "miner-1 ended with status 9, 5 times in a row" in text
    assert "out of memory" in text
    until(lambda: not any(is_alive(pid) for pid in pids(tmp_path)), "the end of every process")


def test_the_live_screen_shows_neurons_and_the_falling_loss(tmp_path: Path) -> None:
    status, text = run_fake("good", options(tmp_path, num_epochs=1), terminal=True)
    assert status == 0
    for word in ("miner-2", "training", "5/10", "val loss", "Ctrl-C", "http://127.0.0.1:"):
        assert word in text


def test_ctrl_c_stops_everything_and_keeps_the_state(tmp_path: Path) -> None:
    with fake_up(tmp_path, "good") as process:
        until(lambda: num_epochs(tmp_path) >= 2, "two epochs")
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=30)
    assert process.returncode == 0, text
    assert text.splitlines()[-1].endswith(f"stopped, state kept in {tmp_path}")
    assert "Traceback" not in text
    until(lambda: not any(is_alive(pid) for pid in pids(tmp_path)), "the end of every process")
    kept = num_epochs(tmp_path)
    assert run_fake("good", options(tmp_path, num_epochs=1))[0] == 0
    assert num_epochs(tmp_path) > kept


@pytest.mark.slow
def test_an_interrupted_verdict_is_status_130(tmp_path: Path) -> None:
    with fake_up(tmp_path, "sterile", "1") as process:
        until(lambda: (tmp_path / "logs" / "chain.log").exists(), "blocks")
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "failed: interrupted" in text


def test_kill_9_of_up_leaves_no_process_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with fake_up(tmp_path, "good") as process:
        until(lambda: num_epochs(tmp_path) >= 1, "an epoch")
        process.kill()
        process.wait()
        until(lambda: not any(is_alive(pid) for pid in pids(tmp_path)), "no orphan")
    assert len(pids(tmp_path)) == 6
    status, text = run_fake("good", options(tmp_path, num_epochs=1))
    assert status == 0, text


@pytest.mark.slow
def test_status_and_down_work_from_a_second_terminal(tmp_path: Path) -> None:
    with fake_up(tmp_path, "good") as process:
        until(lambda: num_epochs(tmp_path) >= 1, "an epoch")
        shown = json.loads(hivetrain("status", "--json", "--dir", str(tmp_path)).stdout)
        assert shown["running"] is True
        assert shown["pid"] == process.pid
        assert [neuron["name"] for neuron in shown["neurons"]] == ["miner-1", "miner-2", "validator-1"]
        second = hivetrain("up", "--dir", str(tmp_path))
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: another `hivetrain up` (pid {process.pid}) runs in {tmp_path}")
        assert "hivetrain down" in second.stderr
        ended = hivetrain("down", "--dir", str(tmp_path))
        assert ended.returncode == 0, ended.stderr
        assert f"stopped (pid {process.pid})" in ended.stdout
        process.communicate(timeout=30)
    assert process.returncode == 0
    after = hivetrain("status", "--dir", str(tmp_path))
    assert "not running" in after.stdout
    assert "miner-1" in after.stdout
    assert "hello from miner-2" in hivetrain("logs", "miner-2", "--dir", str(tmp_path)).stdout


def test_a_folder_is_held_by_one_up_at_a_time(tmp_path: Path) -> None:
    lock = DirLock(tmp_path)
    lock.acquire()
    assert holder_pid(tmp_path) == os.getpid()
    with pytest.raises(ConfigError, match="another `hivetrain up`"):
        run_fake("good", options(tmp_path, num_epochs=1))
    lock.release()
    assert holder_pid(tmp_path) is None


def test_a_cheat_is_not_judged_as_a_miner_and_its_pay_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    status, text = run_fake("lazy", options(tmp_path / "net", num_epochs=1, json_path=out, attack="random"))
    assert status == 0, text
    assert text.splitlines()[-1].endswith("attack random: miner-2 was paid 0.25 of an honest miner's pay")
    report = json.loads(out.read_text())
    assert report["attack"] == {
        "name": "random", "member": "miner-2", "hotkey": "key-miner-2", "pay": 0.25, "weight": 1.0
    }  # fmt: skip


def test_an_unknown_attack_lists_those_that_there_are(tmp_path: Path) -> None:
    done = hivetrain("up", "--dir", str(tmp_path / "net"), "--attack", "teleport")
    assert done.returncode == 2
    assert "no attack 'teleport'; there are: random, zero, " in done.stderr
    assert not (tmp_path / "net").exists()
