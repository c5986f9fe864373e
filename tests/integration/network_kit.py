"""A real run for tests of neurons: a hub, a genesis, and the commands that operators type."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.hub_fixture import HubProcess, free_port

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
