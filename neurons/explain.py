"""`hivetrain explain`: why a miner has the score that it has, from public artefacts alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from hivetrain.errors import HubNotFound, IntegrityError
from hivetrain.hub.store import ArtefactReader
from hivetrain.manifest import Ref
from hivetrain.scoring import Score
from hivetrain.scoring.explain import (
    EVIDENCE,
    against_manifest,
    against_measures,
    against_recipe,
    compare,
    proves,
    recompute,
    tell,
)
from hivetrain.scoring.history import against_next, follow_back
from hivetrain.scoring.published import BoundedReader, ReadLimit, read_records
from hivetrain.scoring.record import CHECKS_BRANCH, MAX_EVIDENCE_BYTES, RoundRecord, evidence_path
from hivetrain.scoring.score import PROVEN
from neurons.sources import PublishedTerms, Source
from template.chain.keys import verify

VALIDATOR_FILES, VALIDATOR_BYTES = 1024, 1 << 30
"""What is read at most for one known validator's word: its chain, the measures that it names, its evidence."""
STRANGER_FILES, STRANGER_BYTES = 256, 64 << 20
"""What is read at most for the words of all strangers together: they are shown, and decide nothing."""


@dataclass(slots=True, kw_only=True)
class ValidatorsWord:
    """One validator's record, computed again.

    Attributes:
        lines: why, in words.
        problems: what in it does not hold for this miner.
        unsure: what nobody can tell any more from what lies at the hub; no fault of this validator's by that.
        elsewhere: how much does not hold for other miners.
        known: whether it is known for a validator; a stranger's word is shown, and decides nothing.
    """

    validator: str
    leads: bool
    known: bool
    record_sha256: str
    published: float | None
    recomputed: float | None
    average: float
    share: float
    lines: list[str]
    problems: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)
    elsewhere: int = 0


@dataclass(slots=True, kw_only=True)
class Explanation:
    """A miner's score of one epoch, as every validator gave it.

    Attributes:
        refused: what lies in the place of a known validator's record and is none that it signed, by validator.
    """

    epoch: int
    round: int
    hotkey: str
    run_id: str
    in_mean: bool
    words: list[ValidatorsWord] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every score of known validators is the recomputed one, as far as there are records that they signed.

        What nobody can tell any more contradicts nothing.
        """
        return not any(word.problems for word in self.words if word.known)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        from dataclasses import asdict

        return {**asdict(self), "holds": self.holds}

    def lines(self) -> list[str]:
        """What is printed."""
        found = [f"epoch {self.epoch} (round {self.round}) of run {self.run_id[:12]}, miner {self.hotkey}"]
        found.append("its vector is in the epoch's mean" if self.in_mean else "its vector is not in the epoch's mean")
        for word in self.words:
            role = ", the epoch's leader" if word.leads else "" if word.known else ", not known for a validator"
            found.append(f"validator {word.validator}{role}, record {word.record_sha256[:12]}")
            found += [f"  {line}" for line in word.lines]
            found += [f"  DIFFERS: {problem}" for problem in word.problems]
            found += [f"  UNDETERMINED: {reason}" for reason in word.unsure]
            if word.elsewhere:
                found.append(f"  note: {word.elsewhere} things do not hold for other miners")
            if not word.problems:
                found.append("  the published score is the recomputed one")
        found += [f"UNDETERMINED: {why}" for why in self.refused.values()]
        found += [f"validators differ: {line}" for line in self.differences]
        return found


def explain(source: Source, epoch: int, hotkey: str) -> Explanation:
    """Compute again what every validator made of ``hotkey`` in the round that made ``epoch``.

    Raises:
        ConfigError: no such epoch, or no such miner in it.
        HivetrainError: no record, or the hub does not answer.
    """
    terms = source.terms()
    ref = source.epoch(epoch, verify)
    hotkey, records, refused = source.records(ref, hotkey, verify)
    manifest = ref.manifest
    found = Explanation(
        epoch=epoch,
        round=manifest.round,
        hotkey=hotkey,
        run_id=manifest.run_id,
        in_mean=hotkey in manifest.members,
        refused=refused,
    )
    known = source.validators(ref, verify)
    for_strangers = BoundedReader(source.store, max_files=STRANGER_FILES, max_bytes=STRANGER_BYTES)
    for record in sorted(records, key=lambda one: one.validator != manifest.leader):
        reader = for_strangers
        if record.validator in known:
            reader = BoundedReader(source.store, max_files=VALIDATOR_FILES, max_bytes=VALIDATOR_BYTES)
        word = _word(source, reader, record, hotkey, terms)
        word.leads = record.validator == manifest.leader
        word.known = record.validator in known
        false, unsure = against_manifest(record, manifest, verify)
        word.problems += [why for whose, why in false if whose in ("", hotkey)]
        word.unsure += [why for whose, why in unsure if whose in ("", hotkey)]
        found.words.append(word)
    for one, other in combinations([one for one in records if one.validator in known], 2):
        found.differences += compare(one, other, hotkey)
    return found


def _word(
    source: Source, reader: ArtefactReader, record: RoundRecord, hotkey: str, terms: PublishedTerms
) -> ValidatorsWord:
    again = recompute(record, terms.recipe.scoring, verify)
    there = _base(source, record)
    base = there if there is not None and there.manifest_sha256 == record.base_manifest else None
    found = [*again.problems, *against_recipe(record, terms, base)]
    said, score = record.miners[hotkey].published(), again.scores[hotkey]
    after = again.after.entries.get(hotkey)
    word = ValidatorsWord(
        validator=record.validator,
        leads=False,
        known=False,
        record_sha256=record.sha256(),
        published=said.score if isinstance(said, Score) else None,
        recomputed=score.score if isinstance(score, Score) else None,
        average=after.value if after is not None else 0.0,
        share=again.shares.get(hotkey, 0.0),
        lines=tell(record, hotkey, again),
        problems=[why for whose, why in found if whose in ("", hotkey)],
        elsewhere=sum(1 for whose, _ in found if whose not in ("", hotkey)),
    )
    if there is None:
        word.lines.append(f"epoch {record.epoch}, from which it started, is not kept any more")
    elif base is None:
        is_now, named = there.manifest_sha256[:12], record.base_manifest[:12]
        word.unsure.append(f"epoch {record.epoch} is {is_now} at the hub, and not {named}, from which it started")
    for look in (_measures, _evidence, _chain):
        try:
            look(reader, source.repo, record, hotkey, terms, word)
        except ReadLimit as exc:
            word.unsure.append(f"not everything that it names is read: {exc}")
    return word


def _base(source: Source, record: RoundRecord) -> Ref | None:
    """What lies as the epoch that it says it started from; None where nothing does, or nothing that is an epoch."""
    try:
        return source.store.resolve(record.epoch)
    except (HubNotFound, IntegrityError, ValueError):  # a record may name any epoch, and a tag hold anything
        return None


def _measures(
    reader: ArtefactReader, repo: str, record: RoundRecord, hotkey: str, _: PublishedTerms, word: ValidatorsWord
) -> None:
    """Hold what it read of others' measures against what they published."""
    measured = record.miners[hotkey].measures
    before, _refused = read_records(reader, repo, record.round - 1, verify, measured, strangers=False)
    false, unsure = against_measures(record, hotkey, before)
    word.problems += false
    try:
        if unsure:  # whoever replaced its own record names the first one in its next
            beside, _refused = read_records(reader, repo, record.round, verify, measured, strangers=False)
            unsure = against_measures(record, hotkey, before, beside)[1]
    finally:  # what is found already does not wait for what is past a limit
        word.unsure += unsure


