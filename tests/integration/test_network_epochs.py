"""Three epochs of the embedded default, from nothing, by the command of the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from network_kit import assert_whole, chain_weights, processes_of, read_lines, running_up, until

from hivetrain.hub.client import HubStore
from tests.hub_fixture import HubProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_three_epochs_from_nothing_hold(tmp_path: Path) -> None:
    folder, out = tmp_path / "net", tmp_path / "out.json"
    with running_up(folder, "--epochs", "3", "--json", str(out), "--min-loss-drop", "1.0", "--fresh") as up:
        until(lambda: up.process.poll() is not None, "the end of `up --epochs 3`", 600)
    print(up.text)
    assert up.process.returncode == 0, up.text
    report = json.loads(out.read_text())
    assert set(report) == {
        "ok", "failed", "epochs", "val_loss_before", "val_loss_after", "scores", "weights", "seconds"
    }  # fmt: skip
    assert report["ok"] is True
    assert report["failed"] == []
    miners = {up.hotkey(f"miner-{number}") for number in (1, 2, 3)}
    assert [epoch["tag"] for epoch in report["epochs"]] == ["epoch-000001", "epoch-000002", "epoch-000003"]
    for epoch in report["epochs"]:
        assert set(epoch) == {"epoch", "tag", "state_sha256", "val_loss", "members", "allreduce"}
        assert set(epoch["members"]) == miners
        assert epoch["allreduce"]["faults"] == []
        assert epoch["allreduce"]["bytes"] > 0
    assert report["val_loss_before"] - report["val_loss_after"] >= 1.0
    assert all(report["weights"][hotkey] > 0 for hotkey in miners)
    assert all(set(report["scores"][hotkey]) == {"gradient", "steps", "bandwidth", "score"} for hotkey in miners)
    assert set(report["seconds"]) == {"genesis", "neurons_ready", "epochs", "total"}
    weights = chain_weights(up.genesis)
    assert all(weights[hotkey] > 0 for hotkey in miners)
    assert not processes_of(folder)

    hub = HubProcess(folder / "hub")
    hub.start()
    try:
        refs = assert_whole(HubStore(endpoint=hub.url, repo=up.genesis["hub_repo"]), tmp_path / "fetched")
    finally:
        hub.close()
    assert len(refs) >= 4
    for ref, epoch in zip(refs[1:], report["epochs"], strict=False):
        assert ref.manifest.state_hash == epoch["state_sha256"]
        for number in (1, 2, 3):
            states = read_lines(folder / f"miner-{number}" / "states.jsonl")
            held = [line["state_hash"] for line in states if line["epoch"] == ref.epoch]
            assert held == [ref.manifest.state_hash]
