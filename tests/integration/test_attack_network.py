"""A cheat in a network of real processes: it is found out and paid nothing, and the honest are paid.

What anybody can do afterwards, with the hub that the network leaves behind, is done on it too: an audit of both.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from network_kit import SMALL_RECIPE, processes_of, running_up, until

from hivetrain.scoring.published import read_records
from neurons.audit import run_audit
from neurons.explain import explain
from neurons.sources import Source, open_source
from template.chain.keys import verify
from tests.hub_fixture import running_hub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RECIPE = SMALL_RECIPE + "[scoring]\ncheck_share = 1.0\n"


def test_who_hands_in_noise_is_paid_nothing_beside_two_honest_miners(tmp_path: Path) -> None:
    folder, out, recipe = tmp_path / "net", tmp_path / "out.json", tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    flags = ["--attack", "random", "--epochs", "1", "--no-dashboard", "--tracker", "none", "--block-time", "0.5"]
    with running_up(folder, "--recipe", str(recipe), "--json", str(out), *flags) as up:
        until(lambda: up.process.poll() is not None, "the end of `up --attack random`", 300)
        print(up.text)
        honest, cheat = {up.hotkey("miner-1"), up.hotkey("miner-2")}, up.hotkey("miner-3")
    assert up.process.returncode == 0, up.text
    report = json.loads(out.read_text())
    assert (report["ok"], report["failed"]) == (True, [])
    assert (report["attack"]["member"], report["attack"]["pay"]) == ("miner-3", 0.0)
    assert all(set(epoch["members"]) == honest for epoch in report["epochs"])
    assert "attack random: miner-3 was paid 0.00 of an honest miner's pay" in up.text
    assert "wrong_replay" in (folder / "logs" / "validator-1.log").read_text()
    assert "this miner cheats" in (folder / "logs" / "miner-3.log").read_text()
    assert not processes_of(folder)
    with running_hub(folder / "hub") as hub:
        source = open_source(dir=tmp_path, endpoint=hub.url, repo=up.genesis["hub_repo"])
        audit_both(source, checked_epoch(source, cheat), cheat, min(honest), tmp_path / "cache")


def checked_epoch(source: Source, hotkey: str) -> int:
    """An epoch in whose round ``hotkey`` opened its step records."""
    for epoch in source.store.epochs()[1:]:
        ref = source.epoch(epoch, verify)
        for record in read_records(source.store, source.repo, ref.manifest.round, verify)[0]:
            if any((proof.kind, proof.hotkey) == ("steps", hotkey) for proof in record.proofs):
                return epoch
    raise AssertionError("the cheat's step records were never published")


def audit_both(source: Source, epoch: int, cheat: str, honest: str, cache: Path) -> None:
    """The cheat's first wrong step is named, the honest miner passes, and what both were paid is explained."""
    found = run_audit(source, epoch, cheat, cache=cache).verdict
    assert not found.honest
    assert found.first_wrong_step is not None, found
    assert f"first wrong step: {found.first_wrong_step}" in found.lines
    assert any(line.startswith(f"step {found.first_wrong_step}: its record says loss") for line in found.lines)
    passed = run_audit(source, epoch, honest, cache=cache).verdict
    assert passed.honest, passed
    assert (passed.first_wrong_step, passed.num_steps) == (None, 20)
    for hotkey in (cheat, honest):
        explained = explain(source, epoch, hotkey)
        assert explained.holds, explained.lines()
        assert (explained.words[0].known, explained.words[0].unsure) == (True, [])
