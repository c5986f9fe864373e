"""What a validator publishes of one round: everything from which its scores can be computed again.

One signed JSON file per validator and round on the run's hub. It holds facts and what was made of them; whoever reads
it believes neither: receipts carry their miners' signatures, draws follow from the revealed coins, scores and averages
are recomputed (`hivetrain.scoring.explain`). Evidence lies beside it, named by its sha256.

Sizes: at most 4 MiB for 256 miners; evidence at most 8 MiB a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import Fault, IntegrityError
from hivetrain.identity import Identity, Verify
from hivetrain.manifest import Hotkey, Sha256
from hivetrain.run import MAX_MINERS, MAX_SNAPSHOTS, Scoring
from hivetrain.scoring.average import AverageState, Round
from hivetrain.scoring.score import Bandwidth, CheckResult, RoundFacts, Score, Unscored
from hivetrain.validation import first_problem
from hivetrain.verification.receipt import Receipt

MAX_RECORD_BYTES = 4 << 20
MAX_EVIDENCE_BYTES = 8 << 20
MAX_PROOFS = 512
MAX_MEASURES = 16
"""Validators whose measures of one miner are taken in; three of them sit in an all-reduce."""
CHECKS_BRANCH = "checks"
"""Branch of the run's repository on which the records lie."""

_PATH = re.compile(r"checks/round-([0-9]{6,15})/([A-Za-z0-9]{1,64})\.json")

Words = Annotated[str, Field(max_length=700)]
Unit = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1e18)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Windows = Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_SNAPSHOTS)], ...], Field(max_length=MAX_SNAPSHOTS)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CheckRecord(_Frozen):
    """`CheckResult`, without its evidence."""

    distance: Amount | None = None
    fault: Fault | None = None
    detail: Words = ""
    windows: Windows = ()
    distances: Annotated[tuple[Amount, ...], Field(max_length=MAX_SNAPSHOTS)] = ()
    first_wrong_step: Count | None = None

    def result(self) -> CheckResult:
        """As `score_round` takes it."""
        return CheckResult(**dict(self))


class BandwidthRecord(_Frozen):
    """`Bandwidth`."""

    size_bytes: Count
    seconds: Amount
    in_time: bool
    fault: Words = ""

    def measured(self) -> Bandwidth:
        """As `score_round` takes it."""
        return Bandwidth(**dict(self))


class ScoreRecord(_Frozen):
    """`Score`."""

    gradient: Unit
    steps: Unit
    bandwidth: Unit
    score: Unit
    lied: bool = False
    refused: bool = False
    passed: bool = False
    reasons: Annotated[dict[Annotated[str, Field(max_length=32)], Words], Field(max_length=8)] = {}


class MinerRecord(_Frozen):
    """What one validator knows of one miner after the round, and what it made of that.

    Attributes:
        receipt: as it was received; None where there was none, or it was refused, for the reason in ``refused``.
        rank: whose assignment it had, by the chain at the round's first block.
        drawn: the windows that the coins chose; empty: not checked.
        owed: it had refused its last check, and was drawn whatever the coins said.
        checks: results; the last one may be of an earlier round's receipts.
        bandwidth: what this validator measured of its sending in this round.
        measures: what validators said of that in their records of the round before, by validator.
        ours: what failed on the validator's own side, in words; "" where nothing did.
        unscored: why there is no ``score``.
    """

    receipt: Receipt | None = None
    rank: Annotated[int, Field(ge=0, lt=MAX_MINERS)] | None = None
    refused: Words = ""
    drawn: Windows = ()
    owed: bool = False
    checks: Annotated[tuple[CheckRecord, ...], Field(max_length=4)] = ()
    bandwidth: BandwidthRecord | None = None
    measures: Annotated[dict[Hotkey, BandwidthRecord], Field(max_length=MAX_MEASURES)] = {}
    cooldown_left: Count = 0
    ours: Words = ""
    unscored: Words = ""
    score: ScoreRecord | None = None

    def facts(self) -> RoundFacts | Unscored:
        """As `score_round` takes them."""
        if self.ours:
            return Unscored(why=self.ours)
        return RoundFacts(
            tokens=self.receipt.num_tokens if self.receipt is not None else 0,
            receipt_fault=self.refused,
            checks=tuple(check.result() for check in self.checks),
            bandwidth=self.bandwidth.measured() if self.bandwidth is not None else None,
            measures={validator: one.measured() for validator, one in self.measures.items()},
            cooldown_left=self.cooldown_left,
        )

    def published(self) -> Score | Unscored:
        """What the validator says."""
        if self.score is None:
            return Unscored(why=self.unscored)
        return Score(**dict(self.score))


