"""A real run for tests of neurons: a hub, a genesis, and the commands that operators type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    """Wait for ``condition``.

    Raises:
        AssertionError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


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

    def start(self, role: str, flags: list[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """`python neurons/ROLE.py FLAGS`, its output piped together."""
        return subprocess.Popen(
            [sys.executable, str(REPOSITORY / "neurons" / f"{role}.py"), *flags],
            env={**os.environ, **QUIET, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self, role: str, flags: list[str], env: Mapping[str, str] | None = None, timeout_s: float = 90
    ) -> tuple[int, str]:
        """Run a neuron that is expected to end by itself; its exit status and output."""
        process = self.start(role, flags, env)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
            process.wait()
        return process.returncode, output


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
