from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hivetrain.tracking.events import Event
from hivetrain.tracking.status import NeuronStatus
from neurons.report import with_scores
from neurons.screen import Narrator, View, current_round, event_line, phase_progress, render, sparkline


def row(name: str = "miner-1", **fields: object) -> NeuronStatus:
    return NeuronStatus(name=name, role=name.split("-")[0], pid=1, updated_at=100.0, **fields)


def draw(view: View, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(render(view))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_sparkline_runs_from_its_lowest_to_its_highest_value() -> None:
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline([float(n) for n in range(100)], width=10)) == 10
    assert sparkline([1.0, float("nan"), 2.0]) == "▁█"


def test_the_round_is_that_of_the_neuron_furthest_on() -> None:
    rows = [
        row(round=4, phase="train"),
        row("miner-2", round=3, phase="publish"),
        row("validator-1", round=4, phase="commit"),
    ]
    assert current_round(rows) == (4, "commit")
    assert current_round([row()]) == (-1, "")
    assert current_round([row(round=2, phase="", state="all-reduce")]) == (2, "all_reduce")


def test_progress_is_the_mean_of_the_miners_steps() -> None:
    rows = [row(step=10, num_steps=20), row("miner-2", step=30, num_steps=20), row("validator-1", step=0, num_steps=20)]
    assert phase_progress(rows) == pytest.approx(0.75)
    assert phase_progress([]) == 0.0


def test_the_screen_shows_what_is_known_and_a_dash_for_the_rest() -> None:
    known = row(uid=3, epoch=7, step=61, num_steps=100, loss=3.398, tokens_per_second=2104.0, score=0.91, weight=0.36)
    text = draw(View(title="net", rows=[known, row("miner-2")], losses=[(0, 4.92), (1, 3.41)], now=102.0))
    line = next(line for line in text.splitlines() if "miner-1" in line)
    assert line.split()[:10] == ["3", "miner-1", "starting", "7", "61/100", "3.398", "2,104", "0.91", "0.36", "2s"]
    line = next(line for line in text.splitlines() if "miner-2" in line)
    assert line.split()[:9] == ["-", "miner-2", "starting", "-", "-", "-", "-", "-", "-"]
    assert "val loss 4.920 -> 3.410  █▁" in text


def test_80_columns_hold_every_number_and_the_detail_alone_is_cut() -> None:
    full = row("validator-1", uid=12, state="all-reduce", epoch=1234, step=50, num_steps=50, loss=3.398)
    full = replace(full, tokens_per_second=12345.0, score=0.91, weight=0.36, detail="with 63 others of the group")
    lines = draw(View(title="net", rows=[full], now=199.0), width=80).splitlines()
    line = next(line for line in lines if "validator-1" in line)
    assert line.split()[:10] == [
        "12",
        "validator-1",
        "all-reduce",
        "1234",
        "50/50",
        "3.398",
        "12,345",
        "0.91",
        "0.36",
        "99s",
    ]
    assert "…" in line
    assert len([line for line in lines if "group" in line or "others" in line]) == 0


def test_miners_are_shown_with_what_the_validator_gave_them(tmp_path: Path) -> None:
    rows = [row(hotkey="5A"), row("miner-2", hotkey="5B"), row("miner-3", hotkey="5C")]
    assert with_scores(tmp_path, rows) == rows
    (tmp_path / "validator-1").mkdir()
    scores = tmp_path / "validator-1" / "scores.json"
    scores.write_text(json.dumps({"scores": {"5A": {"score": 0.9}, "5B": {"unscored": "x"}}, "weights": {"5A": 1.0}}))
    first, second, third = with_scores(tmp_path, rows)
    assert (first.score, first.weight) == (0.9, 1.0)
    assert (second.score, third.score, third.weight) == (None, None, None)
    scores.write_text("{")
    assert with_scores(tmp_path, rows) == rows


def test_text_of_neurons_is_shown_as_it_is_and_not_as_markup() -> None:
    text = draw(View(title="net", rows=[row(detail="[bold]x[/nope]")], events=["[red]e"], now=100.0))
    assert "[bold]x[/nope]" in text
    assert "[red]e" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_screen_fits_any_width(width: int) -> None:
    view = View(
        title="net" * 40, stage="s" * 300, rows=[row(detail="d" * 100)], events=["e" * 300], urls={"hub": "u" * 300}
    )
    assert max(len(line) for line in draw(view, width).splitlines()) <= width


def test_lines_say_each_thing_once() -> None:
    narrator = Narrator()
    view = View(title="net", stage="genesis", goal=(0, 2))
    assert narrator.lines(view, []) == ["genesis"]
    assert narrator.lines(view, ["12:00:00 x"]) == ["12:00:00 x"]
    view = View(title="net", rows=[row(round=0, phase="train")], losses=[(4, 5.0)], goal=(0, 2))
    assert narrator.lines(view, []) == ["round 0: train", "starting from epoch 4, val loss 5.0000"]
    assert narrator.lines(view, []) == []
    rows = [row(round=0, phase="commit", loss=4.5, tokens_per_second=1000.0)]
    view = View(title="net", rows=rows, losses=[(4, 5.0), (5, 4.0)], goal=(1, 2))
    assert narrator.lines(view, []) == [
        "round 0: commit, training loss 4.500, 1,000 tokens/s together",
        "epoch 5 published, val loss 4.0000 (1/2)",
    ]


def test_an_event_without_text_is_told_by_its_kind() -> None:
    assert event_line(Event(time=0.0, name="miner-1", event="set_weights")).endswith(" miner-1 set weights")
