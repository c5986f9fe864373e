"""Status files and events: whole or not at all, foreign files left out, never a reason to stop."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from pathlib import Path

import pytest

from hivetrain.tracking import EventLog, EventReader, NeuronStatus, StatusWriter, read_statuses, write_status


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def status(name: str, **fields: object) -> NeuronStatus:
    return NeuronStatus(name=name, role="miner", pid=1, **fields)  # type: ignore[arg-type]


def test_statuses_are_read_back_in_natural_order(tmp_path: Path) -> None:
    full = status("miner-2", state="training", ready=True, uid=5, hotkey="5F", epoch=3, round=7, loss=3.5, score=0.5)
    for written in (status("validator-1"), status("miner-10"), full, status("hub")):
        write_status(tmp_path / "status", written)
    found = read_statuses(tmp_path / "status")
    assert [s.name for s in found] == ["hub", "miner-2", "miner-10", "validator-1"]
    assert found[1] == full


def test_values_that_are_not_finite_are_read_back_as_none(tmp_path: Path) -> None:
    write_status(tmp_path, status("m", loss=math.nan, tokens_per_second=math.inf))
    (found,) = read_statuses(tmp_path)
    assert found.loss is None
    assert found.tokens_per_second is None


def test_torn_foreign_and_oversized_files_are_left_out(tmp_path: Path) -> None:
    write_status(tmp_path, status("good"))
    content = (tmp_path / "good.json").read_bytes()
    (tmp_path / "torn.json").write_bytes(content[:-9])
    (tmp_path / "list.json").write_bytes(b"[]")
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    (tmp_path / "types.json").write_text(json.dumps({"name": "types", "role": "miner", "pid": "many"}))
    (tmp_path / "large.json").write_bytes(content[:-1] + b" " * (1 << 16) + b"}")
    (tmp_path / "other-name.json").write_bytes(content)
    (tmp_path / ".hidden.json").write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    assert [s.name for s in read_statuses(tmp_path)] == ["good"]
    assert read_statuses(tmp_path / "missing") == []


@pytest.mark.parametrize("name", ["", ".x", "../x", "a/b"])
def test_a_name_that_leaves_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        status(name)


def test_numbers_wait_and_a_change_of_state_does_not(tmp_path: Path) -> None:
    clock = Clock()
    writer = StatusWriter(tmp_path, "miner-1", "miner", clock=clock)

    def on_disk() -> NeuronStatus:
        (found,) = read_statuses(tmp_path)
        return found

    writer.update(step=1)
    assert on_disk().step == 1
    clock.now += 0.1
    writer.update(step=2)
    assert on_disk().step == 1
    clock.now += 0.1
    writer.update(step=3, state="committing")
    assert (on_disk().step, on_disk().state) == (3, "committing")
    clock.now += 0.05
    writer.update(loss=2.0)
    assert on_disk().loss is None
    assert writer.status.loss == 2.0
    writer.flush()
    assert (on_disk().loss, on_disk().updated_at) == (2.0, clock.now)
    clock.now += 0.2
    writer.update(step=4)
    assert on_disk().step == 4
    clock.now -= 3600
    writer.update(step=5)
    assert on_disk().step == 5


def test_a_field_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mood"):
        StatusWriter(tmp_path, "m", "miner").update(mood="fine")  # type: ignore[call-arg]


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    clock = Clock()
    writer = StatusWriter(tmp_path / "file" / "x", "m", "miner", clock=clock)
    for step in range(5):
        clock.now += 1
        writer.update(step=step)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert writer.status.step == 4


def test_a_reader_beside_a_writer_never_sees_half_a_status(tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        for step in range(300):
            write_status(tmp_path, status("m", step=step, detail="x" * (step * 50)))
        stop.set()

    write_status(tmp_path, status("m"))
    thread = threading.Thread(target=write)
    thread.start()
    counts = []
    while not stop.is_set():
        counts.append(len(read_statuses(tmp_path)))
    thread.join()
    assert set(counts) == {1}
    assert os.listdir(tmp_path) == ["m.json"]


def test_a_reader_gets_each_event_once(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    reader = EventReader(path)
    assert reader.read_new() == []
    miner, validator = EventLog(path, "miner-1", clock=Clock(5.0)), EventLog(path, "validator-1", clock=Clock(6.0))
    miner.append("published", "epoch 3 published", epoch=3, loss=math.nan, ok=True)
    validator.append("set_weights")
    first, second = reader.read_new()
    assert (first.time, first.name, first.event, first.text) == (5.0, "miner-1", "published", "epoch 3 published")
    assert dict(first.fields) == {"epoch": 3, "loss": None, "ok": True}
    assert (second.name, second.event) == ("validator-1", "set_weights")
    assert reader.read_new() == []
    miner.append("resync")
    assert [event.event for event in reader.read_new()] == ["resync"]
    miner.close()
    validator.close()


def test_a_line_still_being_written_comes_later_and_foreign_lines_never(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = b'{"time":1,"name":"m","event":"a"}'
    reader = EventReader(path)
    path.write_bytes(b"garbage\n[1]\n" + line + b"\n" + line[:10])
    assert [event.event for event in reader.read_new()] == ["a"]
    with path.open("ab") as file:
        file.write(line[10:] + b"\n")
    assert [event.event for event in reader.read_new()] == ["a"]


def test_a_replaced_or_shortened_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = b'{"time":1,"name":"m","event":"%s"}\n'
    reader = EventReader(path)
    path.write_bytes(line % b"a" * 3)
    assert len(reader.read_new()) == 3
    path.write_bytes(line % b"b")
    assert [event.event for event in reader.read_new()] == ["b"]
    (tmp_path / "new").write_bytes(line % b"c" * 5)
    (tmp_path / "new").rename(path)
    assert [event.event for event in reader.read_new()] == ["c"] * 5


def test_a_long_file_is_read_in_bounded_pieces_and_a_line_past_the_bound_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = b'{"time":1,"name":"m","event":"a"}\n'
    path.write_bytes(line * 10 + b"x" * 500 + b"\n" + line)
    reader = EventReader(path, max_bytes=100)
    calls = [len(reader.read_new()) for _ in range(20)]
    assert sum(calls) == 11
    assert max(calls) <= 100 // len(line)


def test_events_go_on_when_the_disk_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    log = EventLog(tmp_path / "file" / "events.jsonl", "m")
    log.append("a")
    log.append("b")
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
