"""Which processes `hivetrain up` runs, with which flags, in which folder and on which ports.

The folder belongs to one `up` at a time (`DirLock`). Ports are chosen free once and remembered in
``ports.json``: the hub's endpoint is written into the chain's records, so it has to stay the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hivetrain.errors import ConfigError
from hivetrain.ports import bind, bind_free
from hivetrain.run import GENESIS, Recipe, read_recipe
from hivetrain.supervisor import ProcessSpec
from neurons.report import Genesis, Member, Results

HOST = "127.0.0.1"
CHEAT_SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "attacks" / "miner.py"
"""A miner that cheats: beside this package in a checkout, and in no wheel."""
MARKER = "hivetrain.dir"
"""A file in every folder that `up` made: `--fresh` deletes no other folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What the user asked for; see `hivetrain up --help`."""

    dir: Path
    num_miners: int = 3
    num_validators: int = 1
    num_epochs: int | None = None
    fresh: bool = False
    json_path: Path | None = None
    port_base: int | None = None
    dashboard: bool = True
    tracker: Literal["trackio", "wandb", "none"] = "trackio"
    block_time_s: float | None = None
    recipe: Path | None = None
    device: str = "auto"
    min_loss_drop: float = 0.0
    timeout_s: float | None = None
    attack: str = ""  # a cheat of bench/attacks; the last miner runs it

    def __post_init__(self) -> None:
        if not 1 <= self.num_miners <= 64:
            raise ConfigError(f"--miners must be in 1..64, got {self.num_miners}")
        if not 1 <= self.num_validators <= 16:
            raise ConfigError(f"--validators must be in 1..16, got {self.num_validators}")
        if self.num_epochs is not None and self.num_epochs < 1:
            raise ConfigError(f"--epochs must be at least 1, got {self.num_epochs}")
        if self.port_base is not None and not 1024 <= self.port_base <= 65000:
            raise ConfigError(f"--port-base must be in 1024..65000, got {self.port_base}")
        if self.block_time_s is not None and not 0.01 <= self.block_time_s <= 60:
            raise ConfigError(f"--block-time must be in 0.01..60 seconds, got {self.block_time_s}")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError(f"--timeout must be > 0 seconds, got {self.timeout_s}")
        if self.json_path is not None and not self.json_path.absolute().parent.is_dir():
            raise ConfigError(f"--json: no folder {self.json_path.absolute().parent}")
        if self.recipe is not None and not self.recipe.is_file():
            raise ConfigError(f"--recipe: no file {self.recipe}")
        if self.attack and self.num_miners < 2:
            raise ConfigError(
                f"--attack needs honest miners beside the cheat: --miners of at least 2, got {self.num_miners}"
            )

    @property
    def deadline_s(self) -> float | None:
        """Seconds after which `up` stops by itself; None: never."""
        if self.timeout_s is not None or self.num_epochs is None:
            return self.timeout_s
        return max(900.0, 600.0 * self.num_epochs)

    @property
    def cheat_name(self) -> str:
        """The miner that cheats, "" where none does."""
        return f"miner-{self.num_miners}" if self.attack else ""

    @property
    def neuron_names(self) -> list[str]:
        """miner-1, ..., validator-1, ..."""
        miners = [f"miner-{i}" for i in range(1, self.num_miners + 1)]
        return miners + [f"validator-{i}" for i in range(1, self.num_validators + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The processes in their start order; those after genesis depend on what it made."""

    services: tuple[ProcessSpec, ...]  # up and ready before genesis: the hub
    genesis: ProcessSpec | None  # None: it has run before
    read_genesis: Callable[[], Genesis]
    extras: tuple[ProcessSpec, ...]  # nice to have: the dashboard
    neurons: Callable[[Genesis], list[ProcessSpec]]
    producer: Callable[[Genesis], ProcessSpec]
    results: Callable[[Genesis], Results]
    urls: Mapping[str, str]


