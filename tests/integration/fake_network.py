"""A network of small real processes that write what real ones would write: for tests of `hivetrain up`.

    python tests/integration/fake_network.py DIR SCENARIO [NUM_EPOCHS]

runs `up` on it. The chain process publishes an epoch every tenth of a second. SCENARIO: ``good``, or what goes
wrong: ``lazy`` (miner-2 is in no group), ``split`` (miner-2 computes another state), ``unpaid`` (no weights),
``stingy`` (none by the validator), ``flat`` (the loss stays), ``crash`` (miner-1 cannot run), ``sterile`` (no epoch is
ever published), ``genesis`` (genesis fails).
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console

from hivetrain.manifest import Manifest
from hivetrain.supervisor import ProcessSpec
from neurons import up as up_module
from neurons.plan import Plan, UpOptions
from neurons.report import Genesis, Score, StateLine, read_genesis, read_states

CHILD = r"""
import json, os, pathlib, subprocess, sys, time
role, name, folder, scenario = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4]

def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)

def load(path, default):
    return json.loads(path.read_text()) if path.exists() else default

print("hello from", name, flush=True)
if role == "genesis":
    if scenario == "genesis":
        print("the corpus is empty")
        sys.exit(4)
    wallets = [{"name": n, "hotkey_name": "default", "role": n.split("-")[0], "ss58": "key-" + n}
               for n in ("miner-1", "miner-2", "validator-1")]
    write(folder / "epochs.json", {"0": 7.0})
    write(folder / "genesis.json", {"run_id": "r", "netuid": 1, "chain_endpoint": "sqlite:///x",
                                    "hub_endpoint": "http://127.0.0.1:1", "block_time_s": 0.1, "wallets": wallets})
    sys.exit(0)
if role == "hub":
    write(folder / "hub.ready", True)
if role in ("miner", "validator"):
    if scenario == "crash" and name == "miner-1":
        print("out of memory")
        sys.exit(9)
    helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with open(folder / "pids", "a") as file:
        file.write(f"{os.getpid()} {helper.pid}\n")
    write(folder / "status" / f"{name}.json", {"name": name, "role": role, "pid": os.getpid(), "ready": True,
          "state": "training", "round": 3, "phase": "train", "step": 5, "num_steps": 10, "updated_at": time.time()})
while role == "chain":
    time.sleep(0.1)
    if scenario == "sterile":
        continue
    epochs = load(folder / "epochs.json", {})
    epoch = max(int(e) for e in epochs) + 1
    for miner in ("miner-1", "miner-2"):
        held = "b" if scenario == "split" and miner == "miner-2" else "a"
        (folder / miner).mkdir(exist_ok=True)
        with open(folder / miner / "states.jsonl", "a") as file:
            file.write(json.dumps({"epoch": epoch, "state_hash": held * 64, "source": "computed"}) + "\n")
    write(folder / "weights.json", {} if scenario == "unpaid" else {"key-miner-1": 0.5, "key-miner-2": 0.5})
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": time.time(), "name": "validator-1", "event": "published",
                               "text": f"epoch {epoch} is on the hub"}) + "\n")
    write(folder / "epochs.json", {**epochs, str(epoch): 7.0 if scenario == "flat" else 7.0 - 0.5 * epoch})
time.sleep(600)
"""


class FakeResults:
    def __init__(self, folder: Path, scenario: str) -> None:
        self._folder = folder
        self._scenario = scenario

    def epochs(self) -> list[int]:
        return sorted(int(epoch) for epoch in json.loads((self._folder / "epochs.json").read_text()))

    def manifest(self, epoch: int) -> Manifest:
        loss = json.loads((self._folder / "epochs.json").read_text())[str(epoch)]
        members = ("key-miner-1",) if self._scenario == "lazy" else ("key-miner-1", "key-miner-2")
        return Manifest(
            run_id="0" * 64,
            epoch=epoch,
            round=epoch,
            parent="",
            schema_hash="0" * 64,
            state_hash="a" * 64,
            files={},
            members=members,
            val_loss=loss,
            allreduce_seconds=0.25,
            allreduce_bytes=1000,
            block=epoch * 10,
            nonce="0123456789abcdef",
            leader="key-validator-1",
        )

    def weights(self) -> dict[str, float]:
        path = self._folder / "weights.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def payers(self) -> set[str]:
        return {"key-validator-1"} if self.weights() and self._scenario != "stingy" else set()

    def scores(self) -> dict[str, Score]:
        return {"key-miner-1": Score(gradient=1.0, steps=1.0, bandwidth=0.5, score=0.85)}

    def paid(self) -> dict[str, float]:
        return {"key-miner-1": 1.6, "key-miner-2": 0.4}

    def states(self, name: str) -> list[StateLine]:
        return read_states(self._folder / name / "states.jsonl")


def make_fake(scenario: str):
    """What `run_up` takes as ``make``."""

    def make(options: UpOptions, ports: dict[str, int]) -> Plan:
        folder = options.dir

        def spec(role: str, name: str, restart: bool = True, **kwargs: object) -> ProcessSpec:
            argv = [sys.executable, "-S", "-c", CHILD, role, name, str(folder), scenario]
            return ProcessSpec(
                name=name, argv=argv, log_path=folder / "logs" / f"{name}.log", restart=restart, **kwargs
            )

        def neurons(genesis: Genesis) -> list[ProcessSpec]:
            names = [m.name for m in genesis.wallets]
            ready = {name: (folder / "status" / f"{name}.json").exists for name in names}
            return [spec(name.split("-")[0], name, ready=ready[name]) for name in names]

        has_run = (folder / "genesis.json").exists()
        return Plan(
            services=(spec("hub", "hub", ready=(folder / "hub.ready").exists),),
            genesis=None if has_run else spec("genesis", "genesis", restart=False),
            read_genesis=lambda: read_genesis(folder),
            extras=(),
            neurons=neurons,
            producer=lambda genesis: spec("chain", "chain"),
            results=lambda genesis: FakeResults(folder, scenario),
            urls={"hub": f"http://127.0.0.1:{ports['hub']}"},
        )

    return make


def options(folder: Path, **changes: object) -> UpOptions:
    return UpOptions(dir=folder, num_miners=2, **changes)


def run_fake(scenario: str, chosen: UpOptions, *, terminal: bool = False, grace_s: float = 0.3) -> tuple[int, str]:
    """Run `up` in this process; its exit status and what it printed."""
    up_module.HUB_POLL_S, up_module.REDRAW_S, up_module.GRACE_S = 0.05, 0.05, grace_s
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=terminal)
    return up_module.run_up(chosen, console=console, make=make_fake(scenario)), text.getvalue()


def pids(folder: Path) -> list[int]:
    """The pids of every fake neuron and of its helper."""
    path = folder / "pids"
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


if __name__ == "__main__":
    up_module.HUB_POLL_S, up_module.REDRAW_S, up_module.GRACE_S = 0.05, 0.05, 0.3
    num_epochs = int(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.exit(up_module.run_up(options(Path(sys.argv[1]), num_epochs=num_epochs), make=make_fake(sys.argv[2])))
