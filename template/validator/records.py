"""What this validator publishes of a round, and what it reads of the others': off the model's thread.

A record is first written to disk, then its round is counted, then it is uploaded: an outage of the hub delays it, and
neither loses a round nor changes a score. A round whose record the disk does not take is not counted, for the next
record could not follow from it; one rename, of the folder that is uploaded, decides. Averages that were lost are taken
from the newest record, here or on the hub. Two receipts that one miner signed for one round come to light here, when
another validator's record holds another one than ours.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import msgpack
from pydantic import BaseModel, ValidationError

from hivetrain.averaging.group import plan_to_dict
from hivetrain.errors import Fault, ServiceError
from hivetrain.hub.store import ArtefactStore
from hivetrain.identity import Identity, Verify
from hivetrain.manifest import Ref
from hivetrain.run import Scoring
from hivetrain.scoring import AverageState, Bandwidth, CheckResult, RoundFacts, Score, Unscored
from hivetrain.scoring.explain import proves, two_receipts
from hivetrain.scoring.history import last_record
from hivetrain.scoring.published import ReadLimit, read_records
from hivetrain.scoring.record import (
    CHECKS_BRANCH,
    MAX_RECORD_BYTES,
    RoundRecord,
    evidence_path,
    measures_of,
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
"""Rounds whose records wait for a hub that does not answer with all their evidence; older ones wait without it."""
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
    sources: Mapping[str, str] = MappingProxyType({}),
) -> tuple[RoundRecord, dict[str, bytes]]:
    """One round's record, signed, and the files of evidence by sha256.

    Args:
        sources: sha256 of the records that measures could be taken from, by validator; those that were are named.
    """
    taken = {validator for one in facts.values() if isinstance(one, RoundFacts) for validator in one.measures}
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
        sources={validator: digest for validator, digest in sources.items() if validator in taken},
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


class _Last(BaseModel):
    """Our newest record that was put: it lies ready for upload, or on the hub."""

    run_id: str
    round: int
    sha256: str
    after: AverageState


class RecordsThread:
    """Uploads records, oldest first, and reads what other validators published. Its methods never wait for the hub.

    Args:
        folder: where records wait; survives a restart.
        me: our own hotkey.
        validators: hotkeys with a permit: nobody else's records are read.
    """

    def __init__(
        self,
        store: ArtefactStore,
        repo: str,
        folder: Path,
        me: str,
        verify: Verify,
        validators: Callable[[], Collection[str]],
    ) -> None:
        self._store = store
        self._repo = repo
        self._folder = folder
        self._me = me
        self._verify = verify
        self._validators = validators
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._to_read: deque[int] = deque(maxlen=4)
        self._others: dict[int, list[RoundRecord]] = {}
        self._run_id: str | None = None
        self._newest: _Last | None = None
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

    def recover(self, run_id: str, now: int) -> AverageState | None:
        """Where the averages stand by our newest record of the run, here or on the hub; None before the first.

        Args:
            now: the round under way.

        Raises:
            HubError: the hub does not answer.
            ReadLimit: we have none here, and what lies under our name there is too much to find one.
        """
        self._run_id = run_id
        self._finish_put()
        here = self._newest = self._last()
        if here is not None and here.run_id != run_id:  # of a run before this one in the same folder
            here = self._newest = None
            (self._folder / "last.json").unlink(missing_ok=True)
        after = here.round if here is not None else -1
        try:
            there = last_record(self._store, self._repo, self._me, run_id, self._verify, now=now, after=after)
        except ReadLimit as exc:
            if here is None:  # to begin anew would break our own chain
                raise ReadLimit(
                    f"our newest record is not found: {exc}; remove what is not ours, or is of another run, under "
                    f"{self._me} from the hub's branch {CHECKS_BRANCH}, or bring {self._folder / 'last.json'} back"
                ) from exc
            logger.warning("going on from our record of round %d, and not looking for a newer one: %s", after, exc)
            there = None
        if there is not None:
            logger.info("taking up the averages of our record of round %d", there.round)
            self._newest = _Last(run_id=run_id, round=there.round, sha256=there.sha256(), after=there.after)
            self._write_last(self._newest)
            self._count_last()
            return there.after
        return here.after if here is not None else None

    def previous(self, last_round: int) -> str:
        """Digest of the record that was put for ``last_round``; "" where the last one was of another round."""
        last = self._newest or self._last()
        return last.sha256 if last is not None and last.round == last_round else ""

    def put(self, record: RoundRecord, files: Mapping[str, bytes]) -> bool:
        """Keep a record for upload; False where it could not be kept: then its round must not count."""
        raw = record.to_bytes()
        if len(raw) > MAX_RECORD_BYTES:
            logger.error("the record of round %d has %d bytes, too many to publish", record.round, len(raw))
            return False
        ready = self._ready(record.round)
        temporary = ready.with_suffix(".tmp")
        last = _Last(run_id=record.run_id, round=record.round, sha256=record.sha256(), after=record.after)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for name, content in {
                record_path(record.round, self._me): raw,
                **{evidence_path(record.round, digest): content for digest, content in files.items()},
            }.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            self._write_last(last)
            temporary.rename(ready)  # it is put, whatever happens from here on
        except OSError as exc:
            logger.error("the checks of round %d cannot be kept: %s", record.round, exc)
            shutil.rmtree(temporary, ignore_errors=True)
            return False
        self._newest = last
        try:
            self._count_last()
        except OSError as exc:
            logger.warning("the checks of round %d are kept; only the note of it is not: %s", last.round, exc)
        self._wake.set()
        return True

    def _ready(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:015d}"

    def _last(self, name: str = "last.json") -> _Last | None:
        try:
            return _Last.model_validate_json((self._folder / name).read_bytes())
        except (OSError, ValidationError):
            return None

    def _write_last(self, last: _Last) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "last.tmp").write_text(last.model_dump_json())

    def _count_last(self) -> None:
        (self._folder / "last.tmp").replace(self._folder / "last.json")

    def _finish_put(self) -> None:
        """Count the record that lies ready, and whose put was cut off before it was counted."""
        written = self._last("last.tmp")
        if written is None:
            return
        try:
            raw = (self._ready(written.round) / record_path(written.round, self._me)).read_bytes()
        except OSError:
            return
        if hashlib.sha256(raw).hexdigest() == written.sha256:
            self._count_last()

    def look_at(self, round_number: int) -> None:
        """Read the other validators' records of that round, some time soon."""
        self._to_read.append(round_number)
        self._wake.set()

    def others(self, round_number: int) -> list[RoundRecord]:
        """What was read of that round by now."""
        return self._others.get(round_number, [])

    def measures(self, round_number: int, ours: RoundRecord | None) -> dict[str, dict[str, Bandwidth]]:
        """What was published of that round's sending, by miner, by validator; of ours, if that is of that round."""
        mine = [ours] if ours is not None and ours.round == round_number else []
        return measures_of([*mine, *self.others(round_number)])

    def sources(self, round_number: int, ours: RoundRecord | None) -> dict[str, str]:
        """Digests of the records that `measures` reads, by validator."""
        mine = [ours] if ours is not None and ours.round == round_number else []
        return {one.validator: one.sha256() for one in [*mine, *self.others(round_number)]}

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
            for evidence in path.glob("checks/*/evidence"):
                logger.warning("the evidence of %s was never taken by the hub and is dropped", path.name)
                shutil.rmtree(evidence, ignore_errors=True)
        for path in waiting:
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
            others = set(self._validators()) - {self._me}
            try:
                found, refused = read_records(self._store, self._repo, number, self._verify, others, strangers=False)
            except ServiceError as exc:
                logger.info("cannot read the others' checks of round %d: %s", number, exc)
                continue
            for why in refused.values():
                logger.warning("%s", why)
            self._others = {known: rows for known, rows in self._others.items() if known > number - 4}
            self._others[number] = [one for one in found if self._run_id in (None, one.run_id)]


__all__ = ["RecordsThread", "build_record"]