class Proof(_Frozen):
    """A file of evidence beside the record."""

    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    hotkey: Hotkey
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0, le=MAX_EVIDENCE_BYTES)]


class RoundRecord(_Frozen):
    """One validator's checks of one round.

    Attributes:
        epoch, base_manifest: what the round started from.
        block_hash: of the challenge; "" where nothing was drawn.
        coins: hex, revealed; every miner had their digest before it committed.
        scoring_sha256: of the recipe's scoring table.
        before, after: the moving averages around this round; ``gone``: whom the subnet no longer had.
        shares: what the averages make of the pay, by hotkey.
        previous: sha256 of this validator's last record, "" for its first; its ``after`` is this one's ``before``.
        sources: sha256 of the records whose measures of the round before were taken in, by validator: whoever replaces
            one of them afterwards makes nobody else a liar. Where there are none the file has no such field.
    """

    version: Annotated[int, Field(ge=1, le=1)] = 1
    run_id: Sha256
    round: Round
    epoch: Count
    base_manifest: Sha256
    validator: Hotkey
    block_hash: Annotated[str, Field(max_length=80)] = ""
    coins: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scoring_sha256: Sha256
    miners: Annotated[dict[Hotkey, MinerRecord], Field(max_length=MAX_MINERS)]
    before: AverageState
    after: AverageState
    gone: Annotated[tuple[Hotkey, ...], Field(max_length=4096)] = ()
    shares: Annotated[dict[Hotkey, Unit], Field(max_length=4096)] = {}
    proofs: Annotated[tuple[Proof, ...], Field(max_length=MAX_PROOFS)] = ()
    previous: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    sources: Annotated[dict[Hotkey, Sha256], Field(max_length=4096)] = {}
    signature: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){0,128}$")] = ""

    def signed_bytes(self) -> bytes:
        """Every field but the signature, canonical JSON behind a tag."""
        return b"hivetrain-checks/1\n" + self._without("signature")

    def to_bytes(self) -> bytes:
        """The file."""
        return self._without()

    def _without(self, *names: str) -> bytes:
        empty = () if self.sources else ("sources",)
        return _canonical(self.model_dump(mode="json", exclude={*names, *empty}))

    def sha256(self) -> str:
        """Hex digest of the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def scoring_sha256(scoring: Scoring) -> str:
    """Digest of the recipe's scoring table: canonical JSON of its fields."""
    fields = {name: getattr(scoring, name) for name in Scoring.__dataclass_fields__}
    return hashlib.sha256(b"hivetrain-scoring/1\n" + _canonical(fields)).hexdigest()


def sign_record(record: RoundRecord, identity: Identity) -> RoundRecord:
    """``record`` with its validator's signature."""
    return record.model_copy(update={"signature": identity.sign(record.signed_bytes()).hex()})


def parse_record(raw: bytes, *, validator: str, round_number: int, verify: Verify) -> RoundRecord:
    """Parse and authenticate the record that lies under ``validator``'s name in ``round_number``.

    Raises:
        IntegrityError: too long, no record, another's, or not signed by it.
    """
    label = f"the record of {validator} for round {round_number}"
    if len(raw) > MAX_RECORD_BYTES:
        raise IntegrityError(f"{label} has {len(raw)} bytes, the limit is {MAX_RECORD_BYTES}")
    try:
        record = RoundRecord.model_validate_json(raw)
    except ValidationError as exc:
        first = first_problem(exc)
        raise IntegrityError(f"{label} cannot be read: field {first.where!r}: {first.message}") from exc
    if (record.validator, record.round) != (validator, round_number):
        raise IntegrityError(f"{label} is of {record.validator} and round {record.round}")
    if not verify(validator, record.signed_bytes(), bytes.fromhex(record.signature)):
        raise IntegrityError(f"{label} is forged: the signature is not {validator}'s")
    return record


