"""What a swarm ends with: do peers save the same bits, and is their loss that of one process with their batch?

    python -m bench.swarm_agreement [--quick] [--json FILE]

Two and three processes on loopback with SwarmTrainer, tiny GPT-2 and Llama, all weights and DoRA. Against each, one
process with a stock `Trainer` and the same global batches: as many steps, each with the samples that all peers brought
to that round. How far it is from one process with as many samples in another order says what chance can do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import Claim, arguments, at_least, at_most, report, table
from bench.swarm import start
from bench.swarm_agreement_peer import quiet, samples_of_rounds, save_base, train_alone

GOAL = 0.01
TIMEOUT_S = 300.0
QUICK = (("gpt2", "full"), ("llama", "dora"))
CASES = (*QUICK, ("gpt2", "dora"), ("llama", "full"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One swarm, and the process that it is compared with.

    Attributes:
        name: model, what is trained, and how many peers.
        before, swarm, alone: held-out losses: before training, of the peers, of one process.
        chance: relative difference of one process with as many samples in another order.
        equal: whether all peers' final checkpoints hold the same bytes: weights, moments and configurations.
        files: how many files that are of each.
        batch: mean samples of a round.
        together: share of the rounds in which all peers averaged.
    """

    name: str
    before: float
    swarm: float
    alone: float
    chance: float
    equal: bool
    files: int
    batch: float
    together: float

    @property
    def difference(self) -> float:
        return self.swarm / self.alone - 1


def run(model: str, kind: str, peers: int, epochs: int, folder: Path) -> Outcome:
    options: dict[str, Any] = {
        "model": model, "kind": kind, "peers": peers, "epochs": epochs, "target": 192, "pace_s": 0.05 * peers,
        "base_steps": 48, "folder": str(folder), "initial_peers": [],
    }  # fmt: skip
    if kind == "dora":
        save_base(options)
    results = swarm(options, folder)
    rounds = max((result["rounds"] for result in results), key=len)
    batches = samples_of_rounds(options)
    before, alone = train_alone(options, batches)
    _, other = train_alone(options, batches, seed=1)
    return Outcome(
        name=f"{model} {kind}, {peers} peers",
        before=before,
        # Of peers that hold the same bits it is the same.
        swarm=max((result["loss"] for result in results), key=lambda loss: abs(loss - alone)),
        alone=alone,
        chance=other / alone - 1,
        equal=all(result["files"] == results[0]["files"] for result in results),
        files=len(results[0]["files"]),
        batch=sum(map(len, batches)) / len(batches),
        together=sum(members == peers for _, members, _ in rounds) / len(rounds),
    )


def swarm(options: dict[str, Any], folder: Path) -> list[Any]:
    """What each peer says of its training."""
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    until = time.monotonic() + TIMEOUT_S
    try:
        for rank in range(options["peers"]):
            started.append(start({**options, "rank": rank}, folder / f"{rank}.log", "bench.swarm_agreement_peer"))
            process, log = started[0]
            while not (found := re.search(r"initial_peers = \['(\S+?)'", log.read_text())):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the first peer did not start:\n{log.read_text()}")
                time.sleep(0.1)
            options["initial_peers"] = [found.group(1)]
        results = []
        for process, log in started:
            process.wait(max(1.0, until - time.monotonic()))
            lines = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise RuntimeError(f"a peer failed:\n{log.read_text()}")
            results.append(json.loads(lines[0][7:]))
        return results
    finally:
        for process, _ in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    options = arguments("final checkpoints of a swarm's peers, and their loss against one process")
    quiet()
    cases, sizes, epochs = (QUICK, (2,), 8) if options.quick else (CASES, (2, 3), 24)
    outcomes: list[Outcome] = []
    for peers in sizes:
        for model, kind in cases:
            with tempfile.TemporaryDirectory() as folder:
                outcomes.append(run(model, kind, peers, epochs, Path(folder)))
            print(outcomes[-1], file=sys.stderr, flush=True)
    table(
        f"{epochs} steps of a swarm against one process (held-out loss, nats per token)",
        ("case", "before", "swarm", "one process", "difference", "by chance", "samples per round", "all in the round",
         "same bits"),
        [
            (o.name, f"{o.before:.4f}", f"{o.swarm:.4f}", f"{o.alone:.4f}", f"{100 * o.difference:+.2f}%",
             f"{100 * o.chance:+.2f}%", f"{o.batch:.0f}", f"{100 * o.together:.0f}%",
             f"{o.files} files" if o.equal else "NO")
            for o in outcomes
        ],
    )  # fmt: skip
    claims: list[Claim] = [at_most(f"loss apart, {o.name}", abs(o.difference), GOAL) for o in outcomes]
    claims.append(at_least("swarms whose peers save the same bits, share", _share_equal(outcomes), 1.0))
    return report(claims, options.json)


def _share_equal(outcomes: list[Outcome]) -> float:
    return sum(outcome.equal for outcome in outcomes) / len(outcomes)


if __name__ == "__main__":
    sys.exit(main())
