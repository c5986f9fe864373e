"""One settings model for every neuron: the dotted flags that Bittensor operators expect.

A value comes from the command line, else from the environment (``HIVETRAIN_WALLET__NAME``, and the ``BT_*``
names that btcli reads), else from the TOML file of ``--config``, else from the default; `sources` says from
which. It is parsed once in `main`, is frozen, and is passed down. Secrets are no settings: they come from the
environment only, through `read_secrets`, and no representation shows them.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import logging.handlers
import os
import sys
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from hivetrain.errors import ConfigError

Role = Literal["miner", "validator"]

ENV_PREFIX = "HIVETRAIN_"
ENV_ALIASES = {"BT_NETWORK": "subtensor.network", "BT_WALLET": "wallet.name", "BT_WALLET_HOTKEY": "wallet.hotkey"}
FLAG_ALIASES = {  # btcli's short flags and wandb's names in the subnet template
    "-n": "--subtensor.network",
    "--network": "--subtensor.network",
    "-w": "--wallet.name",
    "--wallet": "--wallet.name",
    "-H": "--wallet.hotkey",
    "--wallet-hotkey": "--wallet.hotkey",
    "--wandb.project_name": "--tracker.project",
    "--wandb.entity": "--tracker.entity",
}
SWITCH_ALIASES = {
    "--wandb.off": ("--tracker.kind", "none"),
    "--wandb.on": ("--tracker.kind", "wandb"),
    "--wandb.offline": ("--tracker.kind", "wandb", "--tracker.wandb_mode", "offline"),
}

Port = Annotated[int, Field(ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WalletConfig(_Section):
    """Who this neuron is."""

    name: str = Field(default="default", min_length=1, description="name of the wallet (coldkey)")
    hotkey: str = Field(default="default", min_length=1, description="name of the hotkey that signs for this neuron")
    path: Path = Field(default=Path("~/.bittensor/wallets"), description="folder that holds the wallets")


class SubtensorConfig(_Section):
    """Which chain."""

    network: str = Field(default="finney", min_length=1, description="finney, test, local, or a ws:// endpoint")
    chain_endpoint: str = Field(
        default="", description="overrides the network's own: ws://..., or sqlite:///ABSOLUTE/PATH when local"
    )


class AxonConfig(_Section):
    """The HTTP server that answers synapses."""

    port: Port = Field(default=8091, description="port to listen on")
    ip: str = Field(default="0.0.0.0", description="address to listen on")
    external_ip: str = Field(default="", description="address that the chain announces; empty: found out")
    external_port: int = Field(default=0, ge=0, le=65535, description="port that the chain announces; 0: --axon.port")


class NeuronSection(_Section):
    """How this neuron runs."""

    name: str = Field(
        default="", pattern=r"^[A-Za-z0-9._-]*$", description="name in logs and status; empty: the role's"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda|cuda:\d+)$", description="auto, cpu, cuda or cuda:N")
    dir: Path | None = Field(
        default=None, description="folder of this neuron's state; unset: ~/.hivetrain/WALLET/HOTKEY/netuidN/NAME"
    )
    run_dir: Path | None = Field(
        default=None,
        description="folder shared by the neurons of this machine (status/, events.jsonl); unset: --neuron.dir",
    )
    recipe: Path | None = Field(
        default=None, description="run.toml that you agreed to; the neuron refuses a run whose recipe differs"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads for PyTorch; 0: its own choice")
    timeout: float = Field(default=12.0, gt=0, le=3600, description="seconds to wait for the answer to a synapse")
    moving_average_alpha: float | None = Field(
        default=None, gt=0, le=1, description="weight of the newest score in its moving average; unset: the recipe's"
    )
    disable_set_weights: bool = Field(default=False, description="validate without setting weights on chain")
    axon_off: bool = Field(default=False, description="serve no axon (validators only)")
    epoch_length: int = Field(default=100, ge=1, description="blocks between two settings of weights")
    sample_size: int = Field(default=0, ge=0, description="miners that are checked in a round; 0: the recipe's share")
    vpermit_tao_limit: float = Field(default=4096.0, ge=0, description="stake from which a permit holder is no miner")


class BlacklistConfig(_Section):
    """Whom the axon answers."""

    force_validator_permit: bool = Field(default=True, description="answer only hotkeys that hold a validator permit")
    allow_non_registered: bool = Field(
        default=False, description="answer hotkeys that are not registered on the subnet"
    )
    min_stake: float = Field(default=0.0, ge=0, description="stake that a caller must hold, in TAO")


class HubConfig(_Section):
    """Where the model is published. The token comes from HF_TOKEN or HIVETRAIN_HUB_TOKEN."""

    endpoint: str = Field(
        default="", pattern=r"^(https?://\S+)?$", description="URL of the hub; empty: the Hugging Face Hub"
    )
    repo: str = Field(
        default="", pattern=r"^([\w.-]+/[\w.-]+)?$", description="OWNER/NAME of the model; empty: the recipe's"
    )
    cache: Path | None = Field(default=None, description="folder of downloads; unset: cache/ in the neuron's folder")


class DhtConfig(_Section):
    """The peer-to-peer layer of the all-reduce (libp2p multiaddresses, repeated or separated by commas)."""

    host_maddrs: tuple[str, ...] = Field(default=("/ip4/0.0.0.0/tcp/0",), description="addresses to listen on")
    announce_maddrs: tuple[str, ...] = Field(
        default=(), description="addresses to announce instead of those listened on"
    )
    initial_peers: tuple[str, ...] = Field(default=(), description="peers to join; empty: those announced on chain")
    client_mode: bool = Field(default=False, description="connect outwards only, as behind a NAT")
    identity_path: Path | None = Field(
        default=None, description="file of the libp2p key; unset: in the neuron's folder"
    )

    @field_validator("host_maddrs", "announce_maddrs", "initial_peers")
    @classmethod
    def _are_maddrs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for maddr in value:
            if not maddr.startswith("/"):
                raise ValueError(f"{maddr!r} is no multiaddress such as /ip4/0.0.0.0/tcp/31337")
        return value


class TrackerConfig(_Section):
    """Where metrics go. The wandb key comes from WANDB_API_KEY."""

    kind: Literal["trackio", "wandb", "none"] = Field(default="trackio", description="trackio, wandb or none")
    project: str = Field(default="hivetrain", min_length=1, description="project under which the runs are grouped")
    entity: str = Field(default="", description="wandb: the account or team")
    dir: Path | None = Field(
        default=None, description="folder of the tracker's files; unset: tracker/ in the neuron's folder"
    )
    wandb_mode: Literal["online", "offline"] = Field(default="online", description="wandb: online or offline")


class LoggingConfig(_Section):
    """What is logged, and where."""

    debug: bool = Field(default=False, description="log each step of our own code")
    trace: bool = Field(default=False, description="log everything, libraries included")
    logging_dir: Path | None = Field(
        default=None, description="folder of the log file; unset: logs/ in the neuron's folder"
    )


class NeuronConfig(BaseSettings):
    """Everything that an operator can set."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", cli_avoid_json=True, cli_implicit_flags=True, cli_hide_none_type=True
    )

    netuid: int = Field(default=1, ge=0, le=65535, description="number of the subnet")
    wallet: WalletConfig = Field(default=WalletConfig(), description=WalletConfig.__doc__)
    subtensor: SubtensorConfig = Field(default=SubtensorConfig(), description=SubtensorConfig.__doc__)
    axon: AxonConfig = Field(default=AxonConfig(), description=AxonConfig.__doc__)
    neuron: NeuronSection = Field(default=NeuronSection(), description=NeuronSection.__doc__)
    blacklist: BlacklistConfig = Field(default=BlacklistConfig(), description=BlacklistConfig.__doc__)
    hub: HubConfig = Field(default=HubConfig(), description=HubConfig.__doc__)
    dht: DhtConfig = Field(default=DhtConfig(), description=DhtConfig.__doc__)
    tracker: TrackerConfig = Field(default=TrackerConfig(), description=TrackerConfig.__doc__)
    logging: LoggingConfig = Field(default=LoggingConfig(), description=LoggingConfig.__doc__)
    config: Path | None = Field(default=None, description="TOML file with any of these settings, one table per section")

    _role: Role = PrivateAttr("miner")
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `parse_config` merges the sources itself, to know where each value came from

    @property
    def role(self) -> Role:
        """What this process is."""
        return self._role

    @property
    def name(self) -> str:
        """Name in logs, status and metrics."""
        return self.neuron.name or self._role

    @property
    def state_dir(self) -> Path:
        """Folder of this neuron's own state."""
        if self.neuron.dir is not None:
            return self.neuron.dir.expanduser()
        wallet = self.wallet
        return Path("~/.hivetrain").expanduser() / wallet.name / wallet.hotkey / f"netuid{self.netuid}" / self.name

    @property
    def run_dir(self) -> Path:
        """Folder shared by the neurons of this machine."""
        return self.neuron.run_dir.expanduser() if self.neuron.run_dir is not None else self.state_dir

    @property
    def cache_dir(self) -> Path:
        """Folder of downloads from the hub."""
        return self.hub.cache.expanduser() if self.hub.cache is not None else self.state_dir / "cache"

    @property
    def tracker_dir(self) -> Path:
        """Folder of the tracker's files."""
        return self.tracker.dir.expanduser() if self.tracker.dir is not None else self.state_dir / "tracker"

    @property
    def identity_path(self) -> Path:
        """File of the libp2p key."""
        path = self.dht.identity_path
        return path.expanduser() if path is not None else self.state_dir / "p2p.key"

    @property
    def logging_dir(self) -> Path:
        """Folder of the log file."""
        path = self.logging.logging_dir
        return path.expanduser() if path is not None else self.state_dir / "logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """Tokens, kept out of the settings so that nothing prints them."""

    hub_token: str | None = field(default=None, repr=False)
    wandb_api_key: str | None = field(default=None, repr=False)


def read_secrets(environ: Mapping[str, str]) -> Secrets:
    """The tokens in the environment; to be called in `main` only."""
    return Secrets(
        hub_token=environ.get("HIVETRAIN_HUB_TOKEN") or environ.get("HF_TOKEN") or None,
        wandb_api_key=environ.get("WANDB_API_KEY") or None,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flag = message.partition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        if not flag:
            raise ConfigError(f"{message}; --help lists every flag")
        near = difflib.get_close_matches(flag, flag_names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
        raise ConfigError(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}; {hint}")


def parse_config(argv: Sequence[str], role: Role, environ: Mapping[str, str] | None = None) -> NeuronConfig:
    """Merge command line, environment and file into one frozen configuration.

    Args:
        argv: the arguments after the program's name. ``--help`` prints every flag and exits 0.
        environ: instead of ``os.environ``.

    Raises:
        ConfigError: an unknown flag, variable or key, or an impossible value; names it and its source.
    """
    epilog = (
        "Each flag is also a variable (--wallet.name: HIVETRAIN_WALLET__NAME) and a key of the --config file.\n"
        f"Aliases: {', '.join(f'{alias} = {flag}' for alias, flag in FLAG_ALIASES.items())},\n"
        f"{', '.join(f'{alias} = {chr(32).join(flags)}' for alias, flags in SWITCH_ALIASES.items())}."
    )
    parser = _Parser(
        prog=f"neurons/{role}.py",
        description=f"Run a Hivetrain {role}.",
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from_cli = _flatten(CliSettingsSource(NeuronConfig, cli_parse_args=_expand(argv), root_parser=parser)())
    from_env = dict(_from_environ(os.environ if environ is None else environ))
    file_name = from_cli.get("config", from_env.get("config", (None, "")))[0]
    layers = [
        _from_file(Path(file_name)) if file_name else {},
        from_env,
        {path: (value, _cli_name(path, value)) for path, (value, _) in from_cli.items()},
    ]
    merged: dict[str, tuple[Any, str]] = {}
    for layer in layers:
        merged.update(layer)
    try:
        config = NeuronConfig(**_nest({path: value for path, (value, _) in merged.items()}))
    except ValidationError as exc:
        raise ConfigError(_explain(exc, merged)) from exc
    config._role = role
    config._sources.update({path: merged[path][1] if path in merged else "default" for path in _leaves(NeuronConfig)})
    return config


def sources(config: NeuronConfig) -> dict[str, str]:
    """Where each dotted setting came from: a flag, a variable, a file, or "default"."""
    return dict(config._sources)


def values(config: NeuronConfig) -> dict[str, Any]:
    """Each dotted setting's value, as plain JSON types."""
    return {path: value for path, (value, _) in _flatten(config.model_dump(mode="json")).items()}


