"""What a neuron does with a round, or a start, that fails: only what is not our own bug may pass."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hivetrain.errors import HubError, IntegrityError, ServiceError
from hivetrain.progress import Position, phase_at
from hivetrain.run import Schedule
from hivetrain.tracking.events import EventReader
from template import node as node_module
from template.config import Secrets, parse_config
from template.neuron import Neuron

POSITION = phase_at(1, Schedule())


class OneRound(Neuron):
    """Has one round, which raises what it is given."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        super().__init__(parse_config(["--neuron.dir", str(folder)], "miner", {}), Secrets())
        self.error = error
        self.positions = [POSITION]

    def wait_for_next_round(self) -> Position | None:
        return self.positions.pop() if self.positions else None

    def round(self, position: Position) -> None:
        if self.error is not None:
            raise self.error


def skipped(folder: Path) -> list[str]:
    return [event.text for event in EventReader(folder / "events.jsonl").read_new() if event.event == "round_skipped"]


def test_a_round_that_works_is_not_spoken_of(tmp_path: Path) -> None:
    OneRound(tmp_path).run()
    assert skipped(tmp_path) == []


def test_a_round_without_its_hub_is_skipped_and_the_next_is_waited_for(tmp_path: Path) -> None:
    OneRound(tmp_path, HubError("no answer")).run()
    assert skipped(tmp_path) == ["round 0: no answer"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_said_in_one_line_with_the_file(tmp_path: Path, number: int) -> None:
    OneRound(tmp_path, OSError(number, os.strerror(number), "/state/averages.tmp")).run()
    assert skipped(tmp_path) == [
        f"round 0: cannot write /state/averages.tmp: {os.strerror(number)}; free some space there"
    ]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone", "x"), ZeroDivisionError("a bug")])
def test_a_bug_ends_the_neuron(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        OneRound(tmp_path, error).run()


def failing(times: int, error: Exception) -> Callable[[], str]:
    def action() -> str:
        nonlocal times
        times -= 1
        if times >= 0:
            raise error
        return "done"

    return action


def test_a_start_waits_for_a_service_that_comes_up_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "START_RETRY_S", 0.0)
    assert OneRound(tmp_path)._patiently(failing(3, HubError("down")), "check it") == "done"


def test_a_start_gives_up_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "START_PATIENCE_S", 0.0)
    with pytest.raises(ServiceError, match=r"down; check --hub\.endpoint"):
        OneRound(tmp_path)._patiently(failing(9, HubError("down")), "check --hub.endpoint")


def test_a_start_that_is_told_to_stop_waits_no_longer(tmp_path: Path) -> None:
    neuron = OneRound(tmp_path)
    neuron.stopping.set()
    with pytest.raises(ServiceError):
        neuron._patiently(failing(9, HubError("down")), "")


def test_wrong_bytes_are_not_asked_for_again(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        OneRound(tmp_path)._patiently(failing(1, IntegrityError("tampered")), "")


class Blocks:
    """A chain whose next block comes as soon as somebody waits for it."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.age_s = 0.0

    def wait(self, until: int, timeout_s: float) -> int:
        self.block += self.block < until
        return self.block


def at_block(folder: Path, block: int, last_round: int) -> Neuron:
    neuron = Neuron(parse_config(["--neuron.dir", str(folder)], "miner", {}), Secrets())
    neuron.schedule = SCHEDULE
    neuron.blocks = Blocks(block)  # type: ignore[assignment]
    neuron._last_round = last_round
    return neuron


SCHEDULE = Schedule(start_block=1, train=5, commit=2, verify=2, all_reduce=2, publish=2)
SECOND = 1 + SCHEDULE.round_blocks  # first block of round 1


@pytest.mark.parametrize(
    ("block", "last_round", "begins", "at"),
    [
        (0, -1, 0, 1),  # before the first round
        (SECOND, 0, 1, SECOND),  # the last round made no epoch, and was waited out
        (SECOND + 4, 0, 1, SECOND + 4),  # late, but TRAIN lasts
        (SECOND + 5, 0, 2, 2 * SECOND - 1),  # too late
        (SECOND - 1, 0, 1, SECOND),  # in good time
        (SECOND + 2, 1, 2, 2 * SECOND - 1),  # became ready in mid-round
    ],
)
def test_every_round_is_begun_once_and_in_its_train_phase(
    tmp_path: Path, block: int, last_round: int, begins: int, at: int
) -> None:
    neuron = at_block(tmp_path, block, last_round)
    position = neuron.wait_for_next_round()
    assert position is not None
    assert (position.round, position.block) == (begins, at)
    neuron.blocks.block = at + 1
    following = neuron.wait_for_next_round()
    assert following is not None
    assert following.round == begins + 1


def test_a_neuron_that_is_told_to_stop_begins_no_round(tmp_path: Path) -> None:
    neuron = at_block(tmp_path, 3, 0)
    neuron.stopping.set()
    assert neuron.wait_for_next_round() is None
