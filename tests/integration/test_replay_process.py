"""The process that replays: the same verdicts as here, and its death, slowness or hub are our own failures.

And what anybody can do with what is on the hub: explain a score, and audit an epoch of an honest miner and of a cheat.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from hivetrain.contribution import Contribution
from hivetrain.errors import Fault, HivetrainError, ServiceError
from hivetrain.hub.client import HubStore, publish_dataset
from hivetrain.hub.folder import FolderStore, mirror
from hivetrain.manifest import Ref, parse_manifest
from hivetrain.run import Recipe
from hivetrain.scoring import AverageState, Bandwidth, CheckResult, MovingAverage, RoundFacts, score_facts
from hivetrain.scoring.record import (
    CHECKS_BRANCH,
    MAX_EVIDENCE_BYTES,
    RoundRecord,
    evidence_path,
    miner_record,
    pack_evidence,
    record_folder,
    record_path,
    sign_record,
)
from hivetrain.verification.challenge import Draw, draw
from hivetrain.verification.judge import Answer, Judge
from hivetrain.verification.receipt import sign_receipt
from hivetrain.verification.worker import ReplayProcess, WorkerSpec
from neurons import explain as explain_module
from neurons.audit import run_audit
from neurons.cli import app, main
from neurons.explain import explain
from neurons.sources import Source, open_source
from template.chain.keys import WalletIdentity, verify
from template.validator.collect import Collected
from template.validator.publish import sign_manifest
from template.validator.records import build_record
from template.validator.reward import gather_facts
from tests.hub_fixture import HubProcess, running_hub
from tests.round_kit import COINS, RECIPE, ROUND, VALIDATOR, WHOLE, World, identity, make_world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]
MINER = identity("miner")
REPO = "test/model"


@dataclasses.dataclass(kw_only=True)
class Place:
    """A run on a real hub, and a process that replays for it."""

    world: World
    base: Ref
    hub: HubProcess
    replay: ReplayProcess
    contribution: Contribution

    def draw(self) -> Draw:
        return Draw(hotkey=MINER.hotkey, windows=WHOLE)


def answer_of(contribution: Contribution) -> Answer:
    opened = {index: contribution.snapshots.open(index) for index in WHOLE}
    return Answer(
        openings={index: (snapshot.payload, proof) for index, (snapshot, proof) in opened.items()},
        steps=contribution.steps,
        status="opened",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("replay")
    with running_hub(folder / "hub") as hub:
        world = make_world(folder / "world")
        revision = publish_dataset(
            hub.url, "test/corpus", {"part.parquet": folder / "world" / "corpus" / "part.parquet"}
        )
        recipe: Recipe = dataclasses.replace(RECIPE, data=dataclasses.replace(RECIPE.data, revision=revision))
        (folder / "pinned").mkdir()
        (folder / "pinned" / "corpus").symlink_to(folder / "world" / "corpus")
        world = make_world(folder / "pinned", recipe)
        store = HubStore(endpoint=hub.url, repo=REPO)
        files = {name: world.store.read(world.base, name) for name in world.base.manifest.files}
        base = store.publish(world.base.manifest, files)
        spec = WorkerSpec(endpoint=hub.url, repo=REPO, token=None, run_id=world.parts.run_id, cache=folder / "cache")
        replay = ReplayProcess(spec)
        try:
            yield Place(world=world, base=base, hub=hub, replay=replay, contribution=world.contribution(MINER))
        finally:
            replay.close()


def test_it_judges_as_we_do_at_low_priority_and_on_one_thread(place: Place) -> None:
    waited: list[int] = []
    place.replay._on_wait = lambda: waited.append(1)
    place.replay.begin_round(place.base, ROUND, lambda: True)
    result = place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert result.fault is None, result
    assert result.windows == WHOLE
    assert result.distance is not None
    assert result.distance < 1e-3
    assert result.evidence == {"steps": place.contribution.steps}
    assert waited  # the thread that waits is not blocked
    assert place.replay.pid is not None
    assert psutil.Process(place.replay.pid).nice() == 10


def test_a_lie_is_a_lie_there_too(place: Place) -> None:
    place.replay.begin_round(place.base, ROUND, lambda: True)
    other = place.world.work(batches=place.world.bench.round_data(place.world.parts, ROUND, 1).batch)
    cheat = place.world.contribution(MINER, work=other)
    result = place.replay.judge(cheat.receipt, place.draw(), answer_of(cheat))
    assert (result.fault, result.first_wrong_step) == (Fault.WRONG_REPLAY, 0)


def test_one_that_stands_still_is_our_failure_and_the_next_one_takes_its_place(place: Place) -> None:
    place.replay.begin_round(place.base, ROUND, lambda: True)
    first = place.replay.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    place.replay._on_wait = lambda: os.kill(first, signal.SIGKILL)
    with pytest.raises(ServiceError, match="died"):
        place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert not psutil.pid_exists(first)
    place.replay._on_wait = lambda: None
    place.replay._in_time = lambda: False
    with pytest.raises(ServiceError, match="not done in time"):
        place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert place.replay.pid is None


def test_an_answer_to_another_question_is_nobodys_verdict(place: Place) -> None:
    """A wait that was broken off leaves its answer in the pipe."""

    class Interrupted(Exception):
        pass

    def interrupt() -> None:
        raise Interrupted

    place.replay.begin_round(place.base, ROUND, lambda: True)
    other = place.world.work(batches=place.world.bench.round_data(place.world.parts, ROUND, 1).batch)
    cheat = place.world.contribution(MINER, work=other)
    place.replay._on_wait = interrupt
    with pytest.raises(Interrupted):
        place.replay.judge(cheat.receipt, place.draw(), answer_of(cheat))
    place.replay._on_wait = lambda: None
    with pytest.raises(ServiceError, match="answered question"):
        place.replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    assert place.replay.pid is None


def test_a_run_that_it_cannot_open_is_our_failure(place: Place, tmp_path: Path) -> None:
    replay = ReplayProcess(dataclasses.replace(place.replay._spec, run_id="00" * 32, cache=tmp_path))
    try:
        replay.begin_round(place.base, ROUND, lambda: True)
        with pytest.raises(ServiceError, match="the replay failed here: IntegrityError"):
            replay.judge(place.contribution.receipt, place.draw(), answer_of(place.contribution))
    finally:
        replay.close()


# -- explain and audit ----------------------------------------------------------------------------------------

CHEAT, SILENT = identity("miner-2"), identity("miner-3")
WRONG_FROM = 5


@pytest.fixture(scope="module")
def source(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Epoch 1 and its checks on the hub, and a copy: an honest miner, a cheat, and one that handed in nothing."""
    world = place.world
    mine, theirs = (world.bench.round_data(world.parts, ROUND, rank).batch for rank in (1, 2))
    other_data = world.work(1, batches=lambda step: mine(step) if step < WRONG_FROM else theirs(step))
    handed_in = {MINER.hotkey: place.contribution, CHEAT.hotkey: world.contribution(CHEAT, 1, work=other_data)}
    judge = Judge(
        parts=world.parts,
        base=world.base,
        state=world.state,
        load_data=lambda rank: world.bench.round_data(world.parts, ROUND, rank),
    )
    scoring = world.parts.recipe.scoring
    receipts = {hotkey: one.receipt for hotkey, one in handed_in.items()}
    draws = {
        hotkey: draw(
            block_hash="0x5a",
            validator=VALIDATOR.hotkey,
            miner=hotkey,
            coins=COINS,
            num_snapshots=receipt.num_snapshots,
            scoring=scoring,
        )
        for hotkey, receipt in receipts.items()
    }
    checks = {hotkey: judge.judge(receipts[hotkey], draws[hotkey], answer_of(one)) for hotkey, one in handed_in.items()}
    average = MovingAverage(None, scoring)
    everyone = [MINER.hotkey, CHEAT.hotkey, SILENT.hotkey]
    facts = gather_facts(
        miners=everyone,
        collected=Collected(receipts=receipts, refused={SILENT.hotkey: "no receipt yet: training"}),
        checks=checks,
        seen=(),
        average=average,
        round_number=ROUND,
    )
    honest = facts[MINER.hotkey]
    assert isinstance(honest, RoundFacts)
    facts[MINER.hotkey] = dataclasses.replace(
        honest, bandwidth=Bandwidth(size_bytes=5_000_000, seconds=3.0, in_time=True)
    )
    scores = score_facts(facts, scoring)
    before = average.state
    average.update(ROUND, scores, everyone)
    record, files = build_record(
        identity=VALIDATOR,
        run_id=world.parts.run_id,
        round_number=ROUND,
        base=place.base,
        block_hash="0x5a",
        coins=COINS,
        scoring=scoring,
        facts=facts,
        scores=scores,
        receipts=receipts,
        ranks={hotkey: rank for rank, hotkey in enumerate(everyone)},
        draws=draws,
        owed=frozenset(),
        before=before,
        after=average.state,
        registered=set(everyone),
        shares=average.weights(),
        previous="",
    )
    epoch = place.base.manifest.model_copy(
        update={
            "epoch": 1,
            "round": ROUND,
            "parent": place.base.manifest_sha256,
            "files": {},
            "members": (MINER.hotkey,),
            "receipts": {MINER.hotkey: place.contribution.receipt.sha256()},
            "nonce": "epoch-1-" + "0" * 8,
        }
    )
    store = HubStore(endpoint=place.hub.url, repo=REPO)
    store.publish(sign_manifest(epoch, VALIDATOR), {})
    evidence = {evidence_path(ROUND, digest): content for digest, content in files.items()}
    path = record_path(ROUND, VALIDATOR.hotkey)
    store.publish_artefacts(REPO, CHECKS_BRANCH, {path: record.to_bytes(), **evidence})
    copy = tmp_path_factory.mktemp("copy")
    mirror(store, REPO, CHECKS_BRANCH, copy)
    return open_source(dir=copy / "none", endpoint=place.hub.url, repo=REPO, copy=copy)


