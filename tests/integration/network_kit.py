"""A real run for tests of neurons: a hub, a genesis, and the commands that operators type."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hivetrain.hub.client import HubStore
from hivetrain.manifest import Manifest, Ref
from hivetrain.ports import free_port
from hivetrain.tracking.status import NeuronStatus, read_status
from template.chain.client import Chain
from template.chain.keys import verify
from tests.hub_fixture import HubProcess

REPOSITORY = Path(__file__).resolve().parents[2]

SMALL_RECIPE = """\
name = "small"
[inner]
max_steps = 20
snapshot_every = 5
"""

QUIET = {  # nothing leaves this machine, and one thread per process
    "HF_TOKEN": "",
    "HIVETRAIN_HUB_TOKEN": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def until(condition: Callable[[], object], what: str, timeout_s: float, poll_s: float = 0.1) -> None:
    """Wait for ``condition``.

    Raises:
        AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(poll_s)


def hivetrain(*arguments: str) -> str:
    """What a `hivetrain` command prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "neurons.cli", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chain_weights(genesis: dict[str, Any]) -> dict[str, float]:
    """Weight that the first validator with weights on chain gives each hotkey."""
    with Chain(network="local", netuid=genesis["netuid"], chain_endpoint=genesis["chain_endpoint"]) as chain:
        neurons, rows = chain.metagraph().neurons, list(chain.weights().values())
    return {neuron.hotkey: rows[0].get(neuron.uid, 0.0) for neuron in neurons} if rows else {}


def assert_whole(store: HubStore, dest: Path) -> list[Ref]:
    """Every published epoch: parents are in order, the leader signed, and each file has the manifest's digest."""
    refs = [ref for epoch in store.epochs() if (ref := store.resolve(epoch)) is not None]
    assert [ref.epoch for ref in refs] == list(range(len(refs)))
    for parent, ref in zip([None, *refs[:-1]], refs, strict=True):
        manifest = ref.manifest
        assert manifest.parent == (parent.manifest_sha256 if parent is not None else "")
        assert verify(manifest.leader, manifest.signed_bytes(), bytes.fromhex(manifest.leader_signature))
        for name, path in store.fetch(ref, manifest.files, dest / str(ref.epoch)).items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest.files[name].sha256
    return refs


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every live process that names ``folder`` on its command line, and all that such a process has started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            # Down to folders inside it, but not to one that only begins with the same letters.
            named = any(f"{folder}" in part for part in process.cmdline())
            if named and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found |= {one.pid: one for one in [process, *process.children(recursive=True)]}
        except psutil.Error:
            continue
    return list(found.values())


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run (a pid that was given away since does not count)."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@dataclass(frozen=True)
class NeuronProcess:
    """A neuron's process and what it says."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        """All that it has said so far."""
        return self.output.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; the exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_s:.0f} s; it said:\n{self.text}") from None

    def wait_for(self, words: str, timeout_s: float) -> None:
        """Wait until it has said ``words``."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            assert self.process.poll() is None, f"ended without {words!r}; it said:\n{self.text}"
            assert time.monotonic() < deadline, f"no {words!r} within {timeout_s:.0f} s; it said:\n{self.text}"
            time.sleep(0.1)

    def close(self) -> None:
        """SIGTERM, then SIGKILL for what is left of its session."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class PreparedRun:
    """A hub that serves a run whose genesis is done; its chain stands still, for no producer runs."""

    folder: Path
    hub: HubProcess
    genesis: Mapping[str, Any]

    def flags(self, name: str = "miner-1", **changed: object) -> list[str]:
        """An operator's flags for the neuron ``name``; ``hub__endpoint="..."`` changes ``--hub.endpoint``."""
        flags: dict[str, object] = {
            "netuid": self.genesis["netuid"],
            "wallet.name": name,
            "wallet.path": self.folder / "wallets",
            "subtensor.network": "local",
            "subtensor.chain_endpoint": self.genesis["chain_endpoint"],
            "axon.ip": "127.0.0.1",
            "axon.port": free_port(),
            "neuron.name": name,
            "neuron.dir": self.folder / name,
            "neuron.device": "cpu",
            "neuron.threads": 1,
            "hub.endpoint": self.hub.url,
            "dht.host_maddrs": "/ip4/127.0.0.1/tcp/0",
            "tracker.kind": "none",
        }
        flags |= {key.replace("__", "."): value for key, value in changed.items()}
        return [part for key, value in flags.items() for part in (f"--{key}", str(value))]

    def start(
        self, role: str, flags: list[str], env: Mapping[str, str] | None = None, max_file_kb: int = 0
    ) -> NeuronProcess:
        """`python neurons/ROLE.py FLAGS`, unable to write a file past ``max_file_kb`` if that is above 0."""
        limit = ["bash", "-c", f'ulimit -f {max_file_kb} && exec "$@"', "limit"] if max_file_kb else []
        output = Path(tempfile.mkstemp(dir=self.folder, suffix=".out")[1])
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*limit, sys.executable, str(REPOSITORY / "neurons" / f"{role}.py"), *flags],
                env={**os.environ, **QUIET, **(env or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return NeuronProcess(process=process, output=output)


ROUND_S = 150.0
"""Longest wait for one round of the small recipe, on a machine that is busy with other things."""


@dataclass
class Up:
    """A `hivetrain up` that runs, and the folder that it runs in."""

    folder: Path
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def genesis(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "genesis.json").read_text()))

    def hotkey(self, name: str) -> str:
        return next(str(member["ss58"]) for member in self.genesis["wallets"] if member["name"] == name)

    def status(self, name: str) -> NeuronStatus:
        found = read_status(self.folder / "status" / f"{name}.json")
        assert found is not None, f"{name} has no status"
        return found

    def store(self) -> HubStore:
        return HubStore(endpoint=self.genesis["hub_endpoint"], repo=self.genesis["hub_repo"])

    def manifests(self) -> list[Manifest]:
        store = self.store()
        refs = [store.resolve(epoch) for epoch in store.epochs()]
        return [ref.manifest for ref in refs if ref is not None]

    def wait_for_epoch(self, wanted: Callable[[Manifest], bool], what: str, timeout_s: float = ROUND_S) -> Manifest:
        """Wait for a published epoch that is ``wanted``."""
        deadline = time.monotonic() + timeout_s
        while True:
            manifests = self.manifests()
            for manifest in manifests:
                if wanted(manifest):
                    return manifest
            shown = [(m.epoch, m.round, len(m.members)) for m in manifests]
            assert self.process.poll() is None, f"`up` ended:\n{self.text}"
            assert time.monotonic() < deadline, f"no epoch {what}; (epoch, round, members): {shown}\n{self.text}"
            time.sleep(0.5)

    def wait_for_text(self, words: str, timeout_s: float) -> None:
        until(lambda: words in self.text or self.process.poll() is not None, f"{words!r} in:\n{self.text}", timeout_s)
        assert words in self.text, self.text

    def kill_in(self, name: str, is_time: Callable[[NeuronStatus], bool]) -> NeuronStatus:
        """SIGKILL the neuron ``name`` as soon as its status says that it is time; the status of that moment."""
        status = self.status(name)
        deadline = time.monotonic() + ROUND_S
        while not is_time(status):
            assert time.monotonic() < deadline, f"{name} never came there: {status}"
            time.sleep(0.02)
            status = self.status(name)
        os.kill(status.pid, signal.SIGKILL)
        return status


@contextlib.contextmanager
def running_up(folder: Path, *arguments: str) -> Iterator[Up]:
    """`hivetrain up --dir FOLDER ARGUMENTS`, killed at the end if it still runs."""
    output = Path(tempfile.mkstemp(dir=folder.parent, suffix=".out")[1])
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "neurons.cli", "up", "--dir", str(folder), *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **QUIET},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Up(folder=folder, process=process, output=output)
    finally:
        process.kill()
        process.wait()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepare_run(folder: Path, hub: HubProcess, recipe: str = SMALL_RECIPE, *, miners: int = 1) -> PreparedRun:
    """Genesis against ``hub``, as `hivetrain up` does it."""
    (folder / "recipe.toml").write_text(recipe)
    command = [sys.executable, "-m", "neurons.genesis", "--dir", str(folder), "--hub.endpoint", hub.url]
    command += ["--miners", str(miners), "--recipe", str(folder / "recipe.toml"), "--block-time", "0.5"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **QUIET}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return PreparedRun(folder=folder, hub=hub, genesis=json.loads((folder / "genesis.json").read_text()))