def flag_names() -> list[str]:
    """Every flag, aliases included."""
    return [f"--{path}" for path in _leaves(NeuronConfig)] + [*FLAG_ALIASES, *SWITCH_ALIASES]


def logging_setup(config: NeuronConfig, stream: typing.TextIO | None = None) -> None:
    """Send logs to a terminal in colour, to anything else in plain lines, and to a rotating file.

    Raises:
        ConfigError: the log folder cannot be written.
    """
    stream = sys.stderr if stream is None else stream
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    console: logging.Handler = logging.StreamHandler(stream)
    console.setFormatter(plain)
    if stream.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = RichHandler(console=Console(file=stream), show_path=False, log_time_format="%H:%M:%S")
    try:
        config.logging_dir.mkdir(parents=True, exist_ok=True)
        file = logging.handlers.RotatingFileHandler(
            config.logging_dir / f"{config.name}.log", maxBytes=10 << 20, backupCount=3, encoding="utf-8"
        )
    except OSError as exc:
        raise ConfigError(f"--logging.logging_dir: cannot write {config.logging_dir}: {exc.strerror}") from exc
    file.setFormatter(plain)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(console)
    root.addHandler(file)
    root.setLevel(logging.DEBUG if config.logging.trace else logging.WARNING)
    ours = logging.DEBUG if config.logging.debug or config.logging.trace else logging.INFO
    for name in ("hivetrain", "template", "neurons", "__main__"):
        logging.getLogger(name).setLevel(ours)


