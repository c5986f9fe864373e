"""What this validator publishes of a round, and what it reads of the others': off the model's thread.

A record is first written to disk, then uploaded: an outage of the hub delays it, and neither loses a round nor changes
a score. Two receipts that one miner signed for one round come to light here, when another validator's record holds
another one than ours.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgpack

from hivetrain.averaging.group import plan_to_dict
from hivetrain.errors import Fault, ServiceError
from hivetrain.hub.store import ArtefactStore
from hivetrain.identity import Identity, Verify
from hivetrain.manifest import Ref
from hivetrain.run import Scoring
from hivetrain.scoring import AverageState, CheckResult, RoundFacts, Score, Unscored
from hivetrain.scoring.explain import proves, two_receipts
from hivetrain.scoring.published import read_records
from hivetrain.scoring.record import (
    CHECKS_BRANCH,
    MAX_RECORD_BYTES,
    RoundRecord,
    evidence_path,
    miner_record,
    pack_evidence,
    record_path,
    scoring_sha256,
    sign_record,
)
from hivetrain.verification.challenge import Draw
from hivetrain.verification.judge import double_commit
from hivetrain.verification.receipt import Receipt
from template.validator.reward import Seen

logger = logging.getLogger(__name__)

MAX_PENDING = 64
"""Rounds whose records wait for a hub that does not answer; the oldest are dropped."""
RETRY_S = 20.0
CLOSE_S = 5.0


def build_record(
    *,
    identity: Identity,
    run_id: str,
    round_number: int,
    base: Ref,
    block_hash: str,
    coins: bytes,
    scoring: Scoring,
    facts: Mapping[str, RoundFacts | Unscored],
    scores: Mapping[str, Score | Unscored],
    receipts: Mapping[str, Receipt],
    ranks: Mapping[str, int],
    draws: Mapping[str, Draw],
    owed: frozenset[str],
    before: AverageState,
    after: AverageState,
    registered: set[str],
    shares: Mapping[str, float],
    previous: str,
) -> tuple[RoundRecord, dict[str, bytes]]:
    """One round's record, signed, and the files of evidence by sha256."""
    proofs, files = pack_evidence(_evidence(facts))
    miners = {
        hotkey: miner_record(
            facts[hotkey],
            scores[hotkey],
            receipt=receipts.get(hotkey),
            rank=ranks.get(hotkey),
            drawn=draws[hotkey].windows if hotkey in draws else (),
            owed=hotkey in owed,
        )
        for hotkey in facts
    }
    record = RoundRecord(
        run_id=run_id,
        round=round_number,
        epoch=base.epoch,
        base_manifest=base.manifest_sha256,
        validator=identity.hotkey,
        block_hash=block_hash,
        coins=coins.hex(),
        scoring_sha256=scoring_sha256(scoring),
        miners=miners,
        before=before,
        after=after,
        gone=tuple(sorted({*before.entries, *facts} - registered)),
        shares=dict(shares),
        proofs=proofs,
        previous=previous,
    )
    return sign_record(record, identity), files


def proven_averages(seen: Seen, verify: Verify) -> dict[str, CheckResult]:
    """Reducers whose wrong mean the all-reduce left proof of; with the proof, and the plan to check it against."""
    found: dict[str, CheckResult] = {}
    for plan, outcome in seen:
        for fault in outcome.faults:
            if not fault.evidence or not fault.hotkey or fault.hotkey in found:
                continue
            files = {"wrong_average": fault.evidence, "group_plan": msgpack.packb(plan_to_dict(plan))}
            if proves(Fault.WRONG_AVERAGE, fault.hotkey, files, verify):
                found[fault.hotkey] = CheckResult(fault=Fault.WRONG_AVERAGE, detail=fault.detail, evidence=files)
    return found


def _evidence(facts: Mapping[str, RoundFacts | Unscored]) -> dict[str, dict[str, bytes]]:
    """Bytes by kind, by hotkey: what miners opened, second receipts, and proofs of wrong averages with their plans."""
    found: dict[str, dict[str, bytes]] = {}
    for hotkey, fact in facts.items():
        for check in fact.checks if isinstance(fact, RoundFacts) else ():
            found.setdefault(hotkey, {}).update(check.evidence)
    return found


