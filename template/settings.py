"""Every setting of a neuron: the dotted flags that Bittensor operators expect, their defaults and their bounds.

`template.config` reads them from the command line, the environment and a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from hivetrain.averaging.addresses import parse_endpoint
from hivetrain.errors import ConfigError

Role = Literal["miner", "validator"]

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
    bulk: bool = Field(default=True, description="move the all-reduce's bytes to TCP connections of their own")
    bulk_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port on which those arrive; unset: 1,000 past the port of host_maddrs",
    )
    announce_bulk: tuple[str, ...] = Field(
        default=(), description="address:port to announce for those; empty: 1,000 past the announced ports"
    )
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

    @field_validator("announce_bulk")
    @classmethod
    def _are_endpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in value:
            try:
                parse_endpoint(endpoint)
            except ConfigError as exc:
                raise ValueError(str(exc)) from exc
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
