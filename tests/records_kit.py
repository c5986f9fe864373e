"""Published checks of made-up rounds: signed receipts, real draws, real scores and averages, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hivetrain.manifest import Manifest, Ref
from hivetrain.run import Scoring
from hivetrain.scoring import Bandwidth, CheckResult, MovingAverage, RoundFacts, Unscored, score_facts
from hivetrain.scoring.record import RoundRecord, measures_of
from hivetrain.verification.challenge import Draw, draw
from hivetrain.verification.receipt import Receipt, sign_receipt
from template.validator.records import build_record
from tests.hub_fixture import make_manifest
from tests.keys import TestIdentity

SCORING = Scoring()
RUN_ID = "01" * 32
BLOCK_HASH = "0x" + "5a" * 32
FAST = Bandwidth(size_bytes=10_000_000, seconds=4.0, in_time=True)
MINERS = tuple(TestIdentity(number) for number in (1, 2, 3))
VALIDATOR, SECOND = TestIdentity(8), TestIdentity(9)


def signed_receipt(who: TestIdentity, round_number: int, base: Ref, **changes: object) -> Receipt:
    """What a miner hands in, with fields of your choice."""
    fields: dict[str, object] = {
        "run_id": RUN_ID,
        "round": round_number,
        "epoch": base.epoch,
        "base_manifest": base.manifest_sha256,
        "base_state": "03" * 32,
        "schema_hash": "04" * 32,
        "layout_hash": "05" * 32,
        "hotkey": who.hotkey,
        "rank": 0,
        "num_steps": 50,
        "num_samples": 200,
        "num_tokens": 12_800,
        "loss": 4.5,
        "data_digests": ["06" * 32],
        "steps_root": "08" * 32,
        "snapshots_root": "09" * 32,
        "num_snapshots": 5,
        "payload_root": "0a" * 32,
        "num_chunks": 660,
        "sketch": "00" * 1024,
    }
    return sign_receipt(Receipt.model_validate(fields | changes), who)


def base_ref(epoch: int = 0) -> Ref:
    """Some epoch to start from."""
    manifest: Manifest = make_manifest(epoch, {}, nonce="0" * 16)
    return Ref(epoch=epoch, commit="c", manifest=manifest)


class Ledger:
    """One validator that scores and records round after round."""

    def __init__(self, validator: TestIdentity = VALIDATOR) -> None:
        self.validator = validator
        self.average = MovingAverage(None, SCORING)
        self.records: list[RoundRecord] = []
        self.files: list[dict[str, bytes]] = []

    def drawn(self, hotkey: str, round_number: int, coins: bytes) -> Draw:
        """What the coins say."""
        return draw(
            block_hash=BLOCK_HASH,
            validator=self.validator.hotkey,
            miner=hotkey,
            coins=coins,
            num_snapshots=5,
            scoring=SCORING,
            owes=self.average.owes(hotkey),
        )

    def round(
        self,
        round_number: int,
        *,
        miners: Sequence[TestIdentity] = MINERS,
        results: Mapping[str, CheckResult] | None = None,
        missing: Mapping[str, Unscored] | None = None,
        receipts: Mapping[str, Receipt] | None = None,
        bandwidth: Bandwidth | None = FAST,
        others: Sequence[RoundRecord] = (),
    ) -> RoundRecord:
        """Score a round in which everyone who is drawn passes, but for ``results``.

        Args:
            others: records of the round before, whose measures count.
        """
        measures = measures_of(others)
        base, coins = base_ref(), bytes([round_number + 1]) * 32
        ranks = {one.hotkey: rank for rank, one in enumerate(miners)}
        held = {one.hotkey: signed_receipt(one, round_number, base, rank=ranks[one.hotkey]) for one in miners}
        held |= receipts or {}
        draws = {hotkey: self.drawn(hotkey, round_number, coins) for hotkey in held}
        owed = frozenset(hotkey for hotkey in held if self.average.owes(hotkey))
        facts: dict[str, RoundFacts | Unscored] = {}
        for hotkey in held:
            if missing and hotkey in missing:
                facts[hotkey] = missing[hotkey]
                continue
            windows = draws[hotkey].windows
            passed = CheckResult(distance=1e-5, detail="window", windows=windows, distances=(1e-5,) * len(windows))
            found = (results or {}).get(hotkey, passed if windows else None)
            facts[hotkey] = RoundFacts(
                tokens=held[hotkey].num_tokens,
                checks=(found,) if found is not None else (),
                bandwidth=bandwidth,
                measures=measures.get(hotkey, {}),
                cooldown_left=self.average.cooldown_left(hotkey, round_number),
            )
        scores = score_facts(facts, SCORING)
        before = self.average.state
        registered = {one.hotkey for one in miners}
        self.average.update(round_number, scores, registered)
        record, files = build_record(
            identity=self.validator,
            run_id=RUN_ID,
            round_number=round_number,
            base=base,
            block_hash=BLOCK_HASH,
            coins=coins,
            scoring=SCORING,
            facts=facts,
            scores=scores,
            receipts=held,
            ranks=ranks,
            draws=draws,
            owed=owed,
            before=before,
            after=self.average.state,
            registered=registered,
            shares=self.average.weights(),
            previous=self.records[-1].sha256() if self.records else "",
            sources={one.validator: one.sha256() for one in others},
        )
        self.records.append(record)
        self.files.append(files)
        return record
