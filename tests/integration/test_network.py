"""A whole network of real processes: what survives a kill, a Ctrl-C and a restart.

A network costs minutes: the tests share one, and run in the order of this file.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from network_kit import (
    QUIET,
    REPOSITORY,
    ROUND_S,
    SMALL_RECIPE,
    Up,
    alive,
    assert_whole,
    chain_weights,
    hivetrain,
    processes_of,
    read_lines,
    running_up,
    until,
)
from PIL import Image

from hivetrain.hub.folder import mirror
from hivetrain.manifest import Ref
from hivetrain.scoring.published import read_records
from hivetrain.scoring.record import CHECKS_BRANCH
from hivetrain.tracking.status import read_status
from neurons.audit import run_audit
from neurons.explain import explain
from neurons.sources import open_source
from template.chain.keys import verify
from tests.browser import visit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A network of three miners and short rounds that runs until it is told to stop; its first epoch is published."""
    folder = tmp_path_factory.mktemp("living") / "net"
    recipe = folder.with_name("recipe.toml")
    recipe.write_text(SMALL_RECIPE + "[scoring]\ncooldown_rounds = 1\n")  # miner-4 is paid after one round
    with running_up(folder, "--recipe", str(recipe), "--block-time", "0.5") as network:
        network.wait_for_text("epoch 1 published", 400)
        yield network
        print(network.text)


