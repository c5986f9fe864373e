"""A score, computed again from what a validator published, and told in words. Pure: no hub, no clock.

The record's facts are not believed where they can be checked: receipts must carry their miner's signature and say what
recipe and base say, draws must follow from the coins, scores from the facts, and the average after the round from the
one before. The rest is the validator's word: ranks, replay distances (`hivetrain audit` takes them again), what it
measured, what its own side missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgpack

from hivetrain.averaging.group import plan_from_dict
from hivetrain.averaging.proofs import proves_two_averages, proves_wrong_average
from hivetrain.contribution import Terms, expected_from, expected_receipt
from hivetrain.errors import Fault, PeerFault
from hivetrain.identity import Verify
from hivetrain.manifest import Manifest, Ref
from hivetrain.run import Scoring
from hivetrain.scoring.average import AverageState, Entry, MovingAverage
from hivetrain.scoring.record import BandwidthRecord, MinerRecord, RoundRecord, measures_of, scoring_sha256
from hivetrain.scoring.score import Score, Unscored, score_facts
from hivetrain.verification.challenge import draw
from hivetrain.verification.receipt import Receipt, parse_receipt, receipt_faults

MAX_PLAN_BYTES = 1 << 20
EVIDENCE = {
    Fault.DOUBLE_COMMIT: frozenset({"first_receipt", "second_receipt"}),
    Fault.WRONG_AVERAGE: frozenset({"wrong_average", "group_plan"}),
}
"""Kinds of files that must lie beside a record which names these faults in a check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """What follows from the facts of one record, and where the record says something else.

    Attributes:
        scores: by hotkey.
        after: the averages after the round; ``shares`` of the pay by hotkey.
        problems: what does not hold, in words, each with the hotkey that it concerns ("" for all of them).
    """

    scores: Mapping[str, Score | Unscored]
    after: AverageState
    shares: Mapping[str, float]
    problems: Sequence[tuple[str, str]]


def recompute(record: RoundRecord, scoring: Scoring, verify: Verify) -> Recomputed:
    """Take the step from the record's facts to its scores, averages and shares once more.

    Args:
        record: with its signature checked (`parse_record`).
        scoring: of the run's recipe.
        verify: checks miners' signatures.
    """
    problems: list[tuple[str, str]] = []
    if record.scoring_sha256 != scoring_sha256(scoring):
        problems.append(("", "scored under other settings than the recipe's"))
    average = MovingAverage(None, scoring, record.before)
    longest = record.before.last_round + 1 + scoring.cooldown_rounds
    for hotkey, entry in record.before.entries.items():
        if max(entry.cooldown_until, entry.paid_from) > longest:
            problems.append((hotkey, f"no wait before round {record.round} ends later than round {longest}"))
    for hotkey, miner in record.miners.items():
        problems += [(hotkey, problem) for problem in _miner_problems(record, hotkey, miner, average, scoring, verify)]
    scores = score_facts({hotkey: miner.facts() for hotkey, miner in record.miners.items()}, scoring)
    for hotkey, score in scores.items():
        published = record.miners[hotkey].published()
        if published != score:
            problems.append((hotkey, f"published {in_words(published)}, the facts give {in_words(score)}"))
    known = {*record.before.entries, *record.miners}
    average.update(record.round, scores, known - set(record.gone))
    after, shares = average.state, average.weights()
    for hotkey in sorted({*after.entries, *record.after.entries}):
        ours, theirs = after.entries.get(hotkey), record.after.entries.get(hotkey)
        if ours != theirs:
            problems.append((hotkey, f"the average after the round is {_entry(theirs)}, it follows {_entry(ours)}"))
    if (after.first_round, after.last_round) != (record.after.first_round, record.after.last_round):
        problems.append(("", "the averages are not of the rounds that they should be"))
    for hotkey in sorted({*shares, *record.shares}):
        if shares.get(hotkey, 0.0) != record.shares.get(hotkey, 0.0):
            problems.append(
                (hotkey, f"a share of {record.shares.get(hotkey, 0.0):.6f}, it follows {shares.get(hotkey, 0.0):.6f}")
            )
    return Recomputed(scores=scores, after=after, shares=shares, problems=tuple(problems))


