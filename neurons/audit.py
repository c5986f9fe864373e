"""`hivetrain audit`: replay a miner's whole epoch on this machine, and say whether it was honest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hivetrain.contribution import expected_receipt
from hivetrain.data.assignment import NoSlot
from hivetrain.errors import ConfigError, HivetrainError, HubNotFound, IntegrityError
from hivetrain.hub.client import HubDataset
from hivetrain.hub.dataset import DatasetFiles
from hivetrain.scoring.explain import receipt_problems, two_receipts
from hivetrain.scoring.record import CHECKS_BRANCH, MAX_EVIDENCE_BYTES, RoundRecord, evidence_path
from hivetrain.verification.audit import AuditVerdict, audit
from hivetrain.verification.receipt import Receipt, receipt_faults
from hivetrain.verification.steps import opens
from hivetrain.workbench import Workbench
from neurons.sources import Source
from template.chain.keys import verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The verdict on one miner's epoch."""

    epoch: int
    round: int
    hotkey: str
    receipt_sha256: str
    verdict: AuditVerdict

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What is printed."""
        word = "honest" if self.verdict.honest else "NOT HONEST"
        head = f"epoch {self.epoch} (round {self.round}), miner {self.hotkey}: {word}"
        return [head, *(f"  {line}" for line in self.verdict.lines)]


def run_audit(
    source: Source, epoch: int, hotkey: str, *, cache: Path, on_step: Callable[[int, int], None] = lambda *_: None
) -> Audit:
    """Replay what ``hotkey``'s receipt for ``epoch`` claims.

    Args:
        cache: a folder for downloads.
        on_step: told how many steps are done, of how many.

    Raises:
        ConfigError: no such epoch, no such miner, or no hub to read data from.
        HivetrainError: the miner has no receipt, or something cannot be read.
    """
    if not source.endpoint:
        raise ConfigError("an audit reads the training data from a hub: name --hub.endpoint or --dir")
    torch.set_num_threads(1)
    ref = source.epoch(epoch, verify)
    hotkey, records, _ = source.records(ref, hotkey, verify)
    receipt = _receipt(records, hotkey)
    twice = two_receipts(records, verify).get(hotkey)
    if twice is not None:
        line = f"signed two receipts for this round: {twice[0].sha256()[:12]} and {twice[1].sha256()[:12]}"
        verdict = _not_honest((line,))
    else:
        verdict = _replay(source, receipt, _steps(source, records, hotkey, receipt), cache, on_step)
    others = sorted({str(record.miners[hotkey].rank) for record in records} - {str(receipt.rank)})
    if others:  # a validator's word alone convicts nobody
        line = f"it worked as rank {receipt.rank}, validators say rank {', '.join(others)}"
        verdict = replace(verdict, lines=(*verdict.lines, line))
    return Audit(epoch=epoch, round=ref.manifest.round, hotkey=hotkey, receipt_sha256=receipt.sha256(), verdict=verdict)


def _replay(
    source: Source, receipt: Receipt, steps: bytes | None, cache: Path, on_step: Callable[[int, int], None]
) -> AuditVerdict:
    def open_dataset(repo: str, revision: str) -> DatasetFiles:
        return HubDataset(endpoint=source.endpoint, repo=repo, revision=revision)

    bench = Workbench(store=source.store, open_dataset=open_dataset, cache=cache, device=torch.device("cpu"))
    genesis, _ = source.genesis()
    parts = bench.open(genesis.manifest.run_id)
    base = source.store.resolve(receipt.epoch)
    if base is None:
        raise HivetrainError(f"epoch {receipt.epoch}, from which it started, is not kept any more")
    if base.manifest_sha256 != receipt.base_manifest:
        raise HivetrainError(f"the receipt starts from another epoch {receipt.epoch} than the one that is published")
    expected = expected_receipt(parts, base, receipt.round, receipt.hotkey, receipt.rank)
    faults = receipt_faults(receipt, expected)
    if faults:
        return _not_honest(tuple(fault.detail for fault in faults))
    state = parts.base.adopt_(bench.load_state(base, parts))
    try:
        data = bench.round_data(parts, receipt.round, receipt.rank)
    except NoSlot as exc:
        raise HivetrainError(f"rank {receipt.rank} was assigned nothing: {exc}") from exc
    return audit(parts, state, data, receipt, steps, on_step=lambda report: on_step(report.step + 1, receipt.num_steps))


def _not_honest(lines: tuple[str, ...]) -> AuditVerdict:
    """What needs no replay."""
    return AuditVerdict(honest=False, distance=None, loss=None, first_wrong_step=None, num_steps=0, lines=lines)


def _receipt(records: Sequence[RoundRecord], hotkey: str) -> Receipt:
    """The one that the miner signed; what a validator made up is none."""
    for record in records:
        receipt = record.miners[hotkey].receipt
        if receipt is not None and not receipt_problems(record, hotkey, receipt, verify):
            return receipt
    miner = records[0].miners[hotkey]
    why = miner.refused or miner.ours or "none that it signed is published"
    raise HivetrainError(f"nothing to audit: {hotkey} handed in no receipt ({why})")


def _steps(source: Source, records: Sequence[RoundRecord], hotkey: str, receipt: Receipt) -> bytes | None:
    """The step records that some validator had opened. What does not open the receipt is not the miner's."""
    _, recipe = source.genesis()
    for record in records:
        for proof in record.proofs:
            if (proof.kind, proof.hotkey) != ("steps", hotkey):
                continue
            path = evidence_path(record.round, proof.sha256)
            try:
                raw = source.store.read_artefact(source.repo, CHECKS_BRANCH, path, MAX_EVIDENCE_BYTES)
            except (HubNotFound, IntegrityError):
                continue
            if opens(receipt, raw, recipe.data.accumulation * recipe.data.batch_size):
                return raw
    return None
