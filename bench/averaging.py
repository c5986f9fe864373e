"""The all-reduce in figures: speed, bytes against loss, slow links, the exact ways of averaging DoRA, and faults.

    python -m bench.averaging [--quick] [--only SECTION ...] [--json FILE]

Each section is a benchmark of its own (`bench.averaging_speed`, `bench.tradeoff`, `bench.rounds`, `bench.exact`,
`bench.faults`); here they run one after another in one process and their claims land in one file. A section that fails
is a claim that does not hold, and the others still run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench.averaging_speed
import bench.exact
import bench.faults
import bench.rounds
import bench.tradeoff
from bench.harness import Claim, report

logger = logging.getLogger(__name__)

SECTIONS: dict[str, Callable[[bool], list[Claim]]] = {
    "speed": bench.averaging_speed.run,
    "tradeoff": bench.tradeoff.run,
    "rounds": bench.rounds.run,
    "exact": bench.exact.run,
    "faults": bench.faults.run,
}
QUICK = ("speed", "rounds", "exact")
"""What fits into two minutes; beside it the bytes-against-loss curves and the faults do not, even shortened."""


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, shortened: under two minutes")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="these sections alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    options = parser.parse_args()
    claims: list[Claim] = []
    for name in options.only or (QUICK if options.quick else SECTIONS):
        print(f"== {name}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            claims += SECTIONS[name](options.quick)
        except Exception as exc:  # the boundary of one section: the others still count
            logger.exception("section %s failed", name)
            claims.append(Claim(name=f"section {name} ran: {exc!r}"[:200], value=0.0, goal=">= 1", holds=False))
        print(f"== {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return report(claims, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
