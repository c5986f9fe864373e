"""Did the epochs really work? Read it from the hub, the chain and the neurons' own files, and say so in words.

`hivetrain up --epochs N` exits 0 only if this finds nothing wrong, so nothing here trusts a neuron's log line:
tags and manifests come from the hub, weights from the chain, and agreement from the state hash that each miner
recorded against the one that the manifest names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import HubError, HubNotFound, IntegrityError, ServiceError
from hivetrain.manifest import Manifest, epoch_tag
from hivetrain.run import HubPolicy
from hivetrain.tracking.events import EventReader
from hivetrain.tracking.status import NeuronStatus

if TYPE_CHECKING:
    from hivetrain.hub.client import HubStore
    from template.chain.client import NeuronInfo


_SHARE = re.compile(r"\b(\d+):([0-9.]+)")
"""One weight in the words of a ``set_weights`` event: ``weights 1:0.500 2:0.500``."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Member(_Record):
    """One wallet that genesis made."""

    name: str
    hotkey_name: str
    role: str
    ss58: str


class Genesis(_Record):
    """``genesis.json``: what exists once genesis has run."""

    run_id: str
    netuid: int
    chain_endpoint: str
    hub_endpoint: str
    hub_repo: str = HubPolicy().repo
    block_time_s: float
    wallets: tuple[Member, ...]


class Score(_Record):
    """One miner's score in the newest round, each part in [0, 1]; None: not scored."""

    gradient: float | None = None
    steps: float | None = None
    bandwidth: float | None = None
    score: float | None = None


class StateLine(_Record):
    """One line of a miner's ``states.jsonl``."""

    epoch: int
    state_hash: str
    manifest_state_hash: str = ""
    source: str = ""


class Results(Protocol):
    """Where the outcome of a run is read. Every call may raise `ServiceError`."""

    def epochs(self) -> list[int]:
        """The published epochs, ascending."""
        ...

    def manifest(self, epoch: int) -> Manifest:
        """The manifest of a published epoch."""
        ...

    def weights(self) -> dict[str, float]:
        """Weight on chain per hotkey: the mean over the validators that set weights."""
        ...

    def payers(self) -> set[str]:
        """The validators that set weights."""
        ...

    def scores(self) -> dict[str, Score]:
        """The first validator's newest score per hotkey."""
        ...

    def paid(self) -> dict[str, float]:
        """The weights that the first validator has set per hotkey, summed over the rounds."""
        ...

    def states(self, name: str) -> list[StateLine]:
        """The states that the miner called ``name`` held."""
        ...


class AllReduceReport(_Record):
    """What the all-reduce of one epoch took, and who failed in it."""

    seconds: float
    bytes: int
    faults: list[dict[str, str]]


class EpochReport(_Record):
    """One published epoch."""

    epoch: int
    tag: str
    state_sha256: str
    val_loss: float
    members: list[str]
    allreduce: AllReduceReport


class AttackReport(_Record):
    """What a cheat got for it.

    Attributes:
        pay: the weights it was given, summed over the rounds, over an honest miner's; None: nobody has been paid yet.
        weight: the same of the newest weights on chain.
    """

    name: str
    member: str
    hotkey: str
    pay: float | None
    weight: float | None

    def in_words(self) -> str:
        """``attack random: miner-3 was paid 0.04 of an honest miner's pay``."""
        paid = "nobody has been paid yet" if self.pay is None else f"was paid {self.pay:.2f} of an honest miner's pay"
        return f"attack {self.name}: {self.member} {paid}"


