"""How long rounds block training: SwarmTrainer against stock `hivemind.Optimizer` in a stock Trainer.

    python -m bench.swarm [--quick] [--json FILE]

Two peers on loopback, the same model, batch, target, matchmaking time and time-out, each case with its own defaults
otherwise; the cases by turns. Blocked is the time inside the optimizer's step; a sleep stands for an accelerator's
work.
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
from pathlib import Path
from typing import Any

from bench.harness import Claim, arguments, at_most, report, table

GOAL = 0.5
TIMEOUT_S = 300.0


def share(stock: bool, epochs: int, folder: Path) -> tuple[float, float]:
    """Blocked share of the wall time, and blocked seconds per round, of the worse of two peers."""
    options: dict[str, Any] = {
        "stock": stock, "epochs": epochs, "target": 160, "pace_s": 0.15,
        "times": {"matchmaking_time": 2.0, "averaging_timeout": 20.0}, "peers": [],
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
    return worst["blocked_s"] / worst["wall_s"], worst["blocked_s"] / max(1, worst["rounds"])


def start(options: dict[str, Any], log: Path) -> tuple[subprocess.Popen[bytes], Path]:
    with log.open("wb") as output:
        command = [sys.executable, "-m", "bench.swarm_peer", json.dumps(options)]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True), log


def main() -> int:
    options = arguments("blocked share of the wall time per round, against stock hivemind.Optimizer")
    turns, epochs = (1, 9) if options.quick else (3, 14)
    measured: dict[str, list[tuple[float, float]]] = {"SwarmTrainer": [], "stock Trainer and hivemind.Optimizer": []}
    for _ in range(turns):
        for name, values in measured.items():
            with tempfile.TemporaryDirectory() as folder:
                values.append(share(name.startswith("stock"), epochs, Path(folder)))
    medians = {
        name: tuple(statistics.median(value[place] for value in values) for place in (0, 1))
        for name, values in measured.items()
    }
    rows = [(name, f"{100 * part:.1f}%", f"{seconds:.2f}") for name, (part, seconds) in medians.items()]
    table("Two peers, rounds of about 3 s of work", ("case", "blocked share of the time", "blocked s per round"), rows)
    ours, stock = (value[0] for value in medians.values())
    claims: list[Claim] = [at_most("blocked share, SwarmTrainer over stock", ours / stock, GOAL)]
    return report(claims, options.json)


if __name__ == "__main__":
    sys.exit(main())
