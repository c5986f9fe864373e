"""`hivemind_config`: what a peer says about its swarm, read and checked before anything starts.

Two dicts: ``dht`` holds keyword arguments of `hivemind.DHT`, ``opt`` those of `hivemind.Optimizer`. The names that they
may use are listed here, not asked of hivemind: arguments are parsed, printed and refused without importing it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from hivetrain.averaging.addresses import bulk_port_beside, tcp_endpoint
from hivetrain.errors import ConfigError

DHT_OPTIONS = frozenset(
    {
        "announce_maddrs", "auto_nat", "backoff_rate", "blacklist_time", "bootstrap_timeout", "bucket_size",
        "cache_locally", "cache_nearest", "cache_on_store", "cache_refresh_before_expiry", "cache_size",
        "check_if_identity_free", "chunk_size", "client_mode", "conn_manager", "daemon", "depth_modulo",
        "dht_mode", "ensure_bootstrap_success", "force_reachability", "host_maddrs", "identity_path",
        "idle_timeout", "initial_peers", "nat_port_map", "no_listen", "num_replicas", "num_workers",
        "parallel_rpc", "persistent_conn_max_msg_size", "quic", "refresh_timeout", "relay_hop_limit",
        "reuse_get_requests", "shutdown_timeout", "startup_timeout", "strict", "tls", "trusted_relays",
        "use_auto_relay", "use_ipfs", "use_relay", "use_relay_discovery", "use_relay_hop", "wait_timeout",
    }
)  # fmt: skip
OPT_OPTIONS = frozenset(
    {
        "allreduce_timeout", "auxiliary", "average_opt_statistics", "average_state_every", "averager_opts",
        "averaging_timeout", "batch_size_per_step", "client_mode", "delay_grad_averaging", "delay_optimizer_step",
        "delay_state_averaging", "dht", "extra_tensors", "grad_averager_factory", "grad_compression",
        "load_state_compression", "load_state_timeout", "matchmaking_time", "next_chunk_timeout", "offload_optimizer",
        "optimizer", "params", "performance_ema_alpha", "reuse_grad_buffers", "run_id", "scheduler",
        "shutdown_timeout", "state_averaging_compression", "target_batch_size", "tracker_opts", "use_local_updates",
        "verbose",
    }
)  # fmt: skip
# What is averaged goes by hivetrain's codecs; a downloaded state by hivemind's compressions.
CODECS: Mapping[str, str] = {"none": "fp32", "float16": "fp16", "int8": "int8", "int4": "int4"}
COMPRESSIONS: Mapping[str, tuple[str, ...]] = {
    "grad_compression": tuple(CODECS),
    "state_averaging_compression": ("none", "float16"),
    "load_state_compression": (
        "none", "float16", "scaled_float16", "uniform_8bit", "quantile_8bit", "blockwise_8bit"
    ),
}  # fmt: skip
CODED_OPTIONS = ("grad_compression", "state_averaging_compression")
LOCAL_HOST_MADDRS = ("/ip4/127.0.0.1/tcp/0",)  # hivemind's own
MADDR_OPTIONS = ("initial_peers", "host_maddrs", "announce_maddrs")

# What SwarmTrainer makes itself, and what goes silently wrong in a Trainer.
_REFUSED = {
    "dht": "SwarmTrainer starts the DHT: put its options under 'dht'",
    "params": "they are the model's trainable parameters",
    "optimizer": "set `optim` in SwarmArguments, or pass optimizer_cls_and_kwargs to SwarmTrainer",
    "scheduler": "set `lr_scheduler_type` in SwarmArguments; it follows the swarm's epoch",
    "grad_averager_factory": "SwarmTrainer passes its own",
    "extra_tensors": "tensors cannot stand in a configuration",
    "reuse_grad_buffers": "a Trainer zeroes gradients after each step: all but the last batch would be lost",
    "auxiliary": "a Trainer trains: an auxiliary peer has no batches",
}

# Of hivemind's own all-reduce, in the place of which hivetrain's stands.
_EXCLUDED = (
    "averaging_alpha", "bandwidth", "compression", "min_vector_size", "part_size_bytes", "reducer_timeout",
    "sender_timeout", "tensor_infos",
)  # fmt: skip

# Measured on loopback: state averaged in the background leaves peers a few percent apart at any given moment;
# hivemind's own 15 s of matchmaking and 10 s between looks at the swarm's progress suit long epochs over slow links.
DEFAULTS: Mapping[str, object] = {
    "matchmaking_time": 5.0,
    "averaging_timeout": 60.0,
    "load_state_timeout": 300.0,
    "delay_state_averaging": False,
    "average_state_every": 10,
}
TRACKER_DEFAULTS: Mapping[str, object] = {"max_refresh_period": 2.0, "default_refresh_period": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Where one of a peer's averagers listens beside libp2p.

    Attributes:
        host_maddrs, announce_maddrs: of the DHT.
        bulk: whether it does.
        bulk_port: on which port; None: any.
    """

    host_maddrs: tuple[str, ...]
    announce_maddrs: tuple[str, ...] | None
    bulk: bool = True
    bulk_port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmConfig:
    """A checked `hivemind_config`.

    Attributes:
        run_id: the swarm's name: whoever gives the same one trains together.
        target_batch_size: samples, over all peers, that one step of the swarm takes.
        dht: keyword arguments of `hivemind.DHT`.
        opt: keyword arguments of `hivemind.Optimizer` without these two; defaults are filled in.
    """

    run_id: str
    target_batch_size: int
    dht: Mapping[str, object]
    opt: Mapping[str, object]

    @property
    def initial_peers(self) -> list[str]:
        """Multiaddresses of peers to join through; empty: we are the first."""
        return list(cast(Sequence[str], self.dht.get("initial_peers") or ()))

    def reach(self, place: int) -> Reach:
        """Where the averager of that place listens; 0: gradients, 1: state.

        Two of one peer cannot share a port: beside a libp2p port that is given, gradients have the one 1,000 past it,
        and the state the one after. A router forwards what its owner was told to: the first.
        """
        hosts = tuple(cast(Sequence[str], self.dht.get("host_maddrs") or LOCAL_HOST_MADDRS))
        announced = cast("Sequence[str] | None", self.dht.get("announce_maddrs"))
        ports = [endpoint[1] for maddr in hosts if (endpoint := tcp_endpoint(maddr)) and endpoint[1]]
        return Reach(
            host_maddrs=hosts,
            announce_maddrs=tuple(announced) if announced else None,
            bulk=place == 0 or not announced,
            bulk_port=bulk_port_beside(ports[0]) + place if ports else None,
        )

    def seconds(self, option: str) -> float:
        """The value of an option of ``opt`` that is a duration."""
        return float(cast(float, self.opt[option]))


def as_dict(value: Mapping[str, object] | str) -> dict[str, object]:
    """A `hivemind_config` as it may be written: a dict, a JSON object, or the path of a file that holds one.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, str):
        text, where = value, "hivemind_config"
        if not value.lstrip().startswith("{"):
            where = value
            try:
                text = Path(value).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as exc:
                raise ConfigError(
                    f"hivemind_config {value!r} is neither a JSON object nor a readable file: {exc}"
                ) from exc
        try:
            value = json.loads(text)
        except json.JSONDecodeError as exc:
            raise ConfigError(f"{where} is not JSON: {exc}") from exc
    if not isinstance(value, Mapping):
        raise ConfigError(f"hivemind_config must be a dict such as {_EXAMPLE}, got {type(value).__name__}")
    try:
        copied = json.loads(json.dumps(value))
    except (TypeError, ValueError) as exc:
        raise ConfigError(
            f"hivemind_config must hold JSON values only, so that it can be saved: {exc}. "
            f"A compression is given by its name, such as {', '.join(CODECS)}"
        ) from exc
    return cast(dict[str, object], copied)


_EXAMPLE = '{"dht": {}, "opt": {"run_id": "my_run", "target_batch_size": 128}}'


def read_config(value: Mapping[str, object] | str, extra_peers: Sequence[str] = ()) -> SwarmConfig:
    """Check a `hivemind_config` and fill in its defaults.

    Args:
        value: as `as_dict` takes it.
        extra_peers: initial peers from elsewhere, after those of the dict.

    Raises:
        ConfigError: a name or value that cannot work; says which would.
    """
    raw = as_dict(value)
    _known("hivemind_config", raw, {"dht", "opt"})
    dht, opt = _section(raw, "dht"), _section(raw, "opt")
    _known("hivemind_config['dht']", dht, DHT_OPTIONS)
    _known("hivemind_config['opt']", opt, OPT_OPTIONS)
    for name, reason in _REFUSED.items():
        if opt.get(name) not in (None, False):
            raise ConfigError(f"hivemind_config['opt'] cannot set {name!r}: {reason}")
    for name in MADDR_OPTIONS:
        if name in dht and dht[name] is not None:
            dht[name] = _maddrs(name, dht[name])
    peers = list(dict.fromkeys([*cast(list[str], dht.get("initial_peers") or []), *extra_peers]))
    if missing := [peer for peer in peers if "/p2p/" not in peer]:
        raise ConfigError(f"initial peer {missing[0]!r} must end in /p2p/ and the peer's id")
    if peers:
        dht["initial_peers"] = peers
    for name, known in COMPRESSIONS.items():
        if name in opt and opt[name] not in known:
            theirs = opt[name] in COMPRESSIONS["load_state_compression"]
            why = ": the others are of hivemind's own all-reduce, which SwarmTrainer does not use" if theirs else ""
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {opt[name]!r}{why}")
    run_id, target = opt.pop("run_id", None), opt.pop("target_batch_size", None)
    if not isinstance(run_id, str) or not run_id or "." in run_id or len(run_id) > 200:
        raise ConfigError(
            "hivemind_config['opt']['run_id'] must be the swarm's name, 1 to 200 characters without a '.', "
            f"got {run_id!r}"
        )
    if not isinstance(target, int) or isinstance(target, bool) or target < 1:
        raise ConfigError(
            f"hivemind_config['opt']['target_batch_size'] must be a number of samples from 1, got {target!r}"
        )
    opt = {**DEFAULTS, **opt}
    _check_times(opt)
    opt["tracker_opts"] = {**TRACKER_DEFAULTS, **_section(opt, "tracker_opts")}
    opt["averager_opts"] = _averager_options(opt)
    return SwarmConfig(run_id=run_id, target_batch_size=target, dht=dht, opt=opt)


def _section(raw: Mapping[str, object], name: str) -> dict[str, object]:
    section = raw.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(f"hivemind_config's {name!r} must be a dict, got {section!r}")
    return dict(section)


def _known(where: str, given: Mapping[str, object], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else f"; it knows {', '.join(sorted(known))}"
            raise ConfigError(f"{where} has no option {name!r}{hint}")


def _maddrs(name: str, value: object) -> list[str]:
    maddrs = [value] if isinstance(value, str) else value
    if not isinstance(maddrs, list) or not all(isinstance(maddr, str) for maddr in maddrs):
        raise ConfigError(f"{name} must be a list of multiaddresses such as /ip4/127.0.0.1/tcp/4001, got {value!r}")
    for maddr in maddrs:
        if not maddr.startswith("/"):
            raise ConfigError(f"{name}: {maddr!r} is not a multiaddress such as /ip4/127.0.0.1/tcp/4001")
    return list(maddrs)


def _check_times(opt: Mapping[str, object]) -> None:
    for name in ("matchmaking_time", "averaging_timeout", "load_state_timeout"):
        seconds = opt[name]
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 < seconds < float("inf"):
            raise ConfigError(f"{name} must be a number of seconds above 0, got {seconds!r}")
    matchmaking, averaging = opt["matchmaking_time"], opt["averaging_timeout"]
    if cast(float, averaging) <= cast(float, matchmaking):
        raise ConfigError(f"averaging_timeout must be above matchmaking_time, got {averaging} s and {matchmaking} s")
    every = opt["average_state_every"]
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"average_state_every must be a number of epochs from 1, got {every!r}")


def _averager_options(opt: Mapping[str, object]) -> dict[str, object]:
    """Options of both averagers. A request that outlasts the matchmaking can deadlock it."""
    options = _section(opt, "averager_opts")
    if excluded := sorted(options.keys() & set(_EXCLUDED)):
        raise ConfigError(
            f"averager_opts cannot set {', '.join(excluded)}: they tune hivemind's own all-reduce, and SwarmTrainer "
            "averages by hivetrain's. Use grad_compression and averaging_timeout"
        )
    matchmaking = cast(float, opt["matchmaking_time"])
    timeout = options.setdefault("request_timeout", min(3.0, matchmaking / 2))
    if not isinstance(timeout, int | float) or not 0 < timeout < matchmaking:
        raise ConfigError(
            f"averager_opts' request_timeout must be below matchmaking_time ({matchmaking} s), got {timeout!r}"
        )
    return options
