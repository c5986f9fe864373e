"""Bytes from strangers, guided by coverage: receipts, challenges, answers, evidence, frames, published checks.

    python -m bench.fuzz [--quick] [--minutes N] [--json FILE] [--keep DIR] [--target NAME ...] [--reproduce FILE]

Each target of `bench.fuzzing.targets` has a process of its own, and its share of the time. New inputs are kept in DIR
and used again by the next run; one that breaks something lies in DIR/broken, and ``--reproduce`` runs it once more.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.fuzzing.campaign import RSS_LIMIT_MB, Outcome, fuzz, is_available, load
from bench.harness import Claim, at_least, at_most, report, table

QUICK_MINUTES = 1.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz everything that reads bytes from strangers.")
    parser.add_argument("--quick", action="store_true", help="a minute in all")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="of fuzzing, for all targets together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new inputs go here, and are used again")
    parser.add_argument("--target", action="append", metavar="NAME", help="only this one; may be given again")
    parser.add_argument("--runs", type=int, default=0, metavar="N", help="end a target after so many inputs")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="run one input of --target again, nothing else")
    return parser.parse_args()


def main() -> int:
    """The exit status: 0 if no input broke anything."""
    given = _arguments()
    if given.reproduce is not None:
        return _reproduce(given.target or [], given.reproduce)
    if not is_available():
        print(
            "bench.fuzz needs atheris, which has wheels for CPython on Linux: pip install -e '.[dev]'", file=sys.stderr
        )
        return 2
    load()
    registry = importlib.import_module("bench.fuzzing.targets")
    names: list[str] = given.target or list(registry.TARGETS)
    unknown = [name for name in names if name not in registry.TARGETS and name != registry.PLANTED.name]
    if unknown:
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(registry.TARGETS)}", file=sys.stderr)
        return 2
    minutes = QUICK_MINUTES if given.quick else given.minutes
    weights = {name: registry.find_target(name).weight for name in names}
    shares = {name: 60 * minutes * weight / sum(weights.values()) for name, weight in weights.items()}
    with ExitStack() as stack:
        keep: Path = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        outcomes = fuzz(shares, keep.resolve(), given.runs)
        _show(outcomes)
        for outcome in outcomes:
            if outcome.status:
                print(f"\n{outcome.target}: exit status {outcome.status}\n{outcome.tail}", file=sys.stderr)
            if outcome.reproducer is not None:
                raw = outcome.reproducer.read_bytes()
                print(f"{outcome.target} breaks on {raw[:200]!r} ({outcome.reproducer})", file=sys.stderr)
        return report(_claims(outcomes), given.json)


def _reproduce(names: Sequence[str], file: Path) -> int:
    from bench.fuzzing.guard import exercise
    from bench.fuzzing.targets import find_target, warm_up

    for name in names:
        target = find_target(name)
        warm_up(target)
        exercise(target, file.read_bytes())
        print(f"{name}: nothing breaks")
    return 0


def _show(outcomes: Sequence[Outcome]) -> None:
    rows = [
        (one.target, str(one.executions), str(one.covered), str(one.peak_rss_mb), "broken" if one.status else "held")
        for one in outcomes
    ]
    table("Targets", ("target", "inputs run", "places reached", "peak MB", "promise"), rows)


def _claims(outcomes: Sequence[Outcome]) -> list[Claim]:
    return [
        at_most("targets that an input broke", sum(one.status != 0 for one in outcomes), 0),
        at_least("inputs run by the target that ran fewest", min(one.executions for one in outcomes), 1),
        at_most("peak memory of a target, MB", max(one.peak_rss_mb for one in outcomes), RSS_LIMIT_MB),
    ]


if __name__ == "__main__":
    sys.exit(main())