class DirLock:
    """Holds a folder for one `up`; the lock file holds its pid, for `hivetrain down`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "up.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the folder, which is made if it does not exist.

        Raises:
            ConfigError: another `up` holds it, or it cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as exc:
            raise ConfigError(f"--dir: cannot write {self._path.parent}: {exc.strerror}") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            folder, pid = self._path.parent, holder_pid(self._path.parent)
            raise ConfigError(
                f"another `hivetrain up` (pid {pid or 'unknown'}) runs in {folder}; "
                f"stop it with `hivetrain down --dir {folder}`, or choose another --dir"
            ) from None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the folder back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder_pid(folder: Path) -> int | None:
    """The pid of the `up` that holds ``folder`` now, or None."""
    try:
        descriptor = os.open(folder / "up.lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(ValueError):
            return int(os.read(descriptor, 32))
        return None
    finally:
        os.close(descriptor)
    return None


def prepare_dir(folder: Path, fresh: bool) -> None:
    """Mark ``folder`` as ours, emptied first if ``fresh``. Its lock must be held.

    Raises:
        ConfigError: it holds files of somebody else.
    """
    entries = [entry for entry in folder.iterdir() if entry.name != "up.lock"]
    if entries and not (folder / MARKER).exists():
        raise ConfigError(f"--dir: {folder} holds other files ({entries[0].name}); choose an empty or new folder")
    if fresh:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    elif not (folder / "genesis.json").exists():
        # Genesis was cut short: a half-made chain or hub helps nobody; ports and logs may stay.
        for entry in entries:
            if entry.is_dir() and entry.name != "logs":
                shutil.rmtree(entry)
            elif entry.name.startswith("chain.db"):
                entry.unlink()
    (folder / MARKER).write_text("A folder of `hivetrain up`; --fresh empties it.\n")
    shutil.rmtree(folder / "status", ignore_errors=True)  # of neurons that no longer run


def choose_ports(folder: Path, names: list[str], base: int | None) -> dict[str, int]:
    """A port per name: those remembered in ``ports.json``, else ``base`` and up, else free ones.

    Raises:
        ConfigError: the hub's remembered port, or one from ``base``, is taken.
    """
    path = folder / "ports.json"
    ports: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        ports = {str(name): int(port) for name, port in json.loads(path.read_text()).items()}
    with contextlib.ExitStack() as held:  # bound until all are chosen, so that no two get the same
        for offset, name in enumerate(names):
            if name in ports and _bind(ports[name], held):
                continue
            if name in ports and name == "hub":
                raise ConfigError(
                    f"port {ports[name]} of this folder's hub is in use by another program; stop that program, or "
                    f"start a new run in another --dir (or with --fresh, which deletes {folder})"
                )
            if base is None:
                ports[name] = int(held.enter_context(bind_free()).getsockname()[1])
            elif _bind(base + offset, held):
                ports[name] = base + offset
            else:
                raise ConfigError(f"port {base + offset} ({name}) is in use; choose another --port-base")
    path.write_text(json.dumps(ports, indent=1) + "\n")
    return ports


def _bind(port: int, held: contextlib.ExitStack) -> bool:
    try:
        held.enter_context(bind(port))
    except OSError:
        return False
    return True


def serves_http(url: str) -> bool:
    """Whether a GET of ``url`` gives status 200; never through a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def child_env(options: UpOptions) -> dict[str, str]:
    """What every child gets on top of our environment: no token of the user's, nothing written outside the folder."""
    threads = str(_threads(options))
    return {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(options.dir / "cache" / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_TOKEN": "",
        "HIVETRAIN_HUB_TOKEN": "",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def check_attack(name: str) -> None:
    """Check that there is a cheat of that name.

    Raises:
        ConfigError: there is none, or this is no checkout; says which there are.
    """
    if not CHEAT_SCRIPT.is_file():
        raise ConfigError(f"--attack runs only from a checkout of the repository: there is no {CHEAT_SCRIPT}")
    listed = subprocess.run([sys.executable, "-P", str(CHEAT_SCRIPT), "--names"], capture_output=True, text=True)
    if listed.returncode != 0:
        raise ConfigError(f"--attack: {CHEAT_SCRIPT} --names failed: {listed.stderr.strip()[-500:]}")
    known = [line.split("\t")[0] for line in listed.stdout.splitlines()]
    if name not in known:
        raise ConfigError(f"--attack: no attack {name!r}; there are: {', '.join(known)}")


def local_recipe(path: Path) -> Recipe:
    """The recipe of a run that genesis makes on this machine.

    Raises:
        ConfigError: unreadable, impossible, or it names a model of a hub.
    """
    try:
        recipe = read_recipe(path)
    except ConfigError as exc:
        raise ConfigError(f"--recipe {path}: {exc}") from exc
    for section, name in (("model", recipe.model.name), ("tokenizer", recipe.tokenizer.name)):
        if name != GENESIS:
            raise ConfigError(f'--recipe {path}: {section}.name must be "{GENESIS}" for a local run, got {name!r}')
    return recipe


def _threads(options: UpOptions) -> int:
    return max(1, (os.cpu_count() or 1) // options.num_miners)


def make_plan(options: UpOptions, ports: Mapping[str, int]) -> Plan:
    """The real network."""
    from hivetrain.tracking.status import read_status
    from neurons.report import LiveResults, read_genesis

    folder, env = options.dir, child_env(options)
    hub_url = f"http://{HOST}:{ports['hub']}"

    def spec(name: str, *arguments: str, ready: Callable[[], bool] | None = None, restart: bool = True) -> ProcessSpec:
        log_path = folder / "logs" / f"{name}.log"
        argv = [sys.executable, "-P", *arguments]
        return ProcessSpec(name=name, argv=argv, env=env, log_path=log_path, ready=ready, restart=restart)

    def neuron(member: Member, genesis: Genesis) -> ProcessSpec:
        script = str(Path(__file__).with_name(f"{member.role}.py"))
        flags = neuron_flags(options, member, genesis, axon_port=ports[member.name])
        if member.name == options.cheat_name:
            script, flags = str(CHEAT_SCRIPT), ["--attack", options.attack, *flags]
        status = folder / "status" / f"{member.name}.json"
        return spec(member.name, script, *flags, ready=lambda: (s := read_status(status)) is not None and s.ready)

    def neurons(genesis: Genesis) -> list[ProcessSpec]:
        return [neuron(member, genesis) for member in started_members(options, genesis)]

    def producer(genesis: Genesis) -> ProcessSpec:
        database = genesis.chain_endpoint.removeprefix("sqlite://")
        flags = ["--db", database, "--block-time", str(genesis.block_time_s)]
        return spec("chain", "-m", "template.chain.producer", *flags)

    hub_flags = ["--dir", str(folder / "hub"), "--host", HOST, "--port", str(ports["hub"])]
    hub = spec("hub", "-m", "hivetrain.hub.server", *hub_flags, ready=lambda: serves_http(f"{hub_url}/health"))
    genesis_flags = ["--dir", str(folder), "--hub.endpoint", hub_url]
    genesis_flags += ["--miners", str(options.num_miners), "--validators", str(options.num_validators)]
    if options.block_time_s is not None:
        genesis_flags += ["--block-time", str(options.block_time_s)]
    if options.recipe is not None:
        genesis_flags += ["--recipe", str(options.recipe)]
    urls, extras = {"hub": hub_url}, []
    if options.dashboard and options.tracker == "trackio":
        flags = ["--dir", str(folder / "trackio"), "--host", HOST, "--port", str(ports["dashboard"])]
        extras.append(spec("dashboard", "-m", "hivetrain.tracking.dashboard", *flags))
        urls["dashboard"] = f"http://{HOST}:{ports['dashboard']}"
    has_run = (folder / "genesis.json").exists()
    return Plan(
        services=(hub,),
        genesis=None if has_run else spec("genesis", "-m", "neurons.genesis", *genesis_flags, restart=False),
        read_genesis=lambda: read_genesis(folder),
        extras=tuple(extras),
        neurons=neurons,
        producer=producer,
        results=lambda genesis: LiveResults(folder, genesis),
        urls=urls,
    )


def started_members(options: UpOptions, genesis: Genesis) -> list[Member]:
    """The wallets of the neurons that are started, in the order of their names.

    Raises:
        ConfigError: genesis made fewer than are asked for.
    """
    by_name = {member.name: member for member in genesis.wallets}
    missing = [name for name in options.neuron_names if name not in by_name]
    if missing:
        raise ConfigError(
            f"{options.dir} was made for {len(by_name)} neurons and has no wallet {missing[0]}; "
            "ask for fewer --miners and --validators, or start with --fresh"
        )
    return [by_name[name] for name in options.neuron_names]


def neuron_flags(options: UpOptions, member: Member, genesis: Genesis, *, axon_port: int) -> list[str]:
    """The flags of one neuron: the same that an operator would give."""
    flags: dict[str, object] = {
        "netuid": genesis.netuid,
        "wallet.name": member.name,
        "wallet.hotkey": member.hotkey_name,
        "wallet.path": options.dir / "wallets",
        "subtensor.network": "local",
        "subtensor.chain_endpoint": genesis.chain_endpoint,
        "axon.ip": HOST,
        "axon.port": axon_port,
        "axon.external_ip": HOST,
        "neuron.name": member.name,
        "neuron.dir": options.dir / member.name,
        "neuron.run_dir": options.dir,
        "neuron.device": options.device,
        "neuron.threads": _threads(options),
        "neuron.epoch_length": 1,
        "hub.endpoint": genesis.hub_endpoint,
        "dht.host_maddrs": f"/ip4/{HOST}/tcp/0",
        "tracker.kind": options.tracker,
        "tracker.dir": options.dir,
        "tracker.wandb_mode": "online" if os.environ.get("WANDB_API_KEY") else "offline",
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]