def record_path(round_number: int, validator: str) -> str:
    """Where a record lies on `CHECKS_BRANCH`."""
    return f"checks/round-{round_number:06d}/{validator}.json"


def record_folder(round_number: int) -> str:
    """The folder of one round's records."""
    return f"checks/round-{round_number:06d}"


def parse_record_path(path: str) -> tuple[int, str] | None:
    """Round and validator of a record's path; None for any other path."""
    match = _PATH.fullmatch(path)
    return (int(match[1]), match[2]) if match and record_path(int(match[1]), match[2]) == path else None


def evidence_path(round_number: int, sha256: str) -> str:
    """Where a file of evidence lies."""
    return f"{record_folder(round_number)}/evidence/{sha256}.bin"


def check_record_of(result: CheckResult) -> CheckRecord:
    """``result`` as it is published."""
    return CheckRecord(
        distance=result.distance,
        fault=result.fault,
        detail=result.detail,
        windows=result.windows,
        distances=result.distances,
        first_wrong_step=result.first_wrong_step,
    )


def miner_record(
    facts: RoundFacts | Unscored,
    score: Score | Unscored,
    *,
    receipt: Receipt | None,
    rank: int | None = None,
    drawn: tuple[int, ...] = (),
    owed: bool = False,
) -> MinerRecord:
    """What is published of one miner."""
    fields: dict[str, Any] = {"ours": facts.why} if isinstance(facts, Unscored) else _known(facts)
    fields |= {"unscored": score.why} if isinstance(score, Unscored) else {"score": _score_record(score)}
    return MinerRecord(receipt=receipt, rank=rank, drawn=drawn, owed=owed, **fields)


def _known(facts: RoundFacts) -> dict[str, Any]:
    return {
        "refused": facts.receipt_fault,
        "checks": tuple(check_record_of(check) for check in facts.checks),
        "bandwidth": _bandwidth_record(facts.bandwidth) if facts.bandwidth is not None else None,
        "measures": {validator: _bandwidth_record(one) for validator, one in facts.measures.items()},
        "cooldown_left": facts.cooldown_left,
    }


def _bandwidth_record(measured: Bandwidth) -> BandwidthRecord:
    return BandwidthRecord(
        size_bytes=measured.size_bytes,
        seconds=measured.seconds,
        in_time=measured.in_time,
        fault=measured.fault,
    )


def measures_of(records: Iterable[RoundRecord]) -> dict[str, dict[str, Bandwidth]]:
    """How fast validators found each miner in one round: by miner, by validator. Who did not take part has no rate."""
    found: dict[str, dict[str, Bandwidth]] = {}
    for record in records:
        for hotkey, miner in record.miners.items():
            one = miner.bandwidth
            if one is not None and one.size_bytes > 0 and one.in_time and not one.fault:
                known = found.setdefault(hotkey, {})
                if len(known) < MAX_MEASURES:
                    known[record.validator] = one.measured()
    return found


def _score_record(score: Score) -> ScoreRecord:
    return ScoreRecord(
        gradient=score.gradient,
        steps=score.steps,
        bandwidth=score.bandwidth,
        score=score.score,
        lied=score.lied,
        refused=score.refused,
        passed=score.passed,
        reasons=dict(score.reasons),
    )


def pack_evidence(found: Mapping[str, Mapping[str, bytes]]) -> tuple[tuple[Proof, ...], dict[str, bytes]]:
    """Proofs for a record, and their files by digest.

    Args:
        found: bytes by kind, by hotkey. What is too long or too many stays out.
    """
    proofs: list[Proof] = []
    files: dict[str, bytes] = {}
    for hotkey, kinds in sorted(found.items()):
        for kind, raw in sorted(kinds.items()):
            if len(raw) > MAX_EVIDENCE_BYTES or len(proofs) >= MAX_PROOFS:
                continue
            digest = hashlib.sha256(raw).hexdigest()
            files[digest] = raw
            proofs.append(Proof(kind=kind, hotkey=hotkey, sha256=digest, size_bytes=len(raw)))
    return tuple(proofs), files
