"""How long rounds block training: SwarmTrainer against stock `hivemind.Optimizer` in a stock Trainer.

    python -m bench.swarm [--quick] [--json FILE]

Two peers on loopback, the same model, batch, target, matchmaking time and time-out, each case with its own defaults
otherwise (but hivemind's own warning is heeded, and a request ends before the matchmaking does); the cases by turns.
Blocked is the time inside the optimizer's step, adding up gradients included; a sleep stands for an accelerator's work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Claim, arguments, at_most, report, table

GOAL = 0.5
TIMEOUT_S = 600.0
MATCHMAKING_S = 2.0
TARGETS = {128: 160, 640: 48}  # samples of a round, by the width of the model


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The worse of two peers: the blocked share of its wall time, and per round: samples of both, seconds, in all,
    blocked, and by phase.
    """

    blocked: float
    samples: float
    round_s: float
    blocked_s: float
    phases_s: dict[str, float]


def share(stock: bool, epochs: int, width: int, folder: Path) -> Share:
    options: dict[str, Any] = {
        "stock": stock, "epochs": epochs, "width": width, "target": TARGETS[width], "pace_s": 0.12,
        "times": {"matchmaking_time": MATCHMAKING_S, "averaging_timeout": 20.0}, "peers": [],
    }  # fmt: skip
    first, log = start({**options, "out": str(folder / "a")}, folder / "a.log")
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := re.search(r"initial_peers = \['(\S+?)'", log.read_text())):
        if first.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the first peer did not start:\n{log.read_text()}")
        time.sleep(0.1)
    second, other = start({**options, "peers": [found.group(1)], "out": str(folder / "b")}, folder / "b.log")
    results = []
    for process, written in ((first, log), (second, other)):
        process.wait(TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # stock peers leave processes behind
            os.killpg(process.pid, signal.SIGKILL)
        lines = [line for line in written.read_text().splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise RuntimeError(f"a peer failed:\n{written.read_text()}")
        results.append(json.loads(lines[0][7:]))
    worst = max(results, key=lambda result: result["blocked_s"] / max(result["wall_s"], 1e-9))
    rounds = max(1, worst["rounds"])
    return Share(
        blocked=worst["blocked_s"] / worst["wall_s"],
        samples=sum(result["samples"] for result in results) / rounds,
        round_s=worst["wall_s"] / rounds,
        blocked_s=worst["blocked_s"] / rounds,
        phases_s={name: seconds / rounds for name, seconds in worst["phases"].items()},
    )


def start(options: dict[str, Any], log: Path, module: str = "bench.swarm_peer") -> tuple[subprocess.Popen[bytes], Path]:
    """A peer as a process of one thread that leads a session of its own, and its log."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", module, json.dumps(options)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environ
        )
        return process, log


def median(values: list[Share]) -> Share:
    """The median of each figure."""
    return Share(
        blocked=statistics.median(value.blocked for value in values),
        samples=statistics.median(value.samples for value in values),
        round_s=statistics.median(value.round_s for value in values),
        blocked_s=statistics.median(value.blocked_s for value in values),
        phases_s={name: statistics.median(value.phases_s[name] for value in values) for name in values[0].phases_s},
    )


def compare(width: int, turns: int, epochs: int) -> list[Claim]:
    measured: dict[str, list[Share]] = {"SwarmTrainer": [], "stock Trainer and hivemind.Optimizer": []}
    for _ in range(turns):
        for name, values in measured.items():
            with tempfile.TemporaryDirectory() as folder:
                values.append(share(name.startswith("stock"), epochs, width, Path(folder)))
    medians = {name: median(values) for name, values in measured.items()}
    ours, stock = medians.values()
    millions = f"{sizes_mb(width):.0f} MB of gradients"
    rows = [
        (name, f"{100 * m.blocked:.1f}%", f"{m.blocked_s:.2f}", f"{m.round_s:.2f}", f"{m.samples:.0f}")
        for name, m in medians.items()
    ]
    table(
        f"Two peers, {millions}",
        ("case", "blocked share", "blocked s per round", "s per round", "samples per round"),
        rows,
    )
    phases = [(name, *(f"{one.phases_s[name]:.3f}" for one in (ours, stock))) for name in ours.phases_s]
    table("Where a round's blocked seconds go", ("on the training thread", "SwarmTrainer", "stock"), phases)
    return [at_most(f"blocked share, SwarmTrainer over stock, {millions}", ours.blocked / stock.blocked, GOAL)]


def sizes_mb(width: int) -> float:
    """fp32 gradients of `swarm_peer.build(width)`: four blocks of 12 * width**2, and embeddings."""
    return 4 * (4 * 12 * width * width + 288 * width) / 1e6


def main() -> int:
    options = arguments("blocked share of the wall time per round, against stock hivemind.Optimizer")
    # Nine rounds are measured, the tenth among them, in which SwarmTrainer averages the state.
    turns, widths = (1, (128,)) if options.quick else (3, (128, 640))
    claims = [claim for width in widths for claim in compare(width, turns, epochs=12)]
    return report(claims, options.json)


if __name__ == "__main__":
    sys.exit(main())