def test_scores_are_explained_from_a_copy_of_the_hub(source: Source) -> None:
    for miner, score in ((MINER, 0.7 + 0.3 * 8e-6 * 5_000_000 / 3 / 25), (CHEAT, 0.0), (SILENT, 0.0)):
        found = explain(source, 1, miner.hotkey)
        assert found.holds, found.lines()
        assert found.words[0].recomputed == found.words[0].published == pytest.approx(score)
    told = "\n".join(explain(source, 1, CHEAT.hotkey).lines())
    assert f"step {WRONG_FROM}: its record says loss" in told
    assert "no pay before round 9" in told
    assert "no receipt yet: training" in "\n".join(explain(source, 1, SILENT.hotkey).lines())


def test_an_audit_passes_the_honest_and_names_the_first_wrong_step_of_a_cheat(source: Source, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    honest = run_audit(source, 1, MINER.hotkey, cache=tmp_path, on_step=lambda *at: progress.append(at))
    assert honest.verdict.honest, honest.lines()
    assert progress[-1] == (8, 8)
    cheat = run_audit(source, 1, CHEAT.hotkey, cache=tmp_path)
    assert not cheat.verdict.honest
    assert cheat.verdict.first_wrong_step == WRONG_FROM
    with pytest.raises(HivetrainError, match="handed in no receipt"):
        run_audit(source, 1, SILENT.hotkey, cache=tmp_path)


def test_what_a_validator_makes_up_convicts_nobody(source: Source, tmp_path: Path) -> None:
    assert isinstance(source.store, FolderStore)
    copy = tmp_path / "copy"
    shutil.copytree(source.store.folder, copy)
    for path in (copy / record_folder(ROUND) / "evidence").iterdir():
        path.write_bytes(b"step records that nobody committed to")
    audited = run_audit(dataclasses.replace(source, store=FolderStore(copy)), 1, MINER.hotkey, cache=tmp_path / "a")
    assert audited.verdict.honest
    assert any("no step records are public" in line for line in audited.verdict.lines)
    path = copy / record_path(ROUND, VALIDATOR.hotkey)
    record = RoundRecord.model_validate_json(path.read_bytes())
    miner = record.miners[MINER.hotkey]
    assert miner.receipt is not None
    forged = miner.model_copy(update={"receipt": miner.receipt.model_copy(update={"sketch": "00" * 1024})})
    lying = record.model_copy(update={"miners": {**record.miners, MINER.hotkey: forged}})
    path.write_bytes(sign_record(lying, VALIDATOR).to_bytes())
    with pytest.raises(HivetrainError, match="none that it signed is published"):
        run_audit(dataclasses.replace(source, store=FolderStore(copy)), 1, MINER.hotkey, cache=tmp_path / "b")


def test_a_receipt_of_more_than_it_did_is_told_line_by_line(source: Source, tmp_path: Path) -> None:
    assert isinstance(source.store, FolderStore)
    copy = tmp_path / "copy"
    shutil.copytree(source.store.folder, copy)
    path = copy / record_path(ROUND, VALIDATOR.hotkey)
    record = RoundRecord.model_validate_json(path.read_bytes())
    miner = record.miners[CHEAT.hotkey]
    assert miner.receipt is not None
    inflated = sign_receipt(miner.receipt.model_copy(update={"num_samples": 10**6, "num_tokens": 10**9}), CHEAT)
    taken = miner.model_copy(update={"receipt": inflated})
    lying = record.model_copy(update={"miners": {**record.miners, CHEAT.hotkey: taken}})
    path.write_bytes(sign_record(lying, VALIDATOR).to_bytes())
    told = dataclasses.replace(source, store=FolderStore(copy))
    found = explain(told, 1, CHEAT.hotkey)
    assert not found.holds
    for name in ("num_samples is 1000000", "num_tokens is 1000000000"):
        assert any(f"DIFFERS: its receipt is to be refused: receipt.{name}" in line for line in found.lines())
    assert explain(told, 1, MINER.hotkey).words[0].elsewhere >= 2
    verdict = run_audit(told, 1, CHEAT.hotkey, cache=tmp_path / "cache").verdict
    assert (verdict.honest, verdict.num_steps) == (False, 0)
    assert [line.split(" is ")[0] for line in verdict.lines] == ["receipt.num_samples", "receipt.num_tokens"]


def test_a_stranger_beside_the_validators_changes_nothing(source: Source, tmp_path: Path) -> None:
    assert isinstance(source.store, FolderStore)
    copy = tmp_path / "copy"
    shutil.copytree(source.store.folder, copy)
    record = RoundRecord.model_validate_json((copy / record_path(ROUND, VALIDATOR.hotkey)).read_bytes())
    lie = record.model_copy(update={"validator": SILENT.hotkey, "shares": {SILENT.hotkey: 1.0}})
    (copy / record_path(ROUND, SILENT.hotkey)).write_bytes(sign_record(lie, SILENT).to_bytes())
    for number in range(100):
        (copy / record_path(ROUND, f"0{number}")).write_bytes(b"junk")
    beside = dataclasses.replace(source, store=FolderStore(copy))
    found = explain(beside, 1, MINER.hotkey)
    assert found.holds, found.lines()
    assert [(word.validator, word.known) for word in found.words] == [(VALIDATOR.hotkey, True)]
    for path in (copy / record_folder(ROUND)).glob("0*.json"):
        path.unlink()
    found = explain(beside, 1, MINER.hotkey)
    assert found.holds
    assert [word.known for word in found.words] == [True, False]
    assert "not known for a validator" in "\n".join(found.lines())
    named = dataclasses.replace(beside, named=frozenset({SILENT.hotkey}))
    assert not explain(named, 1, MINER.hotkey).holds


def copied(source: Source, tmp_path: Path) -> tuple[Source, Path, RoundRecord]:
    """A copy of the copy, to be changed; its folder; and the validator's record in it."""
    assert isinstance(source.store, FolderStore)
    copy = tmp_path / "copy"
    shutil.copytree(source.store.folder, copy)
    record = RoundRecord.model_validate_json((copy / record_path(ROUND, VALIDATOR.hotkey)).read_bytes())
    return dataclasses.replace(source, store=FolderStore(copy)), copy, record


LATER = AverageState(first_round=ROUND, last_round=ROUND - 1)


def test_what_is_missing_at_the_hub_makes_no_validator_a_liar(source: Source, tmp_path: Path) -> None:
    changed, copy, record = copied(source, tmp_path)
    miner = record.miners[MINER.hotkey]
    assert miner.bandwidth is not None
    read = miner.model_copy(update={"measures": {SILENT.hotkey: miner.bandwidth}})
    following = record.model_copy(
        update={
            "previous": "ab" * 32,
            "before": LATER,
            "miners": {**record.miners, MINER.hotkey: read},
            "sources": {SILENT.hotkey: "cd" * 32},
        }
    )
    path = copy / record_path(ROUND, VALIDATOR.hotkey)
    path.write_bytes(sign_record(following, VALIDATOR).to_bytes())
    found = explain(changed, 1, MINER.hotkey)
    assert found.words[0].unsure == [
        f"{SILENT.hotkey[:8]}'s record of round 2, which it read as {'cd' * 6}, is not at the hub any more",
        "its record of round 2, which that of round 3 follows, is missing at the hub: "
        "the chain cannot be followed past it",
    ]
    assert found.holds, found.lines()
    status, text = command("explain", "1", MINER.hotkey, "--dir", str(copy / "none"), "--from", str(copy))
    assert (status, text.count("  UNDETERMINED: ")) == (0, 2)
    path.write_bytes(sign_record(following.model_copy(update={"sources": {}}), VALIDATOR).to_bytes())
    assert "names no record that it read it in" in explain(changed, 1, MINER.hotkey).words[0].problems[0]


def test_a_base_that_was_replaced_at_the_hub_makes_no_validator_a_liar(source: Source, tmp_path: Path) -> None:
    changed, copy, record = copied(source, tmp_path)
    path = copy / "epoch-000000" / "manifest.json"
    base = parse_manifest(path.read_bytes())
    path.write_bytes(base.model_copy(update={"nonce": "f" * 16, "state_hash": "0c" * 32}).to_bytes())
    found = explain(changed, 1, MINER.hotkey)
    (unsure,) = found.words[0].unsure
    assert unsure.endswith(f"at the hub, and not {record.base_manifest[:12]}, from which it started")
    assert found.holds, found.lines()
    other = record.model_copy(update={"base_manifest": "0d" * 32})
    (copy / record_path(ROUND, VALIDATOR.hotkey)).write_bytes(sign_record(other, VALIDATOR).to_bytes())
    told = "\n".join(explain(changed, 1, MINER.hotkey).lines())
    assert f"DIFFERS: it starts from 0d0d0d0d0d0d, but epoch 1 from {record.base_manifest[:12]}" in told


def test_an_epoch_that_was_tagged_by_somebody_else_makes_no_validator_a_liar(source: Source, tmp_path: Path) -> None:
    changed, copy, record = copied(source, tmp_path)
    path = copy / "epoch-000001" / "manifest.json"
    epoch = parse_manifest(path.read_bytes())
    fields = {"parent": "0d" * 32, "receipts": {MINER.hotkey: "ab" * 32}}
    theirs = epoch.model_copy(update={**fields, "leader": SILENT.hotkey})
    path.write_bytes(sign_manifest(theirs, SILENT).to_bytes())
    named = dataclasses.replace(changed, named=frozenset({VALIDATOR.hotkey}))
    found = explain(named, 1, MINER.hotkey)
    assert (found.holds, found.words[0].known, found.words[0].problems) == (True, True, []), found.lines()
    base, receipt = found.words[0].unsure
    assert base.startswith(f"it starts from {record.base_manifest[:12]}, but epoch 1 from 0d0d0d0d0d0d by the manifest")
    assert receipt.endswith(f"which the miner signed: it signed two, or {SILENT.hotkey[:8]} names one that never was")
    path.write_bytes(sign_manifest(epoch.model_copy(update=fields), VALIDATOR).to_bytes())  # one key signed both
    found = explain(named, 1, MINER.hotkey)
    assert (found.holds, len(found.words[0].problems), found.words[0].unsure) == (False, 2, [])


def test_who_tags_an_epoch_of_its_own_is_no_validator_by_that(source: Source, tmp_path: Path) -> None:
    changed, copy, record = copied(source, tmp_path)
    lie = record.model_copy(update={"validator": SILENT.hotkey, "shares": {SILENT.hotkey: 1.0}})
    (copy / record_path(ROUND, SILENT.hotkey)).write_bytes(sign_record(lie, SILENT).to_bytes())
    first = changed.epoch(1, verify)

    def tag(epoch: int, parent: str, leader: WalletIdentity, **fields: object) -> Ref:
        manifest = first.manifest.model_copy(update={"epoch": epoch, "parent": parent})
        signed = sign_manifest(manifest.model_copy(update={"leader": leader.hotkey}), leader)
        path = copy / f"epoch-{epoch:06d}" / "manifest.json"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(signed.model_copy(update=fields).to_bytes())
        return Ref(epoch=epoch, commit="c", manifest=parse_manifest(path.read_bytes()))

    for parent in (first.manifest_sha256, "0d" * 32):
        tag(2, parent, SILENT)
        found = explain(changed, 1, MINER.hotkey)
        assert [(word.validator, word.known) for word in found.words] == [
            (VALIDATOR.hotkey, True),
            (SILENT.hotkey, False),
        ]
        assert found.holds, found.lines()
    second = tag(2, first.manifest_sha256, CHEAT)
    assert changed.validators(first, verify) == {VALIDATOR.hotkey}
    third = tag(3, second.manifest_sha256, MINER)
    assert changed.validators(third, verify) == {VALIDATOR.hotkey, CHEAT.hotkey, MINER.hotkey}
    tag(2, first.manifest_sha256, SILENT)  # no parent of the third
    assert changed.validators(third, verify) == {MINER.hotkey}
    unsigned = tag(2, first.manifest_sha256, SILENT, leader_signature="no hex")
    assert changed.validators(tag(3, unsigned.manifest_sha256, MINER), verify) == {MINER.hotkey}


def test_junk_in_the_place_of_a_validators_record_makes_it_no_liar(source: Source, tmp_path: Path) -> None:
    changed, copy, record = copied(source, tmp_path)
    named = dataclasses.replace(changed, named=frozenset({SILENT.hotkey}))
    unsigned = record.model_copy(update={"validator": SILENT.hotkey}).to_bytes()
    for junk, why in ((b"junk", "cannot be read"), (unsigned, "is forged")):
        (copy / record_path(ROUND, SILENT.hotkey)).write_bytes(junk)
        found = explain(named, 1, MINER.hotkey)
        assert found.holds, found.lines()
        assert found.lines()[-1].startswith(f"UNDETERMINED: the record of {SILENT.hotkey} for round {ROUND} {why}")


def test_what_is_found_is_told_also_where_the_reader_stops_next(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, copy, record = copied(source, tmp_path)
    path = copy / record_path(ROUND, VALIDATOR.hotkey)
    earlier = sign_record(record.model_copy(update={"round": ROUND - 1}), VALIDATOR)
    before = copy / record_path(ROUND - 1, VALIDATOR.hotkey)
    before.parent.mkdir()
    before.write_bytes(earlier.to_bytes())
    following = record.model_copy(update={"previous": "ab" * 32, "before": LATER})
    path.write_bytes(sign_record(following, VALIDATOR).to_bytes())
    monkeypatch.setattr(explain_module, "VALIDATOR_FILES", 1)
    word = explain(changed, 1, MINER.hotkey).words[0]
    assert f"the record before is {earlier.sha256()[:12]}, this one names abababababab" in word.problems
    assert "1 files and 1024 MiB are read, and no more" in word.unsure[0]
    bandwidth = record.miners[MINER.hotkey].bandwidth
    assert bandwidth is not None
    measures = {SILENT.hotkey: bandwidth, CHEAT.hotkey: bandwidth}
    miners = {**record.miners, MINER.hotkey: record.miners[MINER.hotkey].model_copy(update={"measures": measures})}
    read = record.model_copy(update={"miners": miners, "sources": {CHEAT.hotkey: "cd" * 32}})
    path.write_bytes(sign_record(read, VALIDATOR).to_bytes())
    monkeypatch.setattr(explain_module, "VALIDATOR_FILES", 2)
    word = explain(changed, 1, MINER.hotkey).words[0]
    said = f"it has a measure of {SILENT.hotkey[:8]}'s, and names no record that it read it in"
    assert said in word.problems
    assert "is not at the hub any more" in word.unsure[0]


def accusing(source: Source, record: RoundRecord, evidence: dict[str, bytes]) -> tuple[RoundRecord, dict[str, bytes]]:
    """``record``, in which the silent miner is said to have signed two receipts, with what follows from that."""
    scoring, miner = source.terms().recipe.scoring, record.miners[SILENT.hotkey]
    was = miner.facts()
    assert isinstance(was, RoundFacts)
    fact = dataclasses.replace(was, checks=(CheckResult(fault=Fault.DOUBLE_COMMIT),))
    score = score_facts({SILENT.hotkey: fact}, scoring)[SILENT.hotkey]
    miners = {**record.miners, SILENT.hotkey: miner_record(fact, score, receipt=None, rank=miner.rank)}
    average = MovingAverage(None, scoring, record.before)
    average.update(ROUND, {hotkey: one.published() for hotkey, one in miners.items()}, list(miners))
    proofs, files = pack_evidence({SILENT.hotkey: evidence})
    fields = {"miners": miners, "after": average.state, "shares": average.weights(), "proofs": proofs}
    return record.model_copy(update=fields), {evidence_path(ROUND, digest): raw for digest, raw in files.items()}


def test_evidence_that_is_missing_at_the_hub_makes_no_validator_a_liar(source: Source, tmp_path: Path) -> None:
    changed, copy, record = copied(source, tmp_path)
    receipt = record.miners[MINER.hotkey].receipt
    assert receipt is not None
    one, other = (
        sign_receipt(receipt.model_copy(update={"hotkey": SILENT.hotkey, "loss": loss}), SILENT).to_bytes()
        for loss in (4.0, 5.0)
    )
    record, files = accusing(source, record, {"first_receipt": one, "second_receipt": other})
    (copy / record_path(ROUND, VALIDATOR.hotkey)).write_bytes(sign_record(record, VALIDATOR).to_bytes())
    for path, content in files.items():
        (copy / path).write_bytes(content)
    word = explain(changed, 1, SILENT.hotkey).words[0]
    assert (word.problems, word.unsure) == ([], [])
    second = next(copy / path for path, content in files.items() if content == other)
    gone = ["double_commit is said, and its second_receipt is not at the hub (any more)"]
    for junk in (b"junk", bytes(MAX_EVIDENCE_BYTES + 1)):
        second.write_bytes(junk)
        word = explain(changed, 1, SILENT.hotkey).words[0]
        assert (word.problems, word.unsure) == ([], gone)
    second.unlink()
    word = explain(changed, 1, SILENT.hotkey).words[0]
    assert (word.problems, word.unsure) == ([], gone)


def test_evidence_that_proves_nothing_is_found_however_many_proofs_are_named(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain_module, "VALIDATOR_FILES", 4)
    changed, copy, record = copied(source, tmp_path)
    record, files = accusing(source, record, {"first_receipt": b"one", "second_receipt": b"other"})
    for path, content in files.items():
        (copy / path).write_bytes(content)
    strange = [one.model_copy(update={"sha256": f"{at:064x}"}) for at in range(100) for one in record.proofs]
    unproved = "double_commit is said, and what is published does not prove it"
    named_twice = [f"101 proofs {kind} are published, and one says it" for kind in ("first_receipt", "second_receipt")]
    for proofs, problems in ((record.proofs, [unproved]), ((*strange, *record.proofs), [*named_twice, unproved])):
        lying = sign_record(record.model_copy(update={"proofs": proofs}), VALIDATOR)
        (copy / record_path(ROUND, VALIDATOR.hotkey)).write_bytes(lying.to_bytes())
        word = explain(changed, 1, SILENT.hotkey).words[0]
        assert (word.problems, word.unsure) == (problems, [])


@pytest.mark.parametrize("epoch", [7, 10**8, 2**53 - 1])
def test_a_strangers_record_of_any_epoch_is_shown_and_costs_little(
    source: Source, tmp_path: Path, epoch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, copy, record = copied(source, tmp_path)
    (copy / "epoch-100000000").mkdir()
    (copy / "epoch-100000000" / "manifest.json").write_bytes(b"junk")
    strange = record.model_copy(
        update={"validator": SILENT.hotkey, "epoch": epoch, "previous": "ab" * 32, "before": LATER}
    )
    (copy / record_path(ROUND, SILENT.hotkey)).write_bytes(sign_record(strange, SILENT).to_bytes())
    found = explain(changed, 1, MINER.hotkey)
    assert found.holds, found.lines()
    told = found.words[1]
    assert (told.known, told.validator) == (False, SILENT.hotkey)
    assert f"epoch {epoch}, from which it started, is not kept any more" in told.lines
    assert "missing at the hub" in told.unsure[0]
    monkeypatch.setattr(explain_module, "STRANGER_FILES", 0)
    found = explain(changed, 1, MINER.hotkey)
    assert "0 files and 64 MiB are read, and no more" in found.words[1].unsure[0]
    assert found.words[0].unsure == []
    assert found.holds


def command(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, HivetrainError):
        return main([*arguments]), str(done.exception)
    return done.exit_code, done.output


def test_the_commands_exit_as_they_should(source: Source, place: Place) -> None:
    assert isinstance(source.store, FolderStore)
    copy = str(source.store.folder)
    where = ("--dir", copy + "/none", "--hub.endpoint", place.hub.url, "--hub.repo", REPO)
    status, text = command("explain", "1", CHEAT.hotkey[:8], *where)
    assert (status, f"miner {CHEAT.hotkey}\n" in text) == (0, True)
    status, text = command("explain", "1", MINER.hotkey, *where, "--from", copy, "--json")
    assert (status, json.loads(text)["holds"]) == (0, True)
    status, text = command("audit", "1", CHEAT.hotkey, *where, "--json")
    assert (status, json.loads(text)["verdict"]["first_wrong_step"]) == (1, WRONG_FROM)
    for words, expected in (
        (("explain", "0", MINER.hotkey, *where), "epoch 0 is the genesis"),
        (("explain", "7", MINER.hotkey, *where), "no epoch 7"),
        (("explain", "1", "nobody", *where), "nobody is no miner's hotkey in epoch 1"),
        (("explain", "1", "", *where), "is no miner's hotkey in epoch 1"),
        (("explain", "1", MINER.hotkey, "--dir", copy), "no run in"),
        (("explain", "1", MINER.hotkey, *where, "--from", copy + "/none"), "no folder"),
        (("audit", "1", MINER.hotkey, "--dir", copy, "--from", copy), "name --hub.endpoint"),
    ):
        status, text = command(*words)
        assert status == 2, text
        assert expected in text


def test_a_score_that_was_changed_is_found_and_a_forged_or_missing_record_is_an_error(
    source: Source, tmp_path: Path
) -> None:
    assert isinstance(source.store, FolderStore)
    copy = tmp_path / "copy"
    shutil.copytree(source.store.folder, copy)
    path = copy / record_path(ROUND, VALIDATOR.hotkey)
    record = RoundRecord.model_validate_json(path.read_bytes())
    miner = record.miners[MINER.hotkey]
    assert miner.score is not None
    worse = miner.model_copy(update={"score": miner.score.model_copy(update={"score": 0.5})})
    lying = record.model_copy(update={"miners": {**record.miners, MINER.hotkey: worse}})
    path.write_bytes(sign_record(lying, VALIDATOR).to_bytes())
    elsewhere = ("--dir", str(copy / "none"), "--from", str(copy))
    status, text = command("explain", "1", MINER.hotkey, *elsewhere)
    assert (status, "DIFFERS: published 0.5" in text) == (1, True)
    assert command("explain", "1", CHEAT.hotkey, *elsewhere)[0] == 0  # its own score holds
    path.write_bytes(sign_record(record.model_copy(update={"previous": "ab" * 32}), VALIDATOR).to_bytes())
    status, text = command("explain", "1", MINER.hotkey, *elsewhere)
    assert (status, "DIFFERS: its record of round 3 follows one of round -1" in text) == (1, True)
    path.write_bytes(lying.to_bytes())
    status, text = command("explain", "1", MINER.hotkey, *elsewhere)
    assert (status, "forged" in text) == (1, True)
    path.unlink()
    status, text = command("explain", "1", MINER.hotkey, *elsewhere)
    assert (status, "no validator has published any" in text) == (1, True)