class RecordsThread:
    """Uploads records, oldest first, and reads what other validators published. Its methods never wait for the hub.

    Args:
        folder: where records wait; survives a restart.
        me: our own hotkey.
    """

    def __init__(self, store: ArtefactStore, repo: str, folder: Path, me: str, verify: Verify) -> None:
        self._store = store
        self._repo = repo
        self._folder = folder
        self._me = me
        self._verify = verify
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._to_read: deque[int] = deque(maxlen=4)
        self._others: dict[int, list[RoundRecord]] = {}
        self._thread = threading.Thread(target=self._main, name="records", daemon=True)

    def start(self) -> None:
        """Begin; what an earlier process left is uploaded first."""
        self._thread.start()
        self._wake.set()

    def close(self) -> None:
        """Upload what waits, if the hub takes it at once."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def previous(self, last_round: int) -> str:
        """Digest of the record that was put for ``last_round``; "" where the last one was of another round."""
        try:
            last = json.loads((self._folder / "last.json").read_bytes())
            return str(last["sha256"]) if last["round"] == last_round else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def put(self, record: RoundRecord, files: Mapping[str, bytes]) -> None:
        """Keep a record for upload. A disk that does not take it costs the record, and nothing else."""
        raw = record.to_bytes()
        if len(raw) > MAX_RECORD_BYTES:
            logger.error("the record of round %d has %d bytes, too many to publish", record.round, len(raw))
            return
        ready = self._folder / f"round-{record.round:015d}"
        try:
            temporary = ready.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            for name, content in {
                record_path(record.round, self._me): raw,
                **{evidence_path(record.round, digest): content for digest, content in files.items()},
            }.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            temporary.rename(ready)
            (self._folder / "last.json").write_text(json.dumps({"round": record.round, "sha256": record.sha256()}))
        except OSError as exc:
            logger.warning("the checks of round %d are not published: %s", record.round, exc)
            return
        self._wake.set()

    def look_at(self, round_number: int) -> None:
        """Read the other validators' records of that round, some time soon."""
        self._to_read.append(round_number)
        self._wake.set()

    def others(self, round_number: int) -> list[RoundRecord]:
        """What was read of that round by now."""
        return self._others.get(round_number, [])

    def double_commits(self, ours: RoundRecord | None) -> dict[str, CheckResult]:
        """Who signed another receipt for the round of ``ours`` than the one that we hold, with both as evidence."""
        if ours is None:
            return {}
        return {hotkey: double_commit(*both) for hotkey, both in self._pairs(ours).items()}

    def _pairs(self, ours: RoundRecord) -> dict[str, tuple[Receipt, Receipt]]:
        pairs: dict[str, tuple[Receipt, Receipt]] = {}
        for other in self.others(ours.round):
            pairs |= two_receipts([ours, other], self._verify)
        return pairs

    def _main(self) -> None:
        while True:
            done = False
            try:
                done = self._upload_all()
                self._read_others()
            except Exception:  # the boundary of this thread: whatever it is, the next round tries again
                logger.exception("checks are not published")
            if self._closing.is_set():
                return
            self._wake.wait(None if done else RETRY_S)
            self._wake.clear()

    def _upload_all(self) -> bool:
        """Upload what waits; False where the hub does not take it now."""
        waiting = sorted(path for path in self._folder.glob("round-*") if path.suffix != ".tmp")
        for path in waiting[:-MAX_PENDING]:
            logger.warning("the checks of %s were never taken by the hub and are dropped", path.name)
            shutil.rmtree(path, ignore_errors=True)
        for path in waiting[-MAX_PENDING:]:
            try:
                files = {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}
                self._store.publish_artefacts(self._repo, CHECKS_BRANCH, files)
            except (ServiceError, OSError) as exc:
                logger.warning("checks wait to be published: %s", exc)
                return False
            shutil.rmtree(path, ignore_errors=True)
        return True

    def _read_others(self) -> None:
        while self._to_read and not self._closing.is_set():
            number = self._to_read.popleft()
            try:
                records, refused = read_records(self._store, self._repo, number, self._verify)
            except ServiceError as exc:
                logger.info("cannot read the others' checks of round %d: %s", number, exc)
                continue
            for why in refused.values():
                logger.warning("%s", why)
            found = [record for record in records if record.validator != self._me]
            self._others = {known: rows for known, rows in self._others.items() if known > number - 4}
            self._others[number] = found


__all__ = ["RecordsThread", "build_record"]
