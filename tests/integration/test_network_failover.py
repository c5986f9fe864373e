"""Two validators in real processes: the round's leader dies, or stops, in mid-round, and the other ends the epoch.

One network, shared by tests that run in the order of this file.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from network_kit import ROUND_S, SMALL_RECIPE, Up, read_lines, running_up, until

from hivetrain.manifest import Manifest
from hivetrain.tracking.status import NeuronStatus
from template.chain.client import Chain

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

VALIDATORS = ("validator-1", "validator-2")
MINERS = ("miner-1", "miner-2")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("two") / "net"
    recipe = folder.with_name("recipe.toml")
    recipe.write_text(SMALL_RECIPE)
    arguments = ["--miners", "2", "--validators", "2", "--recipe", str(recipe), "--block-time", "0.5"]
    with running_up(folder, *arguments, "--no-dashboard", "--tracker", "none") as network:
        network.wait_for_text("round 0: train", 200)
        yield network
        print(network.text)


def signal_leader(up: Up, number: signal.Signals, after: int) -> tuple[str, NeuronStatus]:
    """Send a signal to the validator that leads, as soon as it says so in a round past ``after``; who, and when."""
    deadline = time.monotonic() + 2 * ROUND_S
    while time.monotonic() < deadline:
        for name in VALIDATORS:
            status = up.status(name)
            if status.round > after and status.state == "all-reduce" and status.detail.startswith("leading"):
                os.kill(status.pid, number)
                return name, status
        time.sleep(0.01)
    raise AssertionError(f"nobody leads a round past {after}:\n{up.text}")


def other(name: str) -> str:
    return next(one for one in VALIDATORS if one != name)


def assert_taken_over(up: Up, silent: str, round_number: int) -> Manifest:
    """The round has its epoch, by the validator that was left, and every miner holds the manifest's state."""
    manifest = up.wait_for_epoch(lambda m: m.round == round_number, f"of round {round_number}")
    assert (manifest.attempt, manifest.leader) == (1, up.hotkey(other(silent)))
    assert set(manifest.members) == {up.hotkey(name) for name in MINERS}
    for name in (*MINERS, other(silent)):
        path = up.folder / name / "states.jsonl"

        def held(path=path) -> list[str]:
            return [line["state_hash"] for line in read_lines(path) if line["epoch"] == manifest.epoch]

        until(held, f"epoch {manifest.epoch} at {name}", ROUND_S)
        assert held() == [manifest.state_hash]
    return manifest


def assert_back(up: Up, name: str, epoch: int) -> None:
    """It holds a state of that epoch, or of one after it, and the very one that was published."""
    path = up.folder / name / "states.jsonl"
    until(lambda: read_lines(path)[-1]["epoch"] >= epoch, f"{name} with epoch {epoch}", 2 * ROUND_S)
    last = read_lines(path)[-1]
    assert last["state_hash"] == next(m.state_hash for m in up.manifests() if m.epoch == last["epoch"])


def test_where_the_leader_is_killed_in_mid_round_the_other_validator_ends_the_epoch(up: Up) -> None:
    killed, status = signal_leader(up, signal.SIGKILL, after=-1)
    manifest = assert_taken_over(up, killed, status.round)
    assert_back(up, killed, manifest.epoch)
    assert up.status(killed).pid != status.pid


def test_a_leader_that_was_stopped_and_goes_on_after_another_has_led_loses_cleanly(up: Up) -> None:
    stopped, status = signal_leader(up, signal.SIGSTOP, after=up.manifests()[-1].round)
    try:
        manifest = assert_taken_over(up, stopped, status.round)
    finally:
        os.kill(status.pid, signal.SIGCONT)
    assert_back(up, stopped, manifest.epoch)
    assert up.status(stopped).pid == status.pid


def test_of_every_round_there_is_one_epoch_and_both_validators_pay(up: Up) -> None:
    manifests = up.manifests()
    rounds = [manifest.round for manifest in manifests]
    assert [manifest.epoch for manifest in manifests] == list(range(len(manifests)))
    assert rounds == sorted(set(rounds))

    def payers() -> set[int]:
        genesis = up.genesis
        with Chain(network="local", netuid=genesis["netuid"], chain_endpoint=genesis["chain_endpoint"]) as chain:
            return {uid for uid, row in chain.weights().items() if any(row.values())}

    until(lambda: len(payers()) == 2, "weights of both validators", ROUND_S)
