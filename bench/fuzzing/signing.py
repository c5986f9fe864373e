"""Receipts and records that a liar signs, and honest ones that somebody on the way alters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bench.fuzzing.choices import Choices, altered, flipped
from bench.fuzzing.guard import declared, require
from bench.fuzzing.samples import (
    CHEAT,
    EXPECTED,
    MINERS,
    ROUND,
    SCORING,
    VALIDATOR,
    examine,
    honest_receipt,
    honest_record,
    honest_records,
)
from hivetrain.errors import Fault, IntegrityError, PeerFault
from hivetrain.identity import Identity
from hivetrain.scoring import Bandwidth, MovingAverage, RoundFacts, Unscored, score_facts
from hivetrain.scoring.explain import proves, recompute
from hivetrain.scoring.record import RoundRecord, parse_record, sign_record
from hivetrain.scoring.score import CheckResult
from hivetrain.verification.challenge import Draw, draw
from hivetrain.verification.receipt import Receipt, check_receipt, parse_receipt, sign_receipt
from template.validator.collect import Collected
from template.validator.records import build_record
from template.validator.reward import gather_facts
from tests.keys import verify
from tests.records_kit import BLOCK_HASH, base_ref, signed_receipt

M = TypeVar("M", bound=BaseModel)
COINS = bytes([ROUND + 1]) * 32
REFUSALS = {Fault.OVERSIZED, Fault.MALFORMED, Fault.BAD_SIGNATURE}


def receipt(data: bytes) -> None:
    """A receipt: altered on its way, or signed by a liar; from its bytes to the published score."""
    choices = Choices(data)
    honest = honest_receipt()
    if choices.flag():
        _altered_on_its_way(honest, flipped(honest.to_bytes(), choices))
        return
    fields = altered(json.loads(honest.to_bytes()), choices)
    raw = _signed(fields, Receipt, sign_receipt, CHEAT)
    collected = Collected(receipts={one.hotkey: honest_receipt(one) for one in MINERS[1:]})
    try:
        found = parse_receipt(raw, hotkey=CHEAT.hotkey, verify=verify)
        check_receipt(found, EXPECTED)
        collected.receipts[CHEAT.hotkey] = found
    except PeerFault as exc:
        declared(exc, REFUSALS | {Fault.WRONG_SCHEMA})
        collected.refused[CHEAT.hotkey] = str(exc)
    _double_commit(honest, raw)
    publish(collected, {})


def _altered_on_its_way(honest: Receipt, raw: bytes) -> None:
    """What a relay leaves of a receipt is refused, or says what its miner signed; and it convicts nobody."""
    try:
        found = parse_receipt(raw, hotkey=honest.hotkey, verify=verify)
        require(found.signed_bytes() == honest.signed_bytes(), "a receipt that its miner never signed is taken")
    except PeerFault as exc:
        declared(exc, REFUSALS)
    for files in ((honest.to_bytes(), raw), (raw, honest.to_bytes()), (raw, raw)):
        pair = dict(zip(("first_receipt", "second_receipt"), files, strict=True))
        for one in MINERS:
            require(not proves(Fault.DOUBLE_COMMIT, one.hotkey, pair, verify), f"{one.hotkey} is convicted unheard")


def _double_commit(honest: Receipt, raw: bytes) -> None:
    """A liar's second receipt convicts the liar, where it is one, and never anybody else."""
    files = {"first_receipt": honest.to_bytes(), "second_receipt": raw}
    for one in MINERS[1:]:
        require(not proves(Fault.DOUBLE_COMMIT, one.hotkey, files, verify), "somebody else is convicted")
    proves(Fault.DOUBLE_COMMIT, CHEAT.hotkey, files, verify)