class Report(_Record):
    """What `--json` writes."""

    ok: bool
    failed: list[str]
    epochs: list[EpochReport]
    val_loss_before: float | None
    val_loss_after: float | None
    scores: dict[str, Score]
    weights: dict[str, float]
    seconds: dict[str, float] = Field(default_factory=dict)
    attack: AttackReport | None = None
    settled: bool = Field(default=True, exclude=True)  # what failed does not mend itself by waiting

    def to_json(self) -> str:
        """Indented JSON; a number that is not finite is written as null. ``attack`` is there only where one ran."""
        return self.model_dump_json(indent=2, exclude={"attack"} if self.attack is None else None) + "\n"

    def summary(self, num_epochs: int) -> str:
        """``3/3 epochs published · val loss 6.95 -> 4.34 · weights set``."""
        parts = [f"{len(self.epochs)}/{num_epochs} epochs published"]
        if self.val_loss_before is not None and self.val_loss_after is not None:
            parts.append(f"val loss {self.val_loss_before:.3f} -> {self.val_loss_after:.3f}")
        parts.append("weights set" if any(weight > 0 for weight in self.weights.values()) else "no weights set")
        if self.attack is not None:
            parts.append(self.attack.in_words())
        return " · ".join(parts)


def make_report(
    results: Results,
    miners: Sequence[Member],
    *,
    validators: Sequence[Member] = (),
    base_epoch: int,
    num_epochs: int,
    min_loss_drop: float = 0.0,
    seconds: Mapping[str, float] | None = None,
    attack: str = "",
    cheat: Member | None = None,
) -> Report:
    """Judge the first ``num_epochs`` epochs published after ``base_epoch``.

    Args:
        miners: those that were started: each must be a member of every epoch.
        validators: those that must have set weights.
        base_epoch: the newest epoch when the run started.
        min_loss_drop: nats per token by which the held-out loss must have fallen; 0: at all.
        attack, cheat: who is not among ``miners`` because it cheats, and how.

    Raises:
        ServiceError: hub or chain did not answer.
    """
    published = [epoch for epoch in results.epochs() if epoch > base_epoch][:num_epochs]
    manifests = {epoch: results.manifest(epoch) for epoch in published}
    before = results.manifest(base_epoch).val_loss
    after = manifests[published[-1]].val_loss if published else None
    weights, scores = results.weights(), results.scores()
    payers = results.payers()
    late = [
        *_missing_epochs(published, base_epoch, num_epochs),
        *_unrecorded_states(results, manifests, miners),
        *(f"no weight on chain for {m.name} ({m.ss58})" for m in miners if not weights.get(m.ss58, 0.0) > 0),
        *(f"{m.name} ({m.ss58}) has set no weights" for m in validators if m.ss58 not in payers),
    ]
    wrong = [
        *_missing_members(manifests, miners),
        *_differing_states(results, manifests, miners),
        *_loss_that_stayed(before, after, min_loss_drop),
    ]
    return Report(
        ok=not late and not wrong,
        failed=late + wrong,
        settled=not late,
        epochs=[_epoch_report(manifest) for manifest in manifests.values()],
        val_loss_before=before,
        val_loss_after=after,
        scores=scores,
        weights=weights,
        seconds={name: round(value, 3) for name, value in (seconds or {}).items()},
        attack=_attack_report(results, weights, miners, attack, cheat) if cheat is not None else None,
    )


def _attack_report(
    results: Results, weights: Mapping[str, float], honest: Sequence[Member], attack: str, cheat: Member
) -> AttackReport:
    def over_honest(table: Mapping[str, float]) -> float | None:
        theirs = sum(table.get(miner.ss58, 0.0) for miner in honest) / len(honest)
        return table.get(cheat.ss58, 0.0) / theirs if theirs > 0 else None

    return AttackReport(
        name=attack,
        member=cheat.name,
        hotkey=cheat.ss58,
        pay=over_honest(results.paid()),
        weight=over_honest(weights),
    )