def _miner_problems(
    record: RoundRecord, hotkey: str, miner: MinerRecord, average: MovingAverage, scoring: Scoring, verify: Verify
) -> list[str]:
    problems = []
    if miner.receipt is not None:
        problems += receipt_problems(record, hotkey, miner.receipt, verify)
    if not miner.ours and miner.cooldown_left != average.cooldown_left(hotkey, record.round):
        problems.append(f"a cooldown of {miner.cooldown_left} rounds is not what the average before says")
    if miner.owed != average.owes(hotkey):
        problems.append(f"whether it owed a check is {average.owes(hotkey)} by the average before, not {miner.owed}")
    drawn: tuple[int, ...] = ()
    if miner.receipt is not None and record.block_hash:
        drawn = draw(
            block_hash=record.block_hash,
            validator=record.validator,
            miner=hotkey,
            coins=bytes.fromhex(record.coins),
            num_snapshots=miner.receipt.num_snapshots,
            scoring=scoring,
            owes=miner.owed,
        ).windows
    if drawn != miner.drawn:
        problems.append(f"windows {list(miner.drawn)} were drawn, the coins say {list(drawn)}")
    if drawn and not miner.checks and not miner.ours:
        problems.append("it was drawn, and neither a result nor a failure of the validator's is published")
    kinds = Counter(proof.kind for proof in record.proofs if proof.hotkey == hotkey)
    problems += [
        f"{number} proofs {kind} are published, and one says it" for kind, number in kinds.items() if number > 1
    ]
    for check in miner.checks:
        if check.fault is None or check.fault not in EVIDENCE:
            continue
        missing = EVIDENCE[check.fault] - set(kinds)
        if missing:
            problems.append(f"{check.fault.value} is said, and {', '.join(sorted(missing))} not published")
    replayed = [check for check in miner.checks if check.windows]
    if any(check.windows != drawn[: len(check.windows)] for check in replayed):
        problems.append(f"the checks are not of the windows {list(drawn)} that were drawn")
    return problems


def receipt_problems(record: RoundRecord, hotkey: str, receipt: Receipt, verify: Verify) -> list[str]:
    """Why a receipt in a record is not one that ``hotkey`` signed for that round; empty where it is."""
    problems = []
    try:
        parse_receipt(receipt.to_bytes(), hotkey=hotkey, verify=verify)
    except PeerFault as exc:
        problems.append(f"its receipt does not hold: {exc.detail}")
    ours = (record.run_id, record.round, record.base_manifest)
    if (receipt.run_id, receipt.round, receipt.base_manifest) != ours:
        problems.append("its receipt is of another run, round or base")
    return problems


def follows(record: RoundRecord, previous: RoundRecord) -> list[str]:
    """What does not hold between a record and the one that it names as its previous, in words."""
    problems = []
    if record.run_id != previous.run_id:
        problems.append(f"the record of round {previous.round} is of another run")
    if record.previous != previous.sha256():
        problems.append(f"the record before is {previous.sha256()[:12]}, this one names {record.previous[:12]}")
    if record.before != previous.after:
        problems.append(f"the averages before round {record.round} are not those after round {previous.round}")
    return problems