def _expand(argv: Sequence[str]) -> list[str]:
    expanded: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if argument in SWITCH_ALIASES:
            expanded.extend(SWITCH_ALIASES[argument])
        else:
            expanded.append(FLAG_ALIASES.get(flag, flag) + equals + value)
    return expanded


def _cli_name(path: str, value: Any) -> str:
    return f"--no-{path}" if value is False else f"--{path}"


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[Any, str]]]:
    names = {ENV_PREFIX + path.upper().replace(".", "__"): path for path in _leaves(NeuronConfig)}
    for name in environ:
        if name.startswith(ENV_PREFIX) and "__" in name and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(f"unknown variable {name}" + (f"; did you mean {near[0]}?" if near else ""))
    for name, path in (ENV_ALIASES | names).items():  # ours last, so that they win over btcli's
        if environ.get(name):
            is_list = path.endswith(("_maddrs", "_peers"))
            yield path, (environ[name].split(",") if is_list else environ[name], name)


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    try:
        table = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"--config: cannot read {path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"--config: {path} is not valid TOML: {exc}") from exc
    known = _leaves(NeuronConfig)
    found = {key: (value, str(path)) for key, (value, _) in _flatten(table).items()}
    for key in found:
        if key not in known or key == "config":
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{path}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _explain(exc: ValidationError, merged: Mapping[str, tuple[Any, str]]) -> str:
    first = exc.errors()[0]
    parts = [str(part) for part in first["loc"]]
    path = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in merged), "")
    value, source = merged.get(path, (first["input"], "default"))
    message = first["msg"].removeprefix("Value error, ")
    where = "" if source.startswith("--") else f" (from {source})"
    return f"--{path or '.'.join(parts)}: {message[0].lower()}{message[1:]}, got {value!r}{where}"


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths: list[str] = []
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            paths.extend(_leaves(section, f"{prefix}{name}."))
        else:
            paths.append(f"{prefix}{name}")
    return paths


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, str]]:
    flat: dict[str, tuple[Any, str]] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = (value, "")
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        target = table
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return table
