"""Published checks: what they hold, what a reader computes again, and every way in which one can lie."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.errors import Fault, IntegrityError
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest
from hivetrain.run import MAX_SNAPSHOTS
from hivetrain.scoring import Bandwidth, CheckResult, RoundFacts, Unscored
from hivetrain.scoring.explain import (
    against_manifest,
    against_measures,
    compare,
    follows,
    proves,
    recompute,
    tell,
    two_receipts,
)
from hivetrain.scoring.published import MAX_STRANGERS, read_records
from hivetrain.scoring.record import (
    CHECKS_BRANCH,
    MAX_RECORD_BYTES,
    RoundRecord,
    evidence_path,
    measures_of,
    pack_evidence,
    parse_record,
    parse_record_path,
    record_path,
    sign_record,
)
from hivetrain.verification.judge import double_commit
from tests.hub_fixture import make_manifest
from tests.keys import verify
from tests.records_kit import MINERS, SCORING, SECOND, VALIDATOR, Ledger, base_ref, signed_receipt

ONE, TWO, THREE = (miner.hotkey for miner in MINERS)
LIE = CheckResult(distance=0.4, fault=Fault.WRONG_REPLAY, detail="window 2: replay distance 0.4; step 23")


def parsed(record: RoundRecord) -> RoundRecord:
    return parse_record(record.to_bytes(), validator=record.validator, round_number=record.round, verify=verify)


def problems(record: RoundRecord, hotkey: str = "") -> str:
    found = recompute(parsed(record), SCORING, verify).problems
    return " | ".join(f"{whose[:4]}: {why}" for whose, why in found if hotkey in ("", whose))


def resigned(record: RoundRecord, **changes: object) -> RoundRecord:
    """What the validator would sign if it lied."""
    return sign_record(record.model_copy(update=changes), VALIDATOR)


def lying(record: RoundRecord, hotkey: str, **changes: object) -> RoundRecord:
    miner = record.miners[hotkey].model_copy(update=changes)
    return resigned(record, miners={**record.miners, hotkey: miner})


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_every_score_average_and_share_of_a_history_is_computed_again_exactly(ledger: Ledger) -> None:
    ledger.round(0)
    ledger.round(1, results={TWO: LIE})
    ledger.round(2, results={THREE: CheckResult(fault=Fault.REFUSED, detail="silent")})
    ledger.round(3, missing={ONE: Unscored(why="our line was down")})
    ledger.round(4, bandwidth=None)
    ledger.round(5, miners=MINERS[:2])
    for before, record in zip([None, *ledger.records], ledger.records, strict=False):
        again = recompute(parsed(record), SCORING, verify)
        assert again.problems == ()
        assert again.after == record.after
        assert {hotkey: miner.published() for hotkey, miner in record.miners.items()} == dict(again.scores)
        if before is not None:
            assert follows(record, before) == []
    assert ledger.average.state == ledger.records[-1].after
    assert ledger.records[1].after.entries[TWO].value == 0


def test_the_reasons_are_told_line_by_line(ledger: Ledger) -> None:
    record = ledger.round(0, results={TWO: LIE})
    told = "\n".join(tell(record, TWO, recompute(record, SCORING, verify)))
    for words in (
        "receipt: ",
        "wrong_replay: window 2",
        "gradient: 0.0000",
        "score: 0.000000",
        "no pay before round 6",
    ):
        assert words in told
    unscored = ledger.round(1, missing={ONE: Unscored(why="our line was down")})
    assert "not scored, which changes nothing: our line was down" in "\n".join(
        tell(unscored, ONE, recompute(unscored, SCORING, verify))
    )


def test_a_score_that_does_not_follow_from_its_facts_is_found(ledger: Ledger) -> None:
    record = ledger.round(0)
    score = record.miners[ONE].score
    assert score is not None
    assert "published 0.5" in problems(lying(record, ONE, score=score.model_copy(update={"score": 0.5})), ONE)
    assert "published no score" in problems(lying(record, ONE, score=None, unscored="I would rather not"), ONE)


def test_an_average_or_a_share_that_does_not_follow_is_found(ledger: Ledger) -> None:
    ledger.round(0)
    record = ledger.round(1)
    entries = {**record.after.entries, ONE: record.after.entries[ONE].model_copy(update={"value": 0.9})}
    assert "average" in problems(resigned(record, after=record.after.model_copy(update={"entries": entries})), ONE)
    assert "share" in problems(resigned(record, shares={**record.shares, TWO: 0.9}), TWO)
    assert "not of the rounds" in problems(resigned(record, after=record.after.model_copy(update={"last_round": 7})))


def test_a_record_that_does_not_follow_from_the_one_before_is_found(ledger: Ledger) -> None:
    first, second = ledger.round(0), ledger.round(1)
    assert follows(second, first) == []
    other = Ledger()
    other.round(0, results={ONE: LIE})
    assert len(follows(second, other.records[0])) == 2


def drawn_and_not(ledger: Ledger) -> tuple[RoundRecord, str, str]:
    """A round with a miner that was drawn and one that was not."""
    for number in range(20):
        record = ledger.round(number)
        drawn = {hotkey for hotkey, miner in record.miners.items() if miner.drawn}
        if drawn and len(drawn) < len(record.miners):
            return record, min(drawn), min(set(record.miners) - drawn)
    raise AssertionError("the coins of twenty rounds never chose some")


def test_draws_that_the_coins_do_not_make_are_found(ledger: Ledger) -> None:
    record, drawn, spared = drawn_and_not(ledger)
    assert "were drawn, the coins say" in problems(lying(record, drawn, drawn=(), checks=()), drawn)
    assert "were drawn, the coins say" in problems(lying(record, spared, drawn=(1,)), spared)
    assert "neither a result nor a failure" in problems(lying(record, drawn, checks=()), drawn)
    check = record.miners[drawn].checks[0].model_copy(update={"windows": (4, 3)})
    assert "not of the windows" in problems(lying(record, drawn, checks=(check,)), drawn)
    assert "the coins say" in problems(resigned(record, coins="ee" * 32))
    assert "owed a check" in problems(lying(record, spared, owed=True), spared)


def test_other_settings_and_a_wrong_cooldown_are_found(ledger: Ledger) -> None:
    record = ledger.round(0)
    assert "other settings" in problems(resigned(record, scoring_sha256="00" * 32))
    assert "cooldown" in problems(lying(record, ONE, cooldown_left=3), ONE)


def test_a_receipt_that_its_miner_did_not_sign_or_of_another_round_is_found(ledger: Ledger) -> None:
    record = ledger.round(0)
    receipt = record.miners[ONE].receipt
    assert receipt is not None
    forged = receipt.model_copy(update={"num_tokens": 99})
    assert "does not hold" in problems(lying(record, ONE, receipt=forged), ONE)
    other = signed_receipt(MINERS[0], 5, base_ref())
    assert "another run, round or base" in problems(lying(record, ONE, receipt=other), ONE)


def test_a_receipt_that_its_own_manifest_does_not_name_is_found(ledger: Ledger) -> None:
    record = ledger.round(0)
    receipt = record.miners[ONE].receipt
    assert receipt is not None
    manifest: Manifest = make_manifest(1, {}).model_copy(
        update={"parent": record.base_manifest, "leader": VALIDATOR.hotkey}
    )
    named = manifest.model_copy(update={"receipts": {ONE: receipt.sha256(), TWO: "ab" * 32, "stranger": "cd" * 32}})
    ((whose, why),), unsure = against_manifest(record, named, verify)
    assert (whose, why.startswith("the epoch's manifest names receipt abab"), unsure) == (TWO, True, [])


def test_another_base_than_the_parent_that_its_own_manifest_names_is_found(ledger: Ledger) -> None:
    record = ledger.round(0)
    manifest: Manifest = make_manifest(1, {}).model_copy(update={"parent": "0d" * 32, "leader": VALIDATOR.hotkey})
    ((whose, why),), unsure = against_manifest(record, manifest, verify)
    assert (whose, "but epoch 1 from 0d0d" in why, unsure) == ("", True, [])
    older = manifest.model_copy(update={"epoch": 2})
    assert against_manifest(record, older, verify) == ([], [])  # it started from an older epoch


def test_anothers_manifest_convicts_no_validator(ledger: Ledger) -> None:
    forged = signed_receipt(MINERS[2], 0, base_ref()).model_copy(update={"loss": 4.4})
    record = ledger.round(0, receipts={THREE: forged})
    manifest: Manifest = make_manifest(1, {}).model_copy(
        update={"parent": "0d" * 32, "leader": SECOND.hotkey, "receipts": {TWO: "ab" * 32, THREE: "cd" * 32}}
    )
    false, unsure = against_manifest(record, manifest, verify)
    assert (false, [whose for whose, _ in unsure]) == ([], ["", TWO, THREE])
    words = [why for _, why in unsure]
    assert words[0].endswith(f"but epoch 1 from 0d0d0d0d0d0d by the manifest of {SECOND.hotkey[:8]}")
    assert words[1].endswith(f"it signed two, or {SECOND.hotkey[:8]} names one that never was")
    assert "signed two" not in words[2]  # the one in the record is not the miner's


def test_two_validators_are_compared() -> None:
    ours, theirs = Ledger(), Ledger(SECOND)
    one, other = ours.round(0, results={TWO: LIE}), theirs.round(0)
    assert compare(one, other, ONE) == []
    assert any("check fail" in line for line in compare(one, other, TWO))
    second = signed_receipt(MINERS[2], 0, base_ref(), loss=4.4)
    third = Ledger(SECOND).round(0, receipts={THREE: second})
    assert any("proof that it signed two" in line for line in compare(one, third, THREE))
    assert compare(one, Ledger(SECOND).round(0, miners=MINERS[:2]), THREE) == [
        f"{VALIDATOR.hotkey[:8]} and {SECOND.hotkey[:8]}: only one of them has it"
    ]


def test_two_signed_receipts_in_two_records_are_a_proof_and_a_forged_one_is_not() -> None:
    second = signed_receipt(MINERS[2], 0, base_ref(), loss=4.4)
    one, other = Ledger().round(0), Ledger(SECOND).round(0, receipts={THREE: second})
    found = two_receipts([one, other], verify)
    assert list(found) == [THREE]
    assert {receipt.loss for receipt in found[THREE]} == {4.5, 4.4}
    verdict = double_commit(*found[THREE])
    assert verdict.fault is Fault.DOUBLE_COMMIT
    assert set(verdict.evidence) == {"first_receipt", "second_receipt"}
    forged = Ledger(SECOND).round(0, receipts={THREE: second.model_copy(update={"signature": "00" * 64})})
    assert two_receipts([one, forged], verify) == {}
    assert two_receipts([one, Ledger(SECOND).round(0)], verify) == {}


def test_the_median_of_the_validators_measures_is_computed_again_from_what_they_published() -> None:
    ours, theirs = Ledger(), Ledger(SECOND)
    slow = Bandwidth(size_bytes=10_000_000, seconds=8.0, in_time=True)  # 10 Mbit/s of 25
    before = [ours.round(0), theirs.round(0, bandwidth=slow)]
    record = ours.round(1, others=before)
    assert problems(record) == ""
    score = record.miners[ONE].score
    assert score is not None
    assert score.bandwidth == pytest.approx((0.8 + 0.4) / 2)
    assert against_measures(record, ONE, before) == ([], [])
    assert record.sources == {one.validator: one.sha256() for one in before}
    told = "\n".join(tell(record, ONE, recompute(record, SCORING, verify)))
    assert "10000000 bytes in 8.000 s, in time" in told
    assert "median of what 2 validators published" in told
    assert "the facts give" in problems(lying(record, ONE, measures={}), ONE)


def measured_twice() -> tuple[RoundRecord, list[RoundRecord], Ledger]:
    """A record of round 1 that took two validators' measures in; those of round 0; and the other one's ledger."""
    ours, theirs = Ledger(), Ledger(SECOND)
    before = [ours.round(0), theirs.round(0, bandwidth=Bandwidth(size_bytes=10_000_000, seconds=8.0, in_time=True))]
    return ours.round(1, others=before), before, theirs


def test_who_replaces_or_takes_away_its_record_makes_nobody_else_a_liar() -> None:
    record, (mine, other), theirs = measured_twice()
    name = f"{SECOND.hotkey[:8]}'s record of round 0, which it read as {other.sha256()[:12]},"
    replaced, following = Ledger(SECOND).round(0), theirs.round(1)
    assert following.previous == other.sha256() != replaced.sha256()
    said = f"{name} is another one now: {SECOND.hotkey[:8]} signed two, or there never was that one"
    assert against_measures(record, ONE, [mine, replaced]) == ([], [said])
    said = f"{name} was replaced by {SECOND.hotkey[:8]}: its next record names that one as the one before"
    assert against_measures(record, ONE, [mine, replaced], [following]) == ([], [said])
    for gone in ([], [following], [replaced.model_copy(update={"run_id": "cc" * 32})]):
        assert against_measures(record, ONE, [mine, *gone]) == ([], [f"{name} is not at the hub any more"])


def test_a_measure_that_its_validator_never_published_is_found() -> None:
    record, (mine, other), _ = measured_twice()
    faster = {name: one.model_copy(update={"seconds": 1.0}) for name, one in record.miners[ONE].measures.items()}
    for whose, words in (
        (SECOND.hotkey, f"{SECOND.hotkey[:8]} published no such measure of it in round 0"),
        (VALIDATOR.hotkey, f"{VALIDATOR.hotkey[:8]} published no such measure of it in round 0"),
    ):
        measures = {**record.miners[ONE].measures, whose: faster[whose]}
        assert against_measures(lying(record, ONE, measures=measures), ONE, [mine, other]) == ([words], [])
    made_up = lying(record, ONE, measures=faster)
    unnamed = resigned(made_up, sources={VALIDATOR.hotkey: "ab" * 32})
    assert against_measures(unnamed, ONE, [mine, other])[0] == [
        words
        for validator in record.miners[ONE].measures
        for words in (
            ["its own measure is of another record than the one that it follows"]
            if validator == VALIDATOR.hotkey
            else [f"it has a measure of {SECOND.hotkey[:8]}'s, and names no record that it read it in"]
        )
    ]


def test_a_wait_that_no_cooldown_gives_is_found(ledger: Ledger) -> None:
    ledger.round(0)
    record = ledger.round(1)
    for field, until in (("cooldown_until", 1 + SCORING.cooldown_rounds), ("paid_from", 1 << 40)):
        entry = record.before.entries[ONE].model_copy(update={field: until})
        before = record.before.model_copy(update={"entries": {**record.before.entries, ONE: entry}})
        assert ("no wait before round 1" in problems(resigned(record, before=before), ONE)) == (until > 1 << 30)


def test_who_did_not_take_part_has_no_rate() -> None:
    late = Bandwidth(size_bytes=10_000_000, seconds=8.0, in_time=False)
    assert measures_of([Ledger().round(0, bandwidth=late), Ledger(SECOND).round(0, bandwidth=None)]) == {}
    assert set(measures_of([Ledger().round(0)])) == {ONE, TWO, THREE}


def test_a_proof_that_is_said_must_be_published(ledger: Ledger) -> None:
    record = ledger.round(0)
    first = record.miners[THREE].receipt
    assert first is not None
    second = signed_receipt(MINERS[2], 0, base_ref(), loss=4.4)
    verdict = double_commit(first, second)
    record = ledger.round(1, results={THREE: verdict})
    assert recompute(record, SCORING, verify).problems == ()
    assert {proof.kind for proof in record.proofs} == {"first_receipt", "second_receipt"}
    assert proves(Fault.DOUBLE_COMMIT, THREE, verdict.evidence, verify)
    assert "first_receipt, second_receipt not published" in problems(resigned(record, proofs=()), THREE)
    padded = (*record.proofs, record.proofs[0].model_copy(update={"sha256": "ab" * 32}))
    assert "2 proofs first_receipt are published, and one says it" in problems(resigned(record, proofs=padded), THREE)
    same = {"first_receipt": first.to_bytes(), "second_receipt": first.to_bytes()}
    other = {**verdict.evidence, "second_receipt": signed_receipt(MINERS[2], 5, base_ref()).to_bytes()}
    for unproved in (same, other, {}, {**verdict.evidence, "first_receipt": b"{"}):
        assert not proves(Fault.DOUBLE_COMMIT, THREE, unproved, verify)
    assert not proves(Fault.WRONG_REPLAY, THREE, verdict.evidence, verify)


# -- bytes of strangers ---------------------------------------------------------------------------------------


def refused(raw: bytes, validator: str = VALIDATOR.hotkey, round_number: int = 0) -> str:
    with pytest.raises(IntegrityError) as caught:
        parse_record(raw, validator=validator, round_number=round_number, verify=verify)
    return str(caught.value)


def changed(record: RoundRecord, path: tuple[str, ...], value: Any) -> bytes:
    fields = json.loads(record.to_bytes())
    at = fields
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(fields).encode()


def test_a_record_that_is_too_long_forged_or_anothers_is_refused(ledger: Ledger) -> None:
    record = ledger.round(0)
    assert "limit" in refused(b" " * (MAX_RECORD_BYTES + 1))
    assert "cannot be read" in refused(b"{")
    assert "forged" in refused(record.model_copy(update={"coins": "00" * 32}).to_bytes())
    assert "forged" in refused(record.model_copy(update={"signature": ""}).to_bytes())
    assert "is of" in refused(record.to_bytes(), validator=SECOND.hotkey)
    assert "is of" in refused(record.to_bytes(), round_number=1)
    assert "forged" in refused(
        record.model_copy(update={"validator": SECOND.hotkey}).to_bytes(), validator=SECOND.hotkey
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("miners", ONE, "drawn"), [MAX_SNAPSHOTS]),
        (("miners", ONE, "drawn"), list(range(MAX_SNAPSHOTS + 1))),
        (("miners", ONE, "score", "score"), 1.5),
        (("miners", ONE, "score", "score"), -0.1),
        (("miners", ONE, "bandwidth", "seconds"), 1e300),
        (("miners", ONE, "bandwidth", "size_bytes"), -1),
        (("miners", ONE, "measures"), {str(n): {"size_bytes": 1, "seconds": 1, "in_time": True} for n in range(17)}),
        (("miners", ONE, "refused"), "x" * 701),
        (("miners", ONE, "checks"), [{"detail": "x"}] * 5),
        (("miners", ONE, "checks"), [{"fault": "ugly"}]),
        (("miners", ONE, "surprise"), 1),
        (("after", "entries", ONE, "value"), 7),
        (("after", "entries"), {str(number): {} for number in range(4097)}),
        (("round",), 1 << 60),
        (("coins",), "00"),
        (("proofs",), [{"kind": "STEPS", "hotkey": "a", "sha256": "00" * 32, "size_bytes": 1}]),
        (("proofs",), [{"kind": "steps", "hotkey": "a", "sha256": "00" * 32, "size_bytes": 1 << 40}]),
        (("miners",), {str(number): {} for number in range(257)}),
        (("version",), 2),
    ],
)
def test_what_is_out_of_bounds_is_no_record(path: tuple[str, ...], value: Any) -> None:
    assert "cannot be read" in refused(changed(Ledger().round(0), path, value))


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=200), at=st.integers(0, 3000), cut=st.integers(0, 3000))
def test_no_bytes_of_a_stranger_do_worse_than_being_refused(raw: bytes, at: int, cut: int) -> None:
    good = _GOOD
    refused(raw)
    refused(good[:at] + raw + good[at + cut + 1 :])


_GOOD = Ledger().round(0).to_bytes()


def test_paths_are_read_back_and_nothing_else_is_a_path() -> None:
    assert parse_record_path(record_path(42, ONE)) == (42, ONE)
    for path in (
        "checks/round-42/x.json",
        f"checks/round-0000042/{ONE}.json",
        "checks/round-000042/../x.json",
        "checks/round-000042/x.bin",
        evidence_path(42, "00" * 32),
    ):
        assert parse_record_path(path) is None


def test_evidence_lies_under_its_digest_and_what_is_too_long_stays_out() -> None:
    proofs, files = pack_evidence({ONE: {"steps": b"abc"}, TWO: {"wrong_average": bytes((8 << 20) + 1)}})
    digest = hashlib.sha256(b"abc").hexdigest()
    assert files == {digest: b"abc"}
    assert [(proof.kind, proof.hotkey, proof.sha256, proof.size_bytes) for proof in proofs] == [
        ("steps", ONE, digest, 3)
    ]


def test_records_are_read_from_a_store_and_forged_ones_are_named(ledger: Ledger) -> None:
    store, record = MemoryStore(), ledger.round(0)
    theirs = Ledger(SECOND).round(0)
    store.publish_artefacts(
        "a/b",
        CHECKS_BRANCH,
        {
            record_path(0, VALIDATOR.hotkey): record.to_bytes(),
            record_path(0, SECOND.hotkey): theirs.model_copy(update={"coins": "00" * 32}).to_bytes(),
            record_path(1, SECOND.hotkey): theirs.to_bytes(),
            "checks/round-000000/notes.txt": b"?",
        },
    )
    records, forged = read_records(store, "a/b", 0, verify)
    assert records == [record]
    assert list(forged) == [SECOND.hotkey]
    assert read_records(store, "a/b", 7, verify) == ([], {})


def test_strangers_files_do_not_crowd_out_those_who_are_known(ledger: Ledger) -> None:
    store, record = MemoryStore(), ledger.round(0)
    files = {record_path(0, f"0{number}"): b"junk" for number in range(2000)}
    files |= {evidence_path(0, f"{number:064x}"): b"" for number in range(2000)}
    store.publish_artefacts("a/b", CHECKS_BRANCH, files | {record_path(0, VALIDATOR.hotkey): record.to_bytes()})
    known = [VALIDATOR.hotkey, SECOND.hotkey]
    records, forged = read_records(store, "a/b", 0, verify, known)
    assert (records, len(forged)) == ([record], MAX_STRANGERS)
    assert read_records(store, "a/b", 0, verify, known, strangers=False) == ([record], {})
    assert read_records(store, "a/b", 0, verify, ["../round-000000/" + VALIDATOR.hotkey], strangers=False) == ([], {})


def test_a_record_without_sources_has_the_bytes_of_one_that_knows_no_such_field(ledger: Ledger) -> None:
    first = ledger.round(0)
    for raw in (first.to_bytes(), first.signed_bytes().split(b"\n", 1)[1]):
        assert "sources" not in json.loads(raw)
    assert parsed(first) == first
    second = ledger.round(1, others=[first])
    assert json.loads(second.to_bytes())["sources"] == {VALIDATOR.hotkey: first.sha256()}
    assert parsed(second) == second
    assert b"sources" in second.signed_bytes()


def test_facts_survive_their_publication(ledger: Ledger) -> None:
    record = parsed(ledger.round(0, results={TWO: LIE}))
    facts = record.miners[TWO].facts()
    assert isinstance(facts, RoundFacts)
    assert (facts.checks, facts.tokens) == ((LIE,), 12_800)