def failed_report(reason: str, seconds: Mapping[str, float]) -> Report:
    """The report of a run that could not be judged at all."""
    return Report(
        ok=False,
        failed=[reason],
        epochs=[],
        val_loss_before=None,
        val_loss_after=None,
        scores={},
        weights={},
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def _epoch_report(manifest: Manifest) -> EpochReport:
    faults = [fault.model_dump() for fault in manifest.faults]
    reduced = AllReduceReport(seconds=manifest.allreduce_seconds, bytes=manifest.allreduce_bytes, faults=faults)
    return EpochReport(
        epoch=manifest.epoch,
        tag=epoch_tag(manifest.epoch),
        state_sha256=manifest.state_hash,
        val_loss=manifest.val_loss,
        members=list(manifest.members),
        allreduce=reduced,
    )


def _missing_epochs(published: Sequence[int], base_epoch: int, num_epochs: int) -> list[str]:
    expected = range(base_epoch + 1, base_epoch + num_epochs + 1)
    return [f"{epoch_tag(epoch)} was not published" for epoch in expected if epoch not in published]


def _missing_members(manifests: Mapping[int, Manifest], miners: Sequence[Member]) -> list[str]:
    return [
        f"{epoch_tag(epoch)} lacks {miner.name} ({miner.ss58}) among its members"
        for epoch, manifest in manifests.items()
        for miner in miners
        if miner.ss58 not in manifest.members
    ]


def _differing_states(results: Results, manifests: Mapping[int, Manifest], miners: Sequence[Member]) -> list[str]:
    return [
        f"{miner.name} held another state than {epoch_tag(line.epoch)}: "
        f"{line.state_hash[:12]}, the manifest says {manifests[line.epoch].state_hash[:12]}"
        for miner in miners
        for line in results.states(miner.name)
        if line.epoch in manifests and line.state_hash != manifests[line.epoch].state_hash
    ]


def _unrecorded_states(results: Results, manifests: Mapping[int, Manifest], miners: Sequence[Member]) -> list[str]:
    recorded = {miner.name: {line.epoch for line in results.states(miner.name)} for miner in miners}
    return [
        f"{miner.name} has not recorded the state of {epoch_tag(epoch)}"
        for miner in miners
        for epoch in manifests
        if epoch not in recorded[miner.name]
    ]


def _loss_that_stayed(before: float, after: float | None, min_loss_drop: float) -> list[str]:
    if after is None:
        return []
    drop = before - after
    if math.isfinite(drop) and drop > 0 and drop >= min_loss_drop:
        return []
    needed = f"at least {min_loss_drop:g}" if min_loss_drop > 0 else "more than 0"
    return [f"val loss had to fall by {needed}: {before:.4f} -> {after:.4f}"]


def read_genesis(folder: Path) -> Genesis:
    """Read ``genesis.json``.

    Raises:
        ServiceError: it is unreadable, or not what genesis writes.
    """
    path = folder / "genesis.json"
    try:
        return Genesis.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise ServiceError(f"cannot read {path}: {exc.strerror}") from exc
    except ValidationError as exc:
        raise ServiceError(f"{path} is not what genesis writes ({exc.errors()[0]['msg']}); start with --fresh") from exc


class LiveResults:
    """`Results` from the hub, the chain and the folder of a running network."""

    def __init__(self, folder: Path, genesis: Genesis) -> None:
        self._folder = folder
        self._genesis = genesis
        self._hub: HubStore | None = None
        self._manifests: dict[int, Manifest] = {}

    def epochs(self) -> list[int]:
        """See `Results`. An epoch that was read before counts although it has been pruned since."""
        there = {epoch for epoch in self._store().epochs() if self._read(epoch) is not None}
        return sorted(there | set(self._manifests))

    def manifest(self, epoch: int) -> Manifest:
        """See `Results`."""
        manifest = self._read(epoch)
        if manifest is None:
            raise HubError(f"the hub has no {epoch_tag(epoch)} that a validator of this run published")
        return manifest

    def _read(self, epoch: int) -> Manifest | None:
        """An epoch's manifest; None where none is there, or one that is no validator's: a stolen token tags too."""
        if epoch not in self._manifests:
            try:
                ref = self._store().resolve(epoch)
            except (HubNotFound, IntegrityError):  # a tag, and behind it nothing, or no manifest
                return None
            if ref is None or (epoch and not self._is_led(ref.manifest)):
                return None
            self._manifests[epoch] = ref.manifest
        return self._manifests[epoch]

    def _is_led(self, manifest: Manifest) -> bool:
        from template.chain.keys import verify  # slow: bittensor

        validators = {member.ss58 for member in self._genesis.wallets if member.role == "validator"}
        return manifest.leader in validators and manifest.is_signed(verify)

    def weights(self) -> dict[str, float]:
        """See `Results`."""
        neurons, rows = self._weights_on_chain()
        return {n.hotkey: sum(row.get(n.uid, 0.0) for row in rows.values()) / max(len(rows), 1) for n in neurons}

    def payers(self) -> set[str]:
        """See `Results`."""
        neurons, rows = self._weights_on_chain()
        return {neuron.hotkey for neuron in neurons if neuron.uid in rows}

    def _weights_on_chain(self) -> tuple[Sequence[NeuronInfo], dict[int, dict[int, float]]]:
        """Every neuron, and by validator's uid the weights that it set."""
        from template.chain.client import Chain

        genesis = self._genesis
        with Chain(network="local", netuid=genesis.netuid, chain_endpoint=genesis.chain_endpoint) as chain:
            neurons, by_validator = chain.metagraph().neurons, chain.weights()
        rows = {uid: row for uid, row in by_validator.items() if any(share > 0 for share in row.values())}
        return neurons, rows

    def scores(self) -> dict[str, Score]:
        """See `Results`."""
        for member in self._genesis.wallets:
            path = self._folder / member.name / "scores.json"
            if member.role == "validator" and path.exists():
                return read_scores(path)
        return {}

    def paid(self) -> dict[str, float]:
        """See `Results`."""
        neurons, _ = self._weights_on_chain()
        validators = [member.name for member in self._genesis.wallets if member.role == "validator"]
        totals: dict[int, float] = {}
        for event in EventReader(self._folder / "events.jsonl", max_bytes=1 << 30).read_new():
            if event.event == "set_weights" and event.name == validators[0]:
                for uid, share in _SHARE.findall(event.text):
                    totals[int(uid)] = totals.get(int(uid), 0.0) + float(share)
        return {neuron.hotkey: totals.get(neuron.uid, 0.0) for neuron in neurons}

    def states(self, name: str) -> list[StateLine]:
        """See `Results`."""
        return read_states(self._folder / name / "states.jsonl")

    def _store(self) -> HubStore:
        if self._hub is None:
            from hivetrain.hub.client import HubStore  # slow: huggingface_hub

            self._hub = HubStore(endpoint=self._genesis.hub_endpoint, repo=self._genesis.hub_repo)
        return self._hub


def read_scores(path: Path) -> dict[str, Score]:
    """The scores that a validator wrote.

    Raises:
        ServiceError: the file is unreadable.
    """
    try:
        table = json.loads(path.read_bytes())["scores"]
        return {hotkey: Score.model_validate(entry) for hotkey, entry in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ServiceError(f"{path} is not what a validator writes: {exc}") from exc


def with_scores(folder: Path, rows: Sequence[NeuronStatus]) -> list[NeuronStatus]:
    """``rows`` with what the first validator of ``folder`` last gave each miner; as they are before it gave any."""
    path = next(iter(sorted(folder.glob("validator-*/scores.json"))), None)
    try:
        content = json.loads(path.read_bytes()) if path is not None else {}
        scores = {hotkey: entry.get("score") for hotkey, entry in content.get("scores", {}).items()}
        weights = dict(content.get("weights", {}))
    except (OSError, ValueError, AttributeError):
        return list(rows)  # for people to look at: half a file is no news
    return [replace(row, score=scores.get(row.hotkey), weight=weights.get(row.hotkey)) for row in rows]


def read_states(path: Path) -> list[StateLine]:
    """The lines that a miner wrote; a torn last line is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    states = []
    for line in lines:
        try:
            states.append(StateLine.model_validate_json(line))
        except ValidationError:
            continue
    return states
