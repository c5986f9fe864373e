"""What goes wrong when a neuron starts, in real processes against a real run: one clear line that says how to mend it.

The cases run side by side, for a neuron takes seconds to import what it needs; the tests read what each has said.
"""

from __future__ import annotations

import concurrent.futures
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from network_kit import QUIET, REPOSITORY, PreparedRun, prepare_run

from hivetrain.hub.client import HubStore
from template.chain.keys import WalletIdentity, load_wallet
from template.validator.publish import file_entries, sign_manifest
from tests.hub_fixture import running_hub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

AT_ONCE = 3
SKEWED = """\
import time
real_s, real_ns = time.time, time.time_ns
time.time = lambda: real_s() + 60
time.time_ns = lambda: real_ns() + 60 * 10**9
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One mistake: the flags that differ from good ones, and what must be said.

    Attributes:
        changed: see `PreparedRun.flags`; FOLDER in a value is the run's folder.
        status: of the exit; 2 where nothing but another setting can help.
        words: in the one line of level ERROR.
        max_file_kb: the largest file that the system lets the process write: what a full disk looks like to it.
    """

    changed: dict[str, object] = field(default_factory=dict)
    status: int
    words: tuple[str, ...]
    max_file_kb: int = 0


CASES = {
    "a wallet that does not exist": Case(
        changed={"wallet__name": "nobody"},
        status=2,
        words=("no coldkey at", "--wallet.path", "btcli wallet new-coldkey"),
    ),
    "a hotkey that does not exist": Case(
        changed={"wallet__hotkey": "other"}, status=2, words=("no hotkey at", "btcli wallet new-hotkey")
    ),
    "a hotkey that is not registered": Case(
        changed={"wallet__name": "stranger"},
        status=2,
        words=("is not registered on subnet 1", "hivetrain register stranger", "btcli subnets register --netuid 1"),
    ),
    "another subnet": Case(changed={"netuid": 7}, status=2, words=("has no subnet 7", "check --netuid")),
    "a chain that is not there": Case(
        changed={"subtensor__chain_endpoint": "sqlite://FOLDER/nowhere.db"},
        status=1,
        words=("no chain at", "nowhere.db", "hivetrain up"),
    ),
    "a chain that is some other file": Case(
        changed={"subtensor__chain_endpoint": "sqlite://FOLDER/text.db"},
        status=1,
        words=("text.db is not a local chain",),
    ),
    "a chain endpoint that does not answer": Case(
        changed={"subtensor__network": "ws://127.0.0.1:9", "subtensor__chain_endpoint": ""},
        status=1,
        words=("ws://127.0.0.1:9", "cannot be reached", "check --subtensor.network"),
    ),
    "a hub that does not answer": Case(
        changed={"hub__endpoint": "http://127.0.0.1:9"},
        status=1,
        words=("Connection refused", "check --hub.endpoint http://127.0.0.1:9"),
    ),
    "a repository that does not exist": Case(
        changed={"hub__repo": "nobody/nothing"}, status=1, words=("no epoch 0", "--hub.endpoint", "--hub.repo")
    ),
    "a recipe that somebody changed on the hub": Case(
        changed={"hub__repo": "mallory/model"},
        status=1,
        words=("hash to run", "on chain is", "the hub was tampered with, or --hub.repo is another run's"),
    ),
    "a port that is in use": Case(
        changed={"axon__port": "BUSY"}, status=2, words=("is in use", "set --axon.port to a free port")
    ),
    "a device that is not there": Case(
        changed={"neuron__device": "cuda:7"}, status=2, words=("--neuron.device cuda:7", "use cpu")
    ),
    "a state folder that is a file": Case(
        changed={"neuron__dir": "FOLDER/text.db/state"}, status=2, words=("cannot write", "Not a directory")
    ),
    "a disk that takes no more": Case(
        changed={"hub__cache": "FOLDER/full"}, max_file_kb=200, status=1, words=("cannot write", "File too large")
    ),
    "an address for the swarm that is none of this machine's": Case(
        changed={"dht__host_maddrs": "/ip4/203.0.113.7/tcp/0"},
        status=1,
        words=("cannot join the swarm", "/ip4/203.0.113.7/tcp/0"),
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedRun]:
    """A run at its genesis, a wallet too many, a forged copy of the run beside it, and a file that is no chain."""
    folder = tmp_path_factory.mktemp("run")
    with running_hub(folder / "hub") as hub:
        prepared = prepare_run(folder, hub)
        load_wallet("stranger", "default", folder / "wallets", create=True)
        (folder / "text.db").write_text("not a database\n" * 500)
        forge(prepared)
        yield prepared


def forge(run: PreparedRun) -> None:
    """The run's epoch 0 with another learning rate, well signed, in another repository."""
    store = HubStore(endpoint=run.hub.url, repo=run.genesis["hub_repo"])
    genesis = store.resolve(0)
    assert genesis is not None
    files = {name: store.read(genesis, name) for name in genesis.manifest.files}
    files["run.toml"] = files["run.toml"].replace(b"warmup_steps = ", b"warmup_steps = 1")
    leader = WalletIdentity(load_wallet("validator-1", "default", run.folder / "wallets"))
    changed = {"files": file_entries(files), "nonce": secrets.token_hex(16)}
    manifest = sign_manifest(genesis.manifest.model_copy(update=changed), leader)
    HubStore(endpoint=run.hub.url, repo="mallory/model").publish(manifest, files)


@pytest.fixture(scope="module")
def endings(run: PreparedRun) -> Iterator[dict[str, concurrent.futures.Future[tuple[int, str]]]]:
    """Exit status and words of every case, as they come."""
    with socket.create_server(("127.0.0.1", 0)) as busy, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:

        def ending(name: str) -> tuple[int, str]:
            case = CASES[name]
            places = {"FOLDER": str(run.folder), "BUSY": str(busy.getsockname()[1])}
            changed = dict(case.changed) | {"neuron__dir": case.changed.get("neuron__dir", f"FOLDER/{name}")}
            for place, real in places.items():
                changed = {key: str(value).replace(place, real) for key, value in changed.items()}
            neuron = run.start("miner", run.flags(**changed), max_file_kb=case.max_file_kb)
            try:
                return neuron.wait(150), neuron.text
            finally:
                neuron.close()

        # The one that waits longest goes first.
        order = sorted(CASES, key=lambda name: name != "a hub that does not answer")
        yield {name: pool.submit(ending, name) for name in order}


@pytest.mark.parametrize("name", CASES)
def test_a_miner_that_cannot_start_says_why_in_one_line(
    name: str, endings: dict[str, concurrent.futures.Future[tuple[int, str]]]
) -> None:
    case = CASES[name]
    status, text = endings[name].result()
    assert status == case.status, text
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if " ERROR " in line or line.startswith("error: ")]
    assert len(errors) == 1, text
    for words in case.words:
        assert words in errors[0], text


