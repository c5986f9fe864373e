"""A cheat in a network of real processes: it is found out and paid nothing, and the honest are paid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from network_kit import SMALL_RECIPE, processes_of, running_up, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RECIPE = SMALL_RECIPE + "[scoring]\ncheck_share = 1.0\n"


def test_who_hands_in_noise_is_paid_nothing_beside_two_honest_miners(tmp_path: Path) -> None:
    folder, out, recipe = tmp_path / "net", tmp_path / "out.json", tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    flags = ["--attack", "random", "--epochs", "2", "--no-dashboard", "--tracker", "none", "--block-time", "0.5"]
    with running_up(folder, "--recipe", str(recipe), "--json", str(out), *flags) as up:
        until(lambda: up.process.poll() is not None, "the end of `up --attack random`", 300)
        print(up.text)
        honest = {up.hotkey("miner-1"), up.hotkey("miner-2")}
    assert up.process.returncode == 0, up.text
    report = json.loads(out.read_text())
    assert (report["ok"], report["failed"]) == (True, [])
    assert (report["attack"]["member"], report["attack"]["pay"]) == ("miner-3", 0.0)
    assert all(set(epoch["members"]) == honest for epoch in report["epochs"])
    assert "attack random: miner-3 was paid 0.00 of an honest miner's pay" in up.text
    assert "wrong_replay" in (folder / "logs" / "validator-1.log").read_text()
    assert "this miner cheats" in (folder / "logs" / "miner-3.log").read_text()
    assert not processes_of(folder)
