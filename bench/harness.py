"""What every benchmark shares: interleaved timing, claims as JSON, and a table.

A claim is a figure of the README with the goal that it has to meet. A timing is only ever compared with another
one taken in the same process, run by turns: on a shared machine, two runs minutes apart differ by more than what
is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One figure.

    Attributes:
        name: what was measured, with its unit.
        value: what came out.
        goal: the bound, in words, such as ">= 0.97".
        holds: whether the value meets it.
    """

    name: str
    value: float
    goal: str
    holds: bool


def at_least(name: str, value: float, bound: float) -> Claim:
    """A claim that ``value`` is no less than ``bound``."""
    return Claim(name=name, value=value, goal=f">= {bound:g}", holds=value >= bound)


def at_most(name: str, value: float, bound: float) -> Claim:
    """A claim that ``value`` is no more than ``bound``."""
    return Claim(name=name, value=value, goal=f"<= {bound:g}", holds=value <= bound)


def arguments(description: str, *, jobs: bool = False) -> argparse.Namespace:
    """``--quick`` and ``--json FILE``, which every benchmark takes; with ``jobs``, also ``--jobs N``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    if jobs:
        parser.add_argument("--jobs", type=int, metavar="N", help="processes, by default one per core and two at most")
    return parser.parse_args()


def interleaved(cases: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each case returned in each of ``repeats`` turns, after one turn that is not counted."""
    results: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            value = case()
            if turn:
                results[name].append(value)
    return results


def ratio_of_medians(over: Sequence[float], under: Sequence[float]) -> float:
    """``median(over) / median(under)``."""
    return statistics.median(over) / statistics.median(under)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title)
    for place, column in enumerate(columns):
        drawn.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


def report(claims: Sequence[Claim], path: Path | None) -> int:
    """Print the claims, write them as JSON to ``path`` if there is one; the exit status: 0 if all hold."""
    rows = [(claim.name, f"{claim.value:.4g}", claim.goal, "yes" if claim.holds else "NO") for claim in claims]
    table("Claims", ("claim", "value", "goal", "holds"), rows)
    if path is not None:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
        document = {"machine": machine, "claims": [dataclasses.asdict(claim) for claim in claims]}
        path.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if all(claim.holds for claim in claims) else 1
