"""The picture of a running network: one live screen on a terminal, one line per event anywhere else.

Both are pure functions of a `View`, which `hivetrain up` and `hivetrain status` fill in from the status files,
the event log and the hub.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hivetrain.progress import Phase
from hivetrain.tracking.events import Event
from hivetrain.tracking.status import NeuronStatus, read_statuses
from neurons.report import with_scores

PHASES = [phase.value for phase in Phase]
PHASE_OF_STATE = {  # of a neuron that does not report its phase
    "training": "train",
    "committed": "commit",
    "committing": "commit",
    "verifying": "verify",
    "all-reduce": "all_reduce",
    "publishing": "publish",
    "scoring": "publish",
}
BARS = "▁▂▃▄▅▆▇█"
STALE_S = 30.0
STATE_STYLES = {
    "training": "green",
    "starting": "yellow",
    "waiting": "dim",
    "restarting": "red",
    "failed": "bold red",
    "stopping": "yellow",
    "resync": "yellow",
}


@dataclass(slots=True, kw_only=True)
class View:
    """What there is to show, as of ``now`` (unix seconds)."""

    title: str
    stage: str = ""  # before the first round: what we wait for
    rows: list[NeuronStatus] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)  # (epoch, held-out loss): where we began, then news
    goal: tuple[int, int] | None = None  # epochs published since the start, of how many
    events: list[str] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    footer: str = ""
    now: float = field(default_factory=time.time)


def current_round(rows: Sequence[NeuronStatus]) -> tuple[int, str]:
    """Round and phase of the neuron that is furthest; ``(-1, "")`` before the first round."""
    phases = [(row.round, row.phase or PHASE_OF_STATE.get(row.state, "")) for row in rows]
    known = [(number, PHASES.index(phase)) for number, phase in phases if phase in PHASES and number >= 0]
    if not known:
        return -1, ""
    round_number, phase = max(known)
    return round_number, PHASES[phase]


def phase_progress(rows: Sequence[NeuronStatus]) -> float:
    """Share of the round's inner steps that the miners have done, in [0, 1]."""
    shares = [min(row.step / row.num_steps, 1.0) for row in rows if row.role == "miner" and row.num_steps > 0]
    return sum(shares) / len(shares) if shares else 0.0


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The last ``width`` values as bars, lowest to highest."""
    shown = [value for value in values if value == value][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def event_line(event: Event) -> str:
    """``12:04:33 validator-1 weights set``."""
    text = event.text or event.event.replace("_", " ")
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.name} {text}"


def render(view: View) -> RenderableType:
    """The live screen."""
    parts: list[RenderableType] = [_header(view)]
    if view.rows:
        parts.append(_table(view))
    parts.extend(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in view.events[-6:])
    urls = "   ".join(f"{name} {url}" for name, url in view.urls.items())
    # The shortest line comes last: a terminal echoes ^C behind it, and behind a full one that would scroll the screen.
    parts.extend(Text(line, style="cyan", no_wrap=True, overflow="ellipsis") for line in (urls, view.footer) if line)
    return Group(*parts)


def _header(view: View) -> Panel:
    grid = Table.grid(padding=(0, 2))
    _, phase = current_round(view.rows)
    if view.stage:
        grid.add_row(Text(view.stage, style="yellow", no_wrap=True, overflow="ellipsis"))
    else:
        epoch = max([row.epoch for row in view.rows], default=-1)
        steps = Text()
        for name in PHASES:
            steps.append(f" {name.replace('_', '-')} ", style="reverse green" if name == phase else "dim")
        bar = ProgressBar(total=1.0, completed=phase_progress(view.rows), width=20)
        grid.add_row(Text(f"epoch {max(epoch, 0)}", style="bold"), steps, bar)
    loss_line = Text()
    if view.goal is not None:
        loss_line.append(f"{view.goal[0]}/{view.goal[1]} epochs published   ", style="bold")
    if view.losses:
        first, last = view.losses[0][1], view.losses[-1][1]
        loss_line.append(f"val loss {first:.3f} -> {last:.3f}  ", style="bold green" if last < first else "bold")
        loss_line.append(sparkline([loss for _, loss in view.losses]), style="green")
    return Panel(Group(grid, loss_line) if loss_line else grid, title=view.title, title_align="left")


def _table(view: View) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), expand=False)
    for name in ("UID", "NEURON", "STATE", "EPOCH", "STEP", "LOSS", "TOK/S", "SCORE", "WEIGHT", "SEEN", ""):
        left = name in ("NEURON", "STATE", "")
        # 80 columns hold all but the last: it alone gives way, cut within its line.
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "")
    for row in view.rows:
        age = view.now - row.updated_at
        stale = age > STALE_S
        table.add_row(
            "-" if row.uid is None else str(row.uid),
            row.name,
            Text(row.state, style=STATE_STYLES.get(row.state, "")),
            "-" if row.epoch < 0 else str(row.epoch),
            f"{row.step}/{row.num_steps}" if row.num_steps else "-",
            _number(row.loss, ".3f"),
            _number(row.tokens_per_second, ",.0f"),
            _number(row.score, ".2f"),
            _number(row.weight, ".2f"),
            Text(_age(age), style="red" if stale else "dim"),
            Text(row.detail[:60], style="dim", no_wrap=True, overflow="ellipsis"),
        )
    return table


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _age(seconds: float) -> str:
    if seconds < 0 or seconds > 86_400 * 365:
        return "-"
    return f"{seconds:.0f}s" if seconds < 100 else f"{seconds / 60:.0f}m"


class Narrator:
    """Tells a run as lines, for logs and pipes: each call says only what is new since the last."""

    def __init__(self) -> None:
        self._stage = ""
        self._round: tuple[int, str] = (-1, "")
        self._num_losses = 0

    def lines(self, view: View, new_events: Sequence[str]) -> list[str]:
        """What is to be said now."""
        said: list[str] = []
        if view.stage != self._stage:
            self._stage = view.stage
            if view.stage:
                said.append(view.stage)
        said.extend(new_events)
        position = current_round(view.rows)
        if position != self._round and position[0] >= 0 and _is_later(position, self._round):
            self._round = position
            said.append(f"round {position[0]}: {position[1].replace('_', '-')}{_steps(view.rows, position[1])}")
        for number, (epoch, loss) in enumerate(view.losses):
            if number < self._num_losses:
                continue
            if number == 0:
                said.append(f"starting from epoch {epoch}, val loss {loss:.4f}")
                continue
            goal = f" ({number}/{view.goal[1]})" if view.goal is not None else ""
            said.append(f"epoch {epoch} published, val loss {loss:.4f}{goal}")
        self._num_losses = len(view.losses)
        return said


def _is_later(now: tuple[int, str], before: tuple[int, str]) -> bool:
    """Neurons report at different moments: within a round, a phase is not told twice."""
    return now[0] != before[0] or PHASES.index(now[1]) > PHASES.index(before[1])


def _steps(rows: Sequence[NeuronStatus], phase: str) -> str:
    losses = [row.loss for row in rows if row.role == "miner" and row.loss is not None]
    if phase != Phase.COMMIT.value or not losses:
        return ""
    rates = [row.tokens_per_second or 0.0 for row in rows if row.role == "miner"]
    return f", training loss {sum(losses) / len(losses):.3f}, {sum(rates):,.0f} tokens/s together"


def print_status(folder: Path, *, is_running: bool, console: Console) -> None:
    """What `hivetrain status` shows: the newest status of every neuron, running or not."""
    rows = with_scores(folder, read_statuses(folder / "status"))
    if not rows:
        if is_running:
            console.print(f"the network in {folder} is starting; no neuron has reported yet")
        else:
            console.print(f"no neuron has run in {folder}; start some with `hivetrain up --dir {folder}`")
        return
    view = View(title=str(folder), rows=rows)
    if not is_running:
        view.stage = "not running: this is how it was left"
    console.print(render(view))