@pytest.fixture(scope="module")
def fourth(up: Up) -> Iterator[subprocess.Popen[bytes]]:
    """miner-4: registered while the network runs, and started with the very command that `register` prints."""
    command = shlex.split(hivetrain("register", "miner-4", "--dir", str(up.folder)))
    assert command[:2] == ["python", "neurons/miner.py"]
    with (up.folder / "logs" / "miner-4.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=REPOSITORY,
            env={**os.environ, **QUIET},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield process
    process.kill()
    process.wait()


def test_status_is_seen_from_another_terminal(up: Up) -> None:
    def look() -> dict[str, Any]:
        seen: dict[str, Any] = json.loads(hivetrain("status", "--json", "--dir", str(up.folder)))
        return seen

    def is_paid() -> bool:
        return all((one["score"] or 0) > 0 and (one["weight"] or 0) > 0 for one in look()["neurons"][:3])

    until(is_paid, "scores and weights of all three", 3 * ROUND_S, poll_s=1)
    shown = look()
    assert shown["running"] is True
    assert shown["pid"] == up.process.pid
    assert [neuron["name"] for neuron in shown["neurons"]] == ["miner-1", "miner-2", "miner-3", "validator-1"]
    assert all(neuron["ready"] for neuron in shown["neurons"])


def test_a_killed_miner_is_left_out_of_its_round_and_back_in_a_later_one(
    up: Up, fourth: subprocess.Popen[bytes]
) -> None:
    killed = up.kill_in("miner-1", lambda status: status.state == "training" and status.step >= 2)
    without = up.wait_for_epoch(lambda m: m.round == killed.round, f"of round {killed.round}")
    assert up.hotkey("miner-1") not in without.members
    assert {up.hotkey("miner-2"), up.hotkey("miner-3")} <= set(without.members)
    back = up.wait_for_epoch(
        lambda m: m.round > killed.round and up.hotkey("miner-1") in m.members, "with miner-1 again", 2 * ROUND_S
    )
    again = up.status("miner-1")
    assert again.pid != killed.pid
    assert "miner-1 ended with SIGKILL, restarted in 1 s" in up.text
    loaded = [line for line in read_lines(up.folder / "miner-1" / "states.jsonl") if line["source"] == "downloaded"]
    assert loaded[-1]["epoch"] == back.epoch - 1
    assert loaded[-1]["state_hash"] == loaded[-1]["manifest_state_hash"]


def test_a_fourth_miner_joins_while_the_network_runs_and_is_paid(up: Up, fourth: subprocess.Popen[bytes]) -> None:
    until(lambda: read_status(up.folder / "status" / "miner-4.json") is not None, "miner-4's status", ROUND_S)
    hotkey = up.status("miner-4").hotkey
    joined = up.wait_for_epoch(lambda m: hotkey in m.members, "with miner-4", 2 * ROUND_S)
    assert joined.weights[hotkey] == joined.weights[up.hotkey("miner-2")]
    until(lambda: chain_weights(up.genesis).get(hotkey, 0.0) > 0, "a weight for miner-4 on chain", 2 * ROUND_S)
    assert fourth.poll() is None


def test_the_newest_model_completes_text_while_the_network_runs(up: Up) -> None:
    text = hivetrain("generate", "def ", "--max-tokens", "16", "--dir", str(up.folder))
    assert text.startswith("def ")
    assert len(text.strip()) > len("def ")


@pytest.mark.browser
def test_the_dashboard_shows_every_neuron_and_its_loss(up: Up, fourth: subprocess.Popen[bytes], tmp_path: Path) -> None:
    port = json.loads((up.folder / "ports.json").read_text())["dashboard"]
    picture, plots = tmp_path / "dashboard.png", ".plot-container canvas"
    names = ["miner-1", "miner-2", "miner-3", "miner-4", "validator-1"]
    page = visit(
        f"http://127.0.0.1:{port}/?project=hivetrain",
        picture,
        wait_for_text=[*names, "train (5)\nloss\n", "val (1)\nloss\nvalidator-1"],
        wait_for_picture=lambda image: len(_curve_colours(image.crop((300, 60, 700, 480)))) >= 4,
        boxes=[plots],
        timeout_s=90,
    )
    with Image.open(picture) as image:
        loss = _curve_colours(image.crop(page.boxes[plots][0]))
    assert len(loss) == 4, f"the first plot shows {len(loss)} curves, expected one of train/loss per miner"


def _curve_colours(image: Image.Image) -> set[tuple[int, ...]]:
    """Strong colours that are in many columns of a picture: curves, for text is grey and the legend's dots narrow."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    strong = np.ptp(pixels, axis=2) > 40
    colours, counts = np.unique(pixels[strong], axis=0, return_counts=True)
    wide = [c for c, n in zip(colours, counts, strict=True) if n >= 60 and (pixels == c).all(2).any(0).sum() >= 60]
    return {tuple(int(channel) for channel in colour) for colour in wide}


def test_a_killed_validator_comes_back_with_its_scores(up: Up, fourth: subprocess.Popen[bytes]) -> None:
    path = up.folder / "validator-1" / "averages.json"
    killed = up.kill_in("validator-1", lambda status: status.phase == "verify")
    before = json.loads(path.read_text())
    up.wait_for_epoch(lambda m: m.round > killed.round, "after the validator's return", 3 * ROUND_S)
    average_before = before["entries"][up.hotkey("miner-2")]["value"]
    assert average_before > 0

    def average() -> float:
        value: float = json.loads(path.read_text())["entries"][up.hotkey("miner-2")]["value"]
        return value

    # A round whose replay is not done in time on a busy machine scores nobody; it takes nothing away either.
    seen = [average()]
    until(lambda: seen.append(average()) or seen[-1] > average_before, "scores on top of the old ones", 4 * ROUND_S)
    assert min(seen) >= average_before
    assert up.status("validator-1").pid != killed.pid


def test_a_validator_killed_right_after_its_tag_loses_nothing(up: Up, fourth: subprocess.Popen[bytes]) -> None:
    store, newest = up.store(), up.store().epochs()[-1]
    until(lambda: store.epochs()[-1] > newest, "the next tag", 2 * ROUND_S, poll_s=0.01)
    os.kill(up.status("validator-1").pid, signal.SIGKILL)
    tagged = store.resolve(newest + 1)
    assert tagged is not None
    child = up.wait_for_epoch(lambda m: m.epoch == newest + 2, "after the orphan", 4 * ROUND_S)
    assert child.parent == tagged.manifest_sha256


def test_hub_and_chain_may_die_and_come_back(up: Up, fourth: subprocess.Popen[bytes]) -> None:
    newest = up.manifests()[-1]
    services = {
        name: next(p for p in psutil.Process(up.process.pid).children() if module in p.cmdline())
        for name, module in (("hub", "hivetrain.hub.server"), ("chain", "template.chain.producer"))
    }
    for process in services.values():
        process.kill()
    until(lambda: all(f"{name} ended with SIGKILL" in up.text for name in services), "both restarted", 30)
    until(lambda: _answers(up), "the hub's answer", 60)
    later = up.wait_for_epoch(lambda m: m.round > newest.round + 1, "after the outage", 3 * ROUND_S)
    assert up.hotkey("miner-2") in later.members


def _answers(up: Up) -> bool:
    try:
        up.manifests()
    except Exception:
        return False
    return True


def test_no_published_epoch_is_lost_or_torn(up: Up, tmp_path: Path) -> None:
    refs = assert_whole(up.store(), tmp_path)
    rounds = [ref.manifest.round for ref in refs]
    assert rounds == sorted(set(rounds))
    assert len(refs) >= 4


def test_every_score_is_explained_from_a_copy_of_the_hub_and_an_honest_epoch_passes_its_audit(
    up: Up, fourth: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Also of the rounds around a validator's death: one that was not scored has no record."""
    store, repo = up.store(), up.genesis["hub_repo"]

    def scored() -> list[Ref]:
        refs = [ref for epoch in store.epochs() if epoch > 0 and (ref := store.resolve(epoch)) is not None]
        return [ref for ref in refs if read_records(store, repo, ref.manifest.round, verify)[0]]

    until(lambda: len(scored()) >= 5, "five epochs with published checks", 5 * ROUND_S, poll_s=2)
    mirror(store, repo, CHECKS_BRANCH, tmp_path / "copy")
    copy = open_source(dir=tmp_path, copy=tmp_path / "copy")
    explained = 0
    for ref in scored():
        for hotkey in ref.manifest.members:
            found = explain(copy, ref.epoch, hotkey)
            assert found.holds, found.lines()
            assert found.words[0].published == found.words[0].recomputed
            assert found.words[0].unsure == []
            explained += 1
    assert explained >= 15
    newest = scored()[-1]
    verdict = run_audit(
        open_source(dir=up.folder), newest.epoch, newest.manifest.members[0], cache=tmp_path / "cache"
    ).verdict
    assert verdict.honest, verdict
    assert verdict.num_steps == 20


def test_ctrl_c_leaves_no_process_and_the_next_up_goes_on(up: Up, fourth: subprocess.Popen[bytes]) -> None:
    fourth.terminate()
    assert fourth.wait(30) == 0
    newest = up.manifests()[-1].epoch
    before = processes_of(up.folder)
    assert len(before) >= 4 + 4 + 3  # neurons, a p2pd each, services
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(30) == 0, up.text
    assert up.text.splitlines()[-1].endswith(f"stopped, state kept in {up.folder}")
    assert not alive(before)
    assert not processes_of(up.folder)

    with running_up(up.folder, "--epochs", "9") as again:
        again.wait_for_text(f"starting from epoch {newest}", 60)
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(30) == 130, again.text
        assert not processes_of(up.folder)


def test_kill_9_of_up_leaves_no_process(up: Up) -> None:
    with running_up(up.folder) as again:
        again.wait_for_text("train", 200)
        before = processes_of(up.folder)
        assert any("p2pd" in part for process in before for part in process.cmdline()[:1])
        again.process.kill()
        until(lambda: not alive(before), "the end of every child", 20)
        assert not processes_of(up.folder)