def against_manifest(
    record: RoundRecord, manifest: Manifest, verify: Verify
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Receipts of the epoch's members that are not those that its manifest names, and another base than its parent.

    A manifest, its signature checked, is its leader's word. It shows the record false where that is its own validator;
    of another's, nobody can tell which of both is: a miner may have signed two receipts, and a tag may be anybody's.

    Returns:
        What is false, and what nobody can tell, in words, each with the hotkey that it concerns ("" for all of them).
    """
    leads = record.validator == manifest.leader
    found: list[tuple[str, str]] = []
    if record.epoch == manifest.epoch - 1 and record.base_manifest != manifest.parent:
        words = f"it starts from {record.base_manifest[:12]}, but epoch {manifest.epoch} from {manifest.parent[:12]}"
        found.append(("", words if leads else f"{words} by the manifest of {manifest.leader[:8]}"))
    for hotkey, digest in manifest.receipts.items():
        held = record.miners.get(hotkey)
        if held is None or held.receipt is None or held.receipt.sha256() == digest:
            continue
        words = f"the epoch's manifest names receipt {digest[:12]}, the record holds {held.receipt.sha256()[:12]}"
        if not leads and not receipt_problems(record, hotkey, held.receipt, verify):
            words += f", which the miner signed: it signed two, or {manifest.leader[:8]} names one that never was"
        found.append((hotkey, words))
    return (found, []) if leads else ([], found)


def against_recipe(record: RoundRecord, terms: Terms, base: Ref | None) -> list[tuple[str, str]]:
    """What in the record's receipts does not follow from the recipe, the base and the ranks, by hotkey.

    Args:
        base: the epoch that the record starts from. None where it is not kept any more, or another one took its place:
            its state, and who was in it, are then not looked at.
    """
    shared = Counter(miner.rank for miner in record.miners.values())
    problems = []
    for hotkey, miner in record.miners.items():
        if miner.rank is not None and shared[miner.rank] > 1:
            problems.append((hotkey, f"rank {miner.rank} is said of {shared[miner.rank]} miners"))
        if miner.receipt is not None:
            problems += [(hotkey, why) for why in _unlike(record, hotkey, miner.receipt, miner.rank, terms, base)]
    return problems


def against_measures(
    record: RoundRecord, hotkey: str, before: Sequence[RoundRecord], beside: Sequence[RoundRecord] = ()
) -> tuple[list[str], list[str]]:
    """Measures of ``hotkey`` in a record that are not what those validators published.

    Args:
        before: the validators' records of the round before, as they lie at the hub now; those that hold.
        beside: their records of the record's own round: each names, as its previous, what its owner had published.

    Returns:
        What is false, and what nobody can tell any more, for the record that was read is not there.
    """
    round_before = record.round - 1
    held = {one.validator: one for one in before if (one.run_id, one.round) == (record.run_id, round_before)}
    said = measures_of(held.values()).get(hotkey, {})
    signed = {(one.validator, one.previous) for one in beside if one.run_id == record.run_id}
    false: list[str] = []
    unsure: list[str] = []
    for validator, measure in record.miners[hotkey].measures.items():
        if said.get(validator) == measure.measured():
            continue
        named, name, there = record.sources.get(validator, ""), validator[:8], held.get(validator)
        whose = f"{name}'s record of round {round_before}, which it read as {named[:12]},"
        if not named:
            false.append(f"it has a measure of {name}'s, and names no record that it read it in")
        elif validator == record.validator and named != record.previous:
            false.append("its own measure is of another record than the one that it follows")
        elif there is None:
            unsure.append(f"{whose} is not at the hub any more")
        elif there.sha256() == named:
            false.append(f"{name} published no such measure of it in round {round_before}")
        elif (validator, named) in signed:
            unsure.append(f"{whose} was replaced by {name}: its next record names that one as the one before")
        else:
            unsure.append(f"{whose} is another one now: {name} signed two, or there never was that one")
    return false, unsure


def _unlike(
    record: RoundRecord, hotkey: str, receipt: Receipt, rank: int | None, terms: Terms, base: Ref | None
) -> list[str]:
    if rank is None:
        return ["its receipt is taken, and its rank not said"]
    if rank >= terms.recipe.data.max_miners:
        return [f"rank {rank} has no assignment: the recipe has {terms.recipe.data.max_miners} slots"]
    if base is not None:
        expected = expected_receipt(terms, base, record.round, hotkey, rank)
    else:
        expected = expected_from(
            terms,
            record.round,
            rank,
            epoch=record.epoch,
            base_manifest=record.base_manifest,
            base_state=receipt.base_state,
            was_in=True,
        )
    return [f"its receipt is to be refused: {fault.detail}" for fault in receipt_faults(receipt, expected)]


def two_receipts(records: Sequence[RoundRecord], verify: Verify) -> dict[str, tuple[Receipt, Receipt]]:
    """Miners that signed two different receipts for one round, as the records of several validators show it."""
    first: dict[str, Receipt] = {}
    found: dict[str, tuple[Receipt, Receipt]] = {}
    for record in records:
        for hotkey, miner in record.miners.items():
            receipt = miner.receipt
            if receipt is None or receipt_problems(record, hotkey, receipt, verify):
                continue
            other = first.setdefault(hotkey, receipt)
            same = (other.run_id, other.round) == (receipt.run_id, receipt.round)
            if same and other.signed_bytes() != receipt.signed_bytes():
                found.setdefault(hotkey, (other, receipt))
    return found


def proves(fault: Fault, hotkey: str, files: Mapping[str, bytes], verify: Verify) -> bool:
    """Whether published files of evidence, by kind, prove ``fault`` of ``hotkey``. Never raises."""
    try:
        if fault is Fault.DOUBLE_COMMIT:
            one, other = (
                parse_receipt(files[kind], hotkey=hotkey, verify=verify) for kind in ("first_receipt", "second_receipt")
            )
            same = (one.run_id, one.round) == (other.run_id, other.round)
            return same and one.signed_bytes() != other.signed_bytes()
        if fault is Fault.WRONG_AVERAGE:
            if len(files["group_plan"]) > MAX_PLAN_BYTES:
                return False
            plan = plan_from_dict(msgpack.unpackb(files["group_plan"], strict_map_key=True))
            evidence = files["wrong_average"]
            return hotkey in (proves_two_averages(evidence, plan, verify), proves_wrong_average(evidence, plan, verify))
    except (KeyError, PeerFault, TypeError, ValueError, msgpack.UnpackException):
        return False
    return False


def compare(ours: RoundRecord, theirs: RoundRecord, hotkey: str) -> list[str]:
    """What two validators say differently of one miner, in words."""
    one, other = ours.miners.get(hotkey), theirs.miners.get(hotkey)
    names = f"{ours.validator[:8]} and {theirs.validator[:8]}"
    if one is None or other is None:
        return [f"{names}: only one of them has it"]
    lines = []
    if ours.block_hash and theirs.block_hash and ours.block_hash != theirs.block_hash:
        lines.append(f"{names}: draw from different block hashes")
    if (one.receipt is None) != (other.receipt is None):
        lines.append(f"{names}: only one of them has its receipt")
    elif one.receipt is not None and other.receipt is not None and one.receipt.sha256() != other.receipt.sha256():
        lines.append(f"{names}: hold different receipts of it: a proof that it signed two")
    if one.rank != other.rank:
        lines.append(f"{names}: rank {one.rank} and {other.rank}")
    if any(check.fault for check in one.checks) != any(check.fault for check in other.checks):
        lines.append(f"{names}: only one of them saw a check fail")
    scores = [entry.score.score if entry.score is not None else None for entry in (one, other)]
    if scores[0] != scores[1]:
        shown = " and ".join("no score" if score is None else f"{score:.6f}" for score in scores)
        lines.append(f"{names}: {shown}")
    return lines


def tell(record: RoundRecord, hotkey: str, found: Recomputed) -> list[str]:
    """Why ``hotkey`` has the score that it has, line by line."""
    miner, facts = record.miners[hotkey], record.miners[hotkey].facts()
    lines = [_receipt_line(miner), _draw_line(record, miner)]
    lines += [f"measured: {_measure(one)} by {name[:8]}, round before" for name, one in sorted(miner.measures.items())]
    lines += [f"check: {check.result().in_words()}" for check in miner.checks]
    score = found.scores[hotkey]
    if isinstance(score, Unscored) or isinstance(facts, Unscored):
        why = score.why if isinstance(score, Unscored) else miner.ours
        lines.append(f"not scored, which changes nothing: {why}")
    else:
        lines += [
            f"{name}: {getattr(score, name):.4f}, {score.reasons[name]}" for name in ("gradient", "steps", "bandwidth")
        ]
        lines.append(f"score: {score.score:.6f} = gradient x (steps and bandwidth by the recipe's weights)")
    before, after = record.before.entries.get(hotkey), found.after.entries.get(hotkey)
    lines.append(f"average: {_entry(before)} -> {_entry(after)}")
    if after is not None and after.paid_from > record.round:
        lines.append(f"came new: its scores count from round {after.paid_from}")
    lines.append(f"share of the pay: {found.shares.get(hotkey, 0.0):.4f}")
    return lines


def _receipt_line(miner: MinerRecord) -> str:
    receipt = miner.receipt
    if receipt is None:
        return f"receipt: none, {miner.refused or miner.ours or 'and no reason given'}"
    return (
        f"receipt: {receipt.sha256()[:12]}, {receipt.num_steps} steps, {receipt.num_tokens} tokens, "
        f"loss {receipt.loss:.4f}, rank {receipt.rank}, signed"
    )


def _measure(measured: BandwidthRecord) -> str:
    when = measured.fault or ("in time" if measured.in_time else "late")
    return f"{measured.size_bytes} bytes in {measured.seconds:.3f} s, {when}"


def _draw_line(record: RoundRecord, miner: MinerRecord) -> str:
    if not miner.drawn:
        return "draw: not checked this round"
    why = "it had refused its last check" if miner.owed else f"coins and block {record.block_hash[:12]}"
    return f"draw: windows {', '.join(map(str, miner.drawn))}, by {why}"


def _entry(entry: Entry | None) -> str:
    if entry is None:
        return "none"
    words = [f"{entry.value:.6f}"]
    words += [f"no pay before round {entry.cooldown_until}"] * (entry.cooldown_until > 0)
    words += [f"{entry.refusals} checks refused"] * (entry.refusals > 0)
    return ", ".join(words)


def in_words(score: Score | Unscored) -> str:
    """One score in a few words."""
    if isinstance(score, Unscored):
        return f"no score ({score.why})"
    return f"{score.score:.6f} ({score.gradient:.4f}, {score.steps:.4f}, {score.bandwidth:.4f})"


__all__ = [
    "Recomputed",
    "against_manifest",
    "against_measures",
    "against_recipe",
    "compare",
    "follows",
    "proves",
    "receipt_problems",
    "recompute",
    "tell",
    "two_receipts",
]