def publish(collected: Collected, checks: dict[str, CheckResult | None]) -> RoundRecord:
    """Score a round in which `CHEAT` did whatever it did, and publish it, as a validator does.

    Raises:
        Violation: the record does not hold, or the two honest miners have another score than without the cheat's doing.
    """
    before = MovingAverage(None, SCORING, honest_records()[0].after)
    draws = {hotkey: drawn_of(one) for hotkey, one in collected.receipts.items()}
    passed: dict[str, CheckResult | None] = {
        hotkey: CheckResult(distance=1e-5, detail="window", windows=one.windows, distances=(1e-5,) * len(one.windows))
        for hotkey, one in draws.items()
        if one.windows and hotkey not in checks
    }
    facts = gather_facts(
        miners=[one.hotkey for one in MINERS],
        collected=collected,
        checks=passed | checks,
        seen=(),
        average=before,
        round_number=ROUND,
    )
    facts = {hotkey: _with_bandwidth(fact) for hotkey, fact in facts.items()}
    scores = score_facts(facts, SCORING)
    honest = honest_record()
    for one in MINERS[1:]:
        require(scores[one.hotkey] == honest.miners[one.hotkey].published(), f"{one.hotkey} has another score")
    after = MovingAverage(None, SCORING, before.state)
    after.update(ROUND, scores, {one.hotkey for one in MINERS})
    made, _ = build_record(
        identity=VALIDATOR,
        run_id=honest.run_id,
        round_number=ROUND,
        base=base_ref(),
        block_hash=BLOCK_HASH,
        coins=COINS,
        scoring=SCORING,
        facts=facts,
        scores=scores,
        receipts=collected.receipts,
        ranks={one.hotkey: rank for rank, one in enumerate(MINERS)},
        draws=draws,
        owed=frozenset(),
        before=before.state,
        after=after.state,
        registered={one.hotkey for one in MINERS},
        shares=after.weights(),
        previous=honest.previous,
    )
    raw = made.to_bytes()
    record = parse_record(raw, validator=VALIDATOR.hotkey, round_number=ROUND, verify=verify)
    problems = recompute(record, SCORING, verify).problems
    require(not problems, f"an honest validator's record does not hold: {list(problems)[:2]}")
    return record


def drawn_of(receipt: Receipt) -> Draw:
    """What the round's coins say."""
    return draw(
        block_hash=BLOCK_HASH,
        validator=VALIDATOR.hotkey,
        miner=receipt.hotkey,
        coins=COINS,
        num_snapshots=receipt.num_snapshots,
        scoring=SCORING,
    )


def _with_bandwidth(fact: RoundFacts | Unscored) -> RoundFacts | Unscored:
    if isinstance(fact, Unscored):
        return fact
    fast = Bandwidth(size_bytes=10_000_000, seconds=4.0, in_time=True)
    return RoundFacts(
        tokens=fact.tokens,
        receipt_fault=fact.receipt_fault,
        checks=fact.checks,
        bandwidth=fact.bandwidth or fast,
        cooldown_left=fact.cooldown_left,
    )


def record(data: bytes) -> None:
    """A record: altered on its way, or signed by a validator that lies."""
    choices = Choices(data)
    honest = honest_record()
    if choices.flag():
        raw = flipped(honest.to_bytes(), choices)
    else:
        strange = [honest_receipt(one).model_dump(mode="json") for one in MINERS]
        strange.append(signed_receipt(CHEAT, 0, base_ref()).model_dump(mode="json"))
        fields = altered(json.loads(honest.to_bytes()), choices, strange)
        raw = _signed(fields, RoundRecord, sign_record, VALIDATOR)
    try:
        found = parse_record(raw, validator=VALIDATOR.hotkey, round_number=ROUND, verify=verify)
    except IntegrityError:
        return
    examine(found)


def _signed(fields: Any, kind: type[M], sign: Callable[[M, Identity], M], who: Identity) -> bytes:
    """``fields`` signed by ``who``, where anything can sign them at all."""
    raw = json.dumps(fields).encode()
    try:
        return sign(kind.model_validate_json(raw), who).model_dump_json().encode()
    except ValidationError:
        return raw


__all__ = ["COINS", "drawn_of", "publish", "receipt", "record"]
