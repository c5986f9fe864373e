"""Publishing off the model's thread: an outage delays a record and loses nothing; two receipts come to light."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from hivetrain.errors import Fault, HubError
from hivetrain.hub.memory import MemoryStore
from hivetrain.scoring import CheckResult, MovingAverage, RoundFacts, score_facts
from hivetrain.scoring import history as history_module
from hivetrain.scoring.published import ReadLimit, read_records
from hivetrain.scoring.record import CHECKS_BRANCH, evidence_path, record_path
from template.validator import records as records_module
from template.validator.records import RecordsThread
from tests.keys import verify
from tests.records_kit import FAST, MINERS, RUN_ID, SCORING, SECOND, VALIDATOR, Ledger, base_ref, signed_receipt

REPO = "run/model"
THREE = MINERS[2].hotkey
NOW = 9


class Flaky(MemoryStore):
    """A hub that answers only while it is up."""

    def __init__(self) -> None:
        super().__init__()
        self.is_up = True
        self.tried = threading.Event()

    def publish_artefacts(self, repo: str, branch: str, files: Mapping[str, bytes]) -> str:
        self.tried.set()
        if not self.is_up:
            raise HubError("the hub is down")
        return super().publish_artefacts(repo, branch, files)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


@pytest.fixture
def store() -> Flaky:
    return Flaky()


def thread_of(store: MemoryStore, folder: Path) -> RecordsThread:
    validators = [VALIDATOR.hotkey, SECOND.hotkey, MINERS[0].hotkey]
    return RecordsThread(store, REPO, folder, VALIDATOR.hotkey, verify, lambda: validators)


@pytest.fixture
def records(store: Flaky, tmp_path: Path) -> Iterator[RecordsThread]:
    thread = thread_of(store, tmp_path)
    thread.start()
    yield thread
    thread.close()


def published(store: MemoryStore) -> list[str]:
    return store.list_artefacts(REPO, CHECKS_BRANCH, "checks")


def test_a_record_and_its_evidence_lie_on_the_hub_in_one_commit(store: Flaky, records: RecordsThread) -> None:
    ledger = Ledger()
    opened = CheckResult(fault=Fault.WRONG_REPLAY, detail="x", evidence={"steps": b"\1\2"})
    record = ledger.round(4, results={THREE: opened})
    records.put(record, ledger.files[0])
    until(lambda: len(published(store)) == 2, "the record was not published")
    assert read_records(store, REPO, 4, verify) == ([record], {})
    (proof,) = record.proofs
    assert store.read_artefact(REPO, CHECKS_BRANCH, evidence_path(4, proof.sha256)) == b"\1\2"
    assert (records.previous(4), records.previous(3)) == (record.sha256(), "")


def test_an_outage_delays_records_and_the_next_one_brings_them_all(
    store: Flaky, records: RecordsThread, tmp_path: Path
) -> None:
    ledger = Ledger()
    store.is_up = False
    records.put(ledger.round(0), {})
    until(store.tried.is_set, "it was not tried")
    assert published(store) == []
    store.is_up = True
    records.put(ledger.round(1), {})
    until(lambda: len(published(store)) == 2, "both were not published")
    until(lambda: not list(tmp_path.glob("round-*")), "what is published was not removed")


def test_what_waits_survives_a_restart(store: Flaky, tmp_path: Path) -> None:
    store.is_up = False
    first = thread_of(store, tmp_path)
    first.start()
    first.put(Ledger().round(0), {})
    first.close()
    store.is_up = True
    second = thread_of(store, tmp_path)
    second.start()
    until(lambda: published(store), "it was not published after the restart")
    second.close()


def test_a_thread_that_is_closed_uploads_what_was_put_last(store: Flaky, tmp_path: Path) -> None:
    thread = thread_of(store, tmp_path)
    thread.start()
    thread.put(Ledger().round(0), {})
    thread.close()
    assert published(store) == [record_path(0, VALIDATOR.hotkey)]


def test_only_the_newest_rounds_keep_their_evidence_for_a_hub_that_never_answers(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "MAX_PENDING", 2)
    ledger, thread = Ledger(), thread_of(store, tmp_path)
    opened = CheckResult(fault=Fault.WRONG_REPLAY, detail="x", evidence={"steps": b"\1\2"})
    for number in range(4):
        assert thread.put(ledger.round(number, results={THREE: opened}), ledger.files[-1])
    thread.start()
    thread.close()
    rounds = [path.split("/")[1] for path in published(store)]
    assert rounds == ["round-000000", "round-000001", *["round-000002"] * 2, *["round-000003"] * 2]


def test_a_disk_that_takes_nothing_keeps_no_record_and_says_so(store: Flaky, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    thread = thread_of(store, tmp_path / "file")  # a file where the folder should be
    assert not thread.put(Ledger().round(0), {})
    assert thread.previous(0) == ""
    assert thread.recover(RUN_ID, NOW) is None


def test_averages_that_were_lost_are_taken_from_the_newest_record(store: Flaky, tmp_path: Path) -> None:
    ledger, folder = Ledger(), tmp_path / "checks"
    first = thread_of(store, folder)
    assert first.recover(RUN_ID, NOW) is None
    for number in range(3):
        first.put(ledger.round(number), {})
    first.start()
    first.close()
    for where in (folder, tmp_path / "another machine"):  # killed before the averages were saved, and all of it lost
        again = thread_of(store, where)
        assert again.recover(RUN_ID, NOW) == ledger.average.state
        assert again.previous(2) == ledger.records[2].sha256()
    average = MovingAverage(tmp_path / "averages.json", SCORING)
    average.catch_up(ledger.average.state)
    average.catch_up(ledger.records[0].after)  # older: nothing changes
    saved = MovingAverage(tmp_path / "averages.json", SCORING)
    saved.load()
    assert saved.state == ledger.average.state
    for where in (tmp_path / "another run", folder):
        other = thread_of(store, where)
        assert other.recover("cc" * 32, NOW) is None
        assert other.previous(2) == ""


def test_who_comes_back_with_an_older_folder_goes_on_from_its_newest_record_on_the_hub(
    store: Flaky, tmp_path: Path
) -> None:
    ledger, first = Ledger(), thread_of(store, tmp_path)
    first.put(ledger.round(0), {})
    older = (tmp_path / "last.json").read_bytes()
    first.put(ledger.round(1), {})
    first.start()
    first.close()
    (tmp_path / "last.json").write_bytes(older)
    again = thread_of(store, tmp_path)
    assert again.recover(RUN_ID, NOW) == ledger.records[1].after
    assert (again.previous(1), again.previous(0)) == (ledger.records[1].sha256(), "")


def test_junk_without_end_makes_nobody_begin_anew(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "MAX_BYTES_LOOKED_AT", 10_000)
    ledger, first = Ledger(), thread_of(store, tmp_path / "here")
    first.put(ledger.round(0), {})
    first.start()
    first.close()
    store.publish_artefacts(
        REPO, CHECKS_BRANCH, {record_path(number, VALIDATOR.hotkey): bytes(3000) for number in range(1, 9)}
    )
    assert thread_of(store, tmp_path / "here").recover(RUN_ID, NOW) == ledger.records[0].after
    with pytest.raises(ReadLimit, match="remove what is not ours"):
        thread_of(store, tmp_path / "another machine").recover(RUN_ID, NOW)


def test_who_is_lost_in_its_own_records_of_another_run_is_told_to_remove_them(
    store: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "MAX_LOOKED_AT", 2)
    ledger, older = Ledger(), thread_of(store, tmp_path / "here")
    for number in range(3):
        older.put(ledger.round(number), {})
    older.start()
    older.close()
    with pytest.raises(ReadLimit, match=f"or is of another run, under {VALIDATOR.hotkey}"):
        thread_of(store, tmp_path / "another run").recover("cc" * 32, NOW)


def cut_off(tmp_path: Path) -> tuple[Ledger, Path]:
    """Two records that were put, the second one cut off before it was counted; and where that lies."""
    ledger = Ledger()
    thread = thread_of(Flaky(), tmp_path)
    thread.put(ledger.round(0), {})
    counted = (tmp_path / "last.json").read_bytes()
    thread.put(ledger.round(1), {})
    (tmp_path / "last.json").rename(tmp_path / "last.tmp")
    (tmp_path / "last.json").write_bytes(counted)
    return ledger, max(tmp_path.glob("round-*"))


def test_a_record_is_put_as_soon_as_it_lies_ready(store: Flaky, tmp_path: Path) -> None:
    ledger, _ = cut_off(tmp_path)
    again = thread_of(store, tmp_path)
    assert again.recover(RUN_ID, NOW) == ledger.records[1].after
    assert again.previous(1) == ledger.records[1].sha256()
    again.start()
    again.close()
    assert published(store) == [record_path(number, VALIDATOR.hotkey) for number in (0, 1)]


def test_a_record_that_does_not_lie_ready_was_never_put(store: Flaky, tmp_path: Path) -> None:
    ledger, ready = cut_off(tmp_path)
    (ready / record_path(1, VALIDATOR.hotkey)).write_bytes(b"of another put")
    assert thread_of(store, tmp_path).recover(RUN_ID, NOW) == ledger.records[0].after
    ready.rename(ready.with_suffix(".tmp"))
    again = thread_of(store, tmp_path)
    assert again.recover(RUN_ID, NOW) == ledger.records[0].after
    assert (again.previous(0), again.previous(1)) == (ledger.records[0].sha256(), "")


@pytest.mark.parametrize(("failing", "put"), [("round-000000000000001", False), ("last.json", True)])
def test_the_rename_that_makes_a_record_ready_decides_whether_it_is_put(
    store: Flaky, tmp_path: Path, failing: str, put: bool
) -> None:
    ledger, thread = Ledger(), thread_of(store, tmp_path)
    assert thread.put(ledger.round(0), {})
    blocked = tmp_path / failing
    kept = blocked.read_bytes() if blocked.is_file() else None
    blocked.unlink(missing_ok=True)
    (blocked / "in the way").mkdir(parents=True)
    assert thread.put(ledger.round(1), {}) == put
    assert thread.previous(1) == (ledger.records[1].sha256() if put else "")
    assert thread.previous(0) == ("" if put else ledger.records[0].sha256())
    assert not list(tmp_path.glob("*-*.tmp"))
    shutil.rmtree(blocked)
    if kept is not None:
        blocked.write_bytes(kept)
    assert thread_of(store, tmp_path).recover(RUN_ID, NOW) == ledger.records[put].after


def test_a_second_receipt_in_another_validators_record_is_a_lie_with_a_cooldown(
    store: Flaky, records: RecordsThread
) -> None:
    second = signed_receipt(MINERS[2], 0, base_ref(), loss=4.4)
    ours, theirs = Ledger(), Ledger(SECOND)
    mine, other = ours.round(0), theirs.round(0, receipts={THREE: second})
    records.put(mine, {})
    store.publish_artefacts(REPO, CHECKS_BRANCH, {record_path(0, SECOND.hotkey): other.to_bytes()})
    assert records.double_commits(mine) == {}  # not read yet
    records.look_at(0)
    until(lambda: records.others(0), "the other's record was not read")
    found = records.double_commits(mine)
    assert list(found) == [THREE]
    facts = {THREE: RoundFacts(tokens=1, checks=(found[THREE],), bandwidth=FAST)}
    ours.average.update(1, score_facts(facts, SCORING), {one.hotkey for one in MINERS})
    assert ours.average.cooldown_left(THREE, 2) == SCORING.cooldown_rounds
    assert ours.average.value(THREE) == 0
    assert records.double_commits(None) == {}


def test_what_strangers_put_beside_the_validators_records_is_not_read(store: Flaky, records: RecordsThread) -> None:
    second = signed_receipt(MINERS[2], 0, base_ref(), loss=4.4)
    strangers = {record_path(0, f"0{number}"): b"junk" for number in range(300)}
    accuser = Ledger(MINERS[1]).round(0, receipts={THREE: second})
    theirs = Ledger(SECOND).round(0)
    strangers |= {record_path(0, one.validator): one.to_bytes() for one in (accuser, theirs)}
    store.publish_artefacts(REPO, CHECKS_BRANCH, strangers)
    records.look_at(0)
    until(lambda: records.others(0), "the others' records were not read")
    assert [one.validator for one in records.others(0)] == [SECOND.hotkey]
    mine = Ledger().round(0)
    assert set(records.measures(0, mine)[THREE]) == {VALIDATOR.hotkey, SECOND.hotkey}
    assert set(records.measures(0, Ledger().round(1))[THREE]) == {SECOND.hotkey}
    assert records.measures(1, mine) == {}


def test_a_forged_record_accuses_nobody(store: Flaky, records: RecordsThread) -> None:
    second = signed_receipt(MINERS[2], 0, base_ref(), loss=4.4)
    mine, other = Ledger().round(0), Ledger(SECOND).round(0, receipts={THREE: second})
    forged = other.model_copy(update={"coins": "ab" * 32}).to_bytes()
    honest = Ledger(MINERS[0]).round(0)
    files = {record_path(0, SECOND.hotkey): forged, record_path(0, honest.validator): honest.to_bytes()}
    store.publish_artefacts(REPO, CHECKS_BRANCH, files)
    records.look_at(0)
    until(lambda: records.others(0), "the honest record was not read")
    assert records.double_commits(mine) == {}