def _chain(
    reader: ArtefactReader, repo: str, record: RoundRecord, hotkey: str, terms: PublishedTerms, word: ValidatorsWord
) -> None:
    """Follow the validator's records back."""
    chain = follow_back(reader, repo, record, hotkey, terms.recipe.scoring, verify)
    word.lines.append(f"it follows {chain.length} records of this validator, back to round {chain.first}")
    word.problems += chain.problems
    word.unsure += chain.unsure
    word.problems += against_next(reader, repo, record, verify)


def _evidence(
    reader: ArtefactReader, repo: str, record: RoundRecord, hotkey: str, _: PublishedTerms, word: ValidatorsWord
) -> None:
    """Look for faults that the record says are proved, and whose evidence does not prove them."""
    for fault in dict.fromkeys(check.fault for check in record.miners[hotkey].checks):
        if fault is None or fault not in PROVEN:
            continue
        # One of a kind: whoever names more than one is found by that, and costs no more reading.
        of_it = [proof for proof in record.proofs if proof.hotkey == hotkey and proof.kind in EVIDENCE[fault]]
        named = {proof.kind: proof.sha256 for proof in of_it}
        files = {kind: _file_of(reader, repo, record.round, digest) for kind, digest in named.items()}
        there = {kind: raw for kind, raw in files.items() if raw is not None}
        gone = sorted(files.keys() - there.keys())
        if gone:
            word.unsure.append(f"{fault.value} is said, and its {', '.join(gone)} is not at the hub (any more)")
        elif not proves(fault, hotkey, there, verify):
            word.problems.append(f"{fault.value} is said, and what is published does not prove it")


def _file_of(reader: ArtefactReader, repo: str, round_number: int, sha256: str) -> bytes | None:
    """A file of evidence; None where it is not there, or something else is."""
    try:
        raw = reader.read_artefact(repo, CHECKS_BRANCH, evidence_path(round_number, sha256), MAX_EVIDENCE_BYTES)
    except (HubNotFound, IntegrityError):
        return None
    return raw if hashlib.sha256(raw).hexdigest() == sha256 else None
