"""A network of real processes whose all-reduce carries four bits of the pseudo-gradient, eight of the second moments
and nothing of the first ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from network_kit import SMALL_RECIPE, processes_of, until
from safetensors import safe_open
from test_network import read_lines, running_up

from hivetrain.hub.client import HubStore
from hivetrain.verification.receipt import NO_REMAINDER, Receipt
from tests.hub_fixture import HubProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LOSSY_RECIPE = (
    SMALL_RECIPE
    + """\
[scoring]
check_share = 1.0
[averaging]
codec = "int4"
moments_codec = "none"
second_moments_codec = "log8"
"""  # the small recipe ends with the table of the scores
)
NUM_EPOCHS = 2  # the second is the first with a remainder


def test_epochs_under_lossy_codecs_are_published_checked_and_held_by_all(tmp_path: Path) -> None:
    folder, out, recipe = tmp_path / "net", tmp_path / "out.json", tmp_path / "recipe.toml"
    recipe.write_text(LOSSY_RECIPE)
    flags = ["--epochs", str(NUM_EPOCHS), "--miners", "2", "--no-dashboard", "--tracker", "none", "--block-time", "0.5"]
    with running_up(folder, "--recipe", str(recipe), "--json", str(out), "--min-loss-drop", "0.2", *flags) as up:
        until(lambda: up.process.poll() is not None, f"the end of `up --epochs {NUM_EPOCHS}`", 400)
        miners = {f"miner-{number}": up.hotkey(f"miner-{number}") for number in (1, 2)}
        repo = up.genesis["hub_repo"]
    print(up.text)
    assert up.process.returncode == 0, up.text
    report = json.loads(out.read_text())
    assert (report["ok"], report["failed"]) == (True, [])
    assert not processes_of(folder)

    hub = HubProcess(folder / "hub")
    hub.start()
    try:
        store = HubStore(endpoint=hub.url, repo=repo)
        manifests = {epoch: ref.manifest for epoch in store.epochs() if (ref := store.resolve(epoch)) is not None}
    finally:
        hub.close()
    for epoch in range(1, NUM_EPOCHS + 1):
        assert set(manifests[epoch].members) == set(manifests[epoch].receipts) == set(miners.values())
        for name in miners:
            states = read_lines(folder / name / "states.jsonl")
            assert [line["state_hash"] for line in states if line["epoch"] == epoch] == [manifests[epoch].state_hash]

    # Everyone was checked in every round, and stood; from the second epoch on, with a remainder.
    log = (folder / "logs" / "validator-1.log").read_text()
    assert log.count("check of") >= NUM_EPOCHS * len(miners)
    assert "not_committed" not in log
    assert "wrong_replay" not in log
    for name, hotkey in miners.items():
        assert report["scores"][hotkey]["gradient"] == 1.0
        used = set()
        for path in (folder / name / "remainder").glob("sent-*.safetensors"):
            with safe_open(path, framework="pt") as file:
                used.add(Receipt.model_validate_json(file.metadata()["hivetrain"]).remainder_root)
        assert used - {NO_REMAINDER}