def test_a_hub_that_comes_up_late_is_waited_for(run: PreparedRun) -> None:
    run.hub.close()
    neuron = run.start("miner", run.flags(neuron__dir=run.folder / "patient"))
    try:
        neuron.wait_for("waiting: ", 60)
        run.hub.start()
        neuron.wait_for("trainable parameters", 90)
        neuron.process.terminate()
        assert neuron.wait(30) == 0
    finally:
        neuron.close()
        run.hub.close()
        run.hub.start()


@pytest.mark.parametrize("role", ["miner", "validator"])
def test_a_clock_that_is_off_is_noticed_at_the_start(run: PreparedRun, role: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SKEWED)
    flags = run.flags(f"{role}-1", neuron__dir=tmp_path / role)
    neuron = run.start(role, flags, env={"PYTHONPATH": str(tmp_path)})
    try:
        neuron.wait_for("check your clock: +6", 90)
        assert "synchronise this machine's clock (NTP)" in neuron.text
    finally:
        neuron.close()


def test_doctor_compares_clocks_with_the_hub(run: PreparedRun, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SKEWED)
    done = cli("doctor", "--hub.endpoint", run.hub.url, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "fail  clock" in done.stdout
    assert "synchronise this machine's clock" in done.stdout


def test_ctrl_c_in_a_terminal_ends_a_miner_quietly(run: PreparedRun) -> None:
    neuron = run.start("miner", run.flags(neuron__dir=run.folder / "interrupted"))
    try:
        neuron.wait_for("trainable parameters", 90)
        os.killpg(neuron.process.pid, 2)  # a terminal signals the whole group, p2pd included
        assert neuron.wait(20) == 0
        assert "Traceback" not in neuron.text
    finally:
        neuron.close()


def test_a_hub_that_wants_a_token_is_named_with_the_variable_to_set(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub", token="secret-of-the-hub") as hub:
        done = subprocess.run(
            [sys.executable, "-m", "neurons.genesis", "--dir", str(tmp_path), "--hub.endpoint", hub.url],
            cwd=REPOSITORY,
            env={**os.environ, **QUIET},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert "the hub wants a valid write token" in said
    assert "HIVETRAIN_HUB_TOKEN" in said
    assert "secret-of-the-hub" not in said


def cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """One `hivetrain` command."""
    return subprocess.run(
        [sys.executable, "-m", "neurons.cli", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **QUIET, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )
