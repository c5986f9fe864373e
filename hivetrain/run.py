"""The recipe of a run, `run.toml`: everything that two nodes must agree on to compute the same thing.

It is written at genesis, published on the hub beside the state of epoch 0, and read from there by every
neuron. Its bytes, the tokenizer's and the genesis state's make the run id, which is on chain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from hivetrain.errors import RecipeError

CHUNK_ELEMENTS = 4096
MAX_SNAPSHOTS = 1024
MAX_OPENED = 64  # snapshots: what one Train synapse can ask a miner to open
MAX_MINERS = 256  # uids of a subnet, and what one all-reduce can hold
GENESIS = "genesis"
"""Written for a model or tokenizer that genesis makes itself, instead of a hub name."""


DeltaCodec = Literal["fp32", "fp16", "int8", "int4", "int2", "sign", "topk-1%", "topk-10%"]
MomentsCodec = Literal["fp32", "fp16", "int8", "int4", "int2", "sign", "none"]
SecondMomentsCodec = Literal["fp32", "log8", "log4"]
MeanName = Literal["mean", "norm_bound", "trimmed_mean", "median", "centered_clip"]
ROUGH_CODECS = ("int2", "sign", "topk-1%", "topk-10%")
"""What they lose is lost in one direction, so that they need error feedback."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _one_of(field_name: str, value: str, literal: Any) -> None:
    names = typing.get_args(literal)
    _require(value in names, f"{field_name} must be one of {', '.join(names)}, got {value!r}")


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        _require(math.isfinite(value) and value > 0, f"{owner}.{name} must be > 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is trained. With ``name = "genesis"`` a small Llama is drawn from ``seed``."""

    name: str = GENESIS  # or a hub repo of any AutoModelForCausalLM
    revision: str = ""  # a commit sha, for a hub repo
    seed: int = 0
    hidden_size: int = 128  # this and the rest: only for "genesis"
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 320
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        _require(bool(self.name), "model.name must not be empty")
        _require(self.name == GENESIS or bool(self.revision), "model.revision is needed for a model from a hub")
        _positive("model", hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads)
        _positive("model", intermediate_size=self.intermediate_size, vocab_size=self.vocab_size)
        _require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_heads ({self.num_heads})",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """Text to token ids. ``"genesis"`` trains a byte-level BPE of ``model.vocab_size`` on the corpus."""

    name: str = GENESIS
    revision: str = ""

    def __post_init__(self) -> None:
        _require(self.name == GENESIS or bool(self.revision), "tokenizer.revision is needed for one from a hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Which parameters train. Source of DoRA: https://arxiv.org/abs/2402.09353."""

    kind: Literal["dora", "dora_linear", "lora", "full"] = "dora_linear"  # dora_linear: the mean of vectors is exact
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ()  # empty: every linear layer but the head
    train_embeddings: bool = True  # needed on a randomly initialised base
    train_norms: bool = True
    merge_every: int = 0  # epochs between two merges of the adapter into the base; 0: never

    def __post_init__(self) -> None:
        kinds = ("dora", "dora_linear", "lora", "full")
        _require(self.kind in kinds, f"adapter.kind must be dora, dora_linear, lora or full, got {self.kind!r}")
        _positive("adapter", rank=self.rank, alpha=self.alpha)
        _require(self.merge_every >= 0, f"adapter.merge_every must be >= 0, got {self.merge_every}")
        _require(self.kind != "full" or self.merge_every == 0, "adapter.merge_every must be 0 without an adapter")

    def base_epoch(self, epoch: int) -> int:
        """The epoch whose base the state of ``epoch`` belongs to: that of the newest merge, 0 before the first."""
        return epoch - epoch % self.merge_every if self.merge_every else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The data set, its pinned revision, and how much of it a miner gets in one round."""

    repo: str = "hivetrain/corpus"
    config: str = ""  # a folder of the data set such as "sample-350BT"; empty: all its parquet files
    revision: str = ""  # a commit sha; genesis fills it in
    index_sha256: str = ""  # of index.json, which says what the revision holds; genesis fills it in
    text_column: str = "text"
    seq_len: int = 64
    batch_size: int = 4
    accumulation: int = 1  # micro-batches per inner step
    row_groups_per_miner: int = 2  # K: row groups that one miner is assigned in one round
    max_miners: int = 16  # slots; ranks past it get no assignment
    heldout_row_groups: int = 2  # the last row groups of the index, outside the permutation
    heldout_batches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _require("/" in self.repo, f"data.repo must be OWNER/NAME, got {self.repo!r}")
        _positive("data", seq_len=self.seq_len, batch_size=self.batch_size, accumulation=self.accumulation)
        _positive("data", row_groups_per_miner=self.row_groups_per_miner, max_miners=self.max_miners)
        _require(self.max_miners <= MAX_MINERS, f"data.max_miners must be <= {MAX_MINERS}, got {self.max_miners}")
        _positive("data", heldout_row_groups=self.heldout_row_groups, heldout_batches=self.heldout_batches)
        _require(self.seq_len >= 2, f"data.seq_len must be at least 2, got {self.seq_len}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """A miner's local AdamW. The learning rate warms up, then follows a cosine over ``total_steps``."""

    max_steps: int = 50  # H: inner steps in one round
    lr: float = 1e-2
    final_lr_ratio: float = 0.3  # the mean of miners lessens the noise that a lower rate would
    warmup_steps: int = 150  # long: steps taken apart cancel out in the mean while the model is still unformed
    total_steps: int = 600
    rewarm_steps: int = 10  # of warm-up after a merge of the adapter
    beta1: float = 0.8
    beta2: float = 0.97
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast on CUDA
    snapshot_every: int = 5  # K: inner steps between committed snapshots; a check replays so many

    def __post_init__(self) -> None:
        _positive("inner", max_steps=self.max_steps, lr=self.lr, total_steps=self.total_steps, eps=self.eps)
        _positive("inner", clip_norm=self.clip_norm, snapshot_every=self.snapshot_every)
        _require(self.warmup_steps >= 0, f"inner.warmup_steps must be >= 0, got {self.warmup_steps}")
        _require(self.rewarm_steps >= 0, f"inner.rewarm_steps must be >= 0, got {self.rewarm_steps}")
        _require(self.weight_decay >= 0, f"inner.weight_decay must be >= 0, got {self.weight_decay}")
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            _require(0 <= beta < 1, f"inner.{name} must be in [0, 1), got {beta}")
        _require(0 <= self.final_lr_ratio <= 1, f"inner.final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}")
        _require(self.precision in ("fp32", "bf16"), f"inner.precision must be fp32 or bf16, got {self.precision!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """What turns the averaged pseudo-gradient into the next state."""

    kind: Literal["average", "nesterov"] = "average"
    lr: float = 1.0
    momentum: float = 0.2  # of nesterov; with its rate of 1 the best of a sweep (`bench.outer`)

    def __post_init__(self) -> None:
        _require(self.kind in ("average", "nesterov"), f"outer.kind must be average or nesterov, got {self.kind!r}")
        _positive("outer", lr=self.lr)
        _require(0 <= self.momentum < 1, f"outer.momentum must be in [0, 1), got {self.momentum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Averaging:
    """How pseudo-gradients and moments are joined, and how each of them travels (`hivetrain.averaging.codecs`)."""

    strategy: Literal["allreduce"] = "allreduce"
    codec: DeltaCodec = "fp32"  # of the pseudo-gradient
    error_feedback: bool = True  # what a lossy codec did not carry goes into the next round's payload
    moments_codec: MomentsCodec = "fp32"  # of AdamW's first moment; "none": not sent, every round starts it at zero
    second_moments_codec: SecondMomentsCodec = "fp32"  # even levels would make small ones 0, and AdamW divides by them
    mean: MeanName = "mean"  # of verified members; the others bear a few bad ones (`hivetrain.averaging.robust`)
    max_abs: float = 1e3  # a value past it is out of bound
    min_members: int = 1  # fewer senders than this: the round fails

    def __post_init__(self) -> None:
        _require(self.strategy == "allreduce", f"averaging.strategy must be allreduce, got {self.strategy!r}")
        _one_of("averaging.codec", self.codec, DeltaCodec)
        _one_of("averaging.moments_codec", self.moments_codec, MomentsCodec)
        _one_of("averaging.second_moments_codec", self.second_moments_codec, SecondMomentsCodec)
        _one_of("averaging.mean", self.mean, MeanName)
        _require(
            self.error_feedback or self.codec not in ROUGH_CODECS,
            f"averaging.codec = {self.codec!r} needs averaging.error_feedback = true: what it leaves out is never sent",
        )
        _positive("averaging", max_abs=self.max_abs, min_members=self.min_members)

    @property
    def feeds_back(self) -> bool:
        """Whether miners keep a remainder: the codec of the pseudo-gradient is lossy, and feedback is on."""
        return self.error_feedback and self.codec != "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Phase lengths in blocks. ``start_block`` is the first block of round 0."""

    start_block: int = 1
    block_time_s: float = 12.0
    train: int = 25
    commit: int = 3
    verify: int = 6
    all_reduce: int = 6
    publish: int = 5
    leader_patience: int = 2  # blocks of a leader's silence after which the next one may lead

    def __post_init__(self) -> None:
        _require(self.start_block >= 0, f"schedule.start_block must be >= 0, got {self.start_block}")
        _positive("schedule", block_time_s=self.block_time_s, train=self.train, commit=self.commit, verify=self.verify)
        _positive("schedule", all_reduce=self.all_reduce, publish=self.publish, leader_patience=self.leader_patience)
        _require(
            self.leader_patience <= self.all_reduce,
            f"schedule.leader_patience must be <= schedule.all_reduce ({self.all_reduce}), got {self.leader_patience}",
        )

    @property
    def phase_blocks(self) -> tuple[int, int, int, int, int]:
        """Lengths of TRAIN, COMMIT, VERIFY, ALL_REDUCE and PUBLISH, in blocks."""
        return (self.train, self.commit, self.verify, self.all_reduce, self.publish)

    @property
    def round_blocks(self) -> int:
        """Length of a whole round, in blocks."""
        return sum(self.phase_blocks)


DISTANCES = {
    "fp32": {"distance_full": 0.05, "distance_zero": 0.08},
    "bf16": {"distance_full": 0.15, "distance_zero": 0.2},
}
"""Bounds of a recipe that names none, by its `inner.precision`: above what honest work strays from a replay in fp32
(`python -m bench.honest`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a round becomes a score (docs/protocol.md, "Scores")."""

    steps_weight: float = 0.7
    bandwidth_weight: float = 0.3
    ema_alpha: float = 0.3
    distance_full: float = 0.05  # replay distance up to which the gradient score is 1; by the precision: `DISTANCES`
    distance_zero: float = 0.08  # and from which it is 0
    check_share: float = 0.5  # share of the miners that a validator replays in a round
    whole_round_share: float = 0.0  # share of those whose whole round is replayed, not one window
    cooldown_rounds: int = 5  # rounds without pay after a proven lie
    target_mbps: float = 25.0  # megabits per second that earn the full bandwidth score

    def __post_init__(self) -> None:
        for name in ("steps_weight", "bandwidth_weight", "check_share", "whole_round_share"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"scoring.{name} must be in [0, 1], got {value}")
        total = self.steps_weight + self.bandwidth_weight
        _require(abs(total - 1) < 1e-9, f"scoring.steps_weight + scoring.bandwidth_weight must be 1, got {total}")
        _require(0 < self.ema_alpha <= 1, f"scoring.ema_alpha must be in (0, 1], got {self.ema_alpha}")
        _require(
            0 < self.distance_full < self.distance_zero,
            f"scoring needs 0 < distance_full < distance_zero, got {self.distance_full} and {self.distance_zero}",
        )
        _require(self.cooldown_rounds >= 0, f"scoring.cooldown_rounds must be >= 0, got {self.cooldown_rounds}")
        _positive("scoring", target_mbps=self.target_mbps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """What a state must pass before it is published."""

    heldout_tolerance: float = 0.05  # relative: loss may be at most parent * (1 + this)
    quorum: float = 2 / 3  # share of the weight whose members must sign the state

    def __post_init__(self) -> None:
        _require(self.heldout_tolerance >= 0, f"gates.heldout_tolerance must be >= 0, got {self.heldout_tolerance}")
        _require(0 < self.quorum <= 1, f"gates.quorum must be in (0, 1], got {self.quorum}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPolicy:
    """What the hub keeps."""

    repo: str = "hivetrain/model"
    keep_epochs: int = 20  # newest epochs kept besides epoch 0

    def __post_init__(self) -> None:
        _require("/" in self.repo, f"hub.repo must be OWNER/NAME, got {self.repo!r}")
        _require(self.keep_epochs >= 2, f"hub.keep_epochs must be >= 2, got {self.keep_epochs}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run's recipe. Sections are the tables of `run.toml`."""

    name: str = "local"
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    inner: Inner = field(default_factory=Inner)
    outer: Outer = field(default_factory=Outer)
    averaging: Averaging = field(default_factory=Averaging)
    schedule: Schedule = field(default_factory=Schedule)
    scoring: Scoring = field(default_factory=Scoring)
    gates: Gates = field(default_factory=Gates)
    hub: HubPolicy = field(default_factory=HubPolicy)

    def __post_init__(self) -> None:
        _require(bool(self.name), "name must not be empty")
        num_snapshots = -(-self.inner.max_steps // self.inner.snapshot_every)
        _require(
            num_snapshots <= MAX_SNAPSHOTS,
            f"inner.max_steps / inner.snapshot_every must be <= {MAX_SNAPSHOTS} snapshots, got {num_snapshots}",
        )
        _require(
            num_snapshots <= MAX_OPENED or self.scoring.whole_round_share == 0,
            f"a whole round of more than {MAX_OPENED} snapshots cannot be opened, and inner.max_steps / "
            f"inner.snapshot_every gives {num_snapshots}: set scoring.whole_round_share to 0",
        )

    def to_toml(self) -> str:
        """The canonical text: every field, in declaration order."""
        return tomli_w.dumps(_plain(self))

    def sha256(self) -> str:
        """Hex digest of the canonical text."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def parse_recipe(text: str) -> Recipe:
    """Parse and validate `run.toml`. What it does not say has its default; replay distances by the precision.

    Raises:
        RecipeError: not TOML, an unknown or wrongly typed field, or an impossible value; names the field.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise RecipeError(f"run.toml is not valid TOML: {exc}") from exc
    inner, scoring = table.get("inner"), table.setdefault("scoring", {})
    precision = inner.get("precision") if isinstance(inner, dict) else None
    if isinstance(scoring, dict) and isinstance(precision, str) and not DISTANCES["fp32"].keys() & scoring.keys():
        table["scoring"] = {**DISTANCES.get(precision, {}), **scoring}
    return typing.cast("Recipe", _build(Recipe, table, ""))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file of the user's.

    Raises:
        RecipeError: the file cannot be read, or as in `parse_recipe`.
    """
    try:
        return parse_recipe(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot read the recipe {path}: {exc}") from exc


def _build(cls: type[Any], table: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"run.toml: unknown field {path}{unknown[0]}; known here: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name, raw in table.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(raw, dict):
                raise RecipeError(f"run.toml: {path}{name} must be a table, got {type(raw).__name__}")
            values[name] = _build(typing.cast("type[Any]", hint), raw, f"{path}{name}.")
        else:
            values[name] = _scalar(hint, raw, f"{path}{name}")
    try:
        return cls(**values)
    except ValueError as exc:
        raise RecipeError(f"run.toml: {exc}") from exc


def _scalar(hint: Any, raw: Any, path: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if isinstance(raw, list) and all(isinstance(item, str) for item in raw):
            return tuple(raw)
        raise RecipeError(f"run.toml: {path} must be a list of strings, got {raw!r}")
    if typing.get_origin(hint) in (Literal, types.UnionType):
        hint = str
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if isinstance(raw, hint) and not (hint is int and isinstance(raw, bool)):
        return raw
    raise RecipeError(f"run.toml: {path} must be {hint.__name__}, got {raw!r}")


def differing_fields(ours: Recipe, theirs: Recipe) -> list[str]:
    """Dotted names of the fields in which two recipes differ, each with both values."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict):
            return [line for key in a for line in walk(a[key], b[key], f"{path}.{key}" if path else key)]
        return [] if a == b else [f"{path}: ours {a!r}, the run's {b!r}"]

    return walk(_plain(ours), _plain(theirs), "")


def run_id(recipe: Recipe, tokenizer_sha256: str, genesis_state_sha256: str) -> str:
    """The run's id: hex sha256 over recipe, tokenizer and genesis state."""
    text = f"hivetrain-run/1\n{recipe.sha256()}\n{tokenizer_sha256}\n{genesis_state_sha256}"
    return hashlib.sha256(text.encode()).hexdigest()
