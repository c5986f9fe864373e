"""One all-reduce's time, CPU and memory: ours, stock hivemind's and gloo's, side by side on loopback.

    python -m bench.averaging_speed [--quick] [--json FILE]

Every peer is a process of its own (`bench.averaging_peer`), and a round of each way is run by turns. What is timed is
the all-reduce from a group that has met to the last member's mean: hivemind's matchmaking and our plan come before.
Ours checks every chunk against the sender's committed root and encrypts and signs what it sends; hivemind encrypts;
gloo does none of these. CPU and memory are those of a peer's Python processes and its libp2p daemon together. The mean
lands in memory that is kept from round to round, as hivemind's and gloo's does; with "fresh memory" the round's own.
"libp2p only" is what peers have that cannot dial each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from bench.averaging_peer import Spec
from bench.harness import Claim, arguments, at_least, at_most, ratio_of_medians, report, table

FRESH = "ours, fresh memory"
LIBP2P = "ours, libp2p only"
MAX_ERROR = 1e-5
ATTEMPTS = 4  # on a busy machine hivemind's matchmaking, or a part of its mean, fails at times
MEMORY_PER_PEER = {"ours": 2.5, FRESH: 2.5, LIBP2P: 2.5, "hivemind": 3.0, "gloo": 1.0}  # times the vector, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One all-reduce: seconds from the first member's start to the last one's end; the rest is a member's most."""

    seconds: float
    cpu_s: float  # mean over the members
    peak_mb: float


class Group:
    """Peers of one kind. ``with`` starts and ends them.

    Args:
        folder: of their logs.
        swarms: settings of each peer's `Swarm`, where it is one of ours.
        max_error: of a mean, relative to its largest value.
    """

    def __init__(
        self,
        kind: str,
        num_peers: int,
        folder: Path,
        swarms: Sequence[dict[str, Any]] = (),
        max_error: float = MAX_ERROR,
    ) -> None:
        self.kind = kind
        self._num_peers = num_peers
        self._folder = folder
        self._swarms = list(swarms) or [{}] * num_peers
        self._max_error = max_error
        self._peers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Group:
        environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
        for index in range(self._num_peers):
            command = [sys.executable, "-m", "bench.averaging_peer", self.kind, str(index), str(self._num_peers)]
            with (self._folder / f"{self.kind}-{index}.log").open("w") as log:
                self._peers.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env=environment,
                        start_new_session=True,
                    )
                )
        try:
            first = self._ask([0], do="join", first=None, swarm=self._swarms[0])[0]
            for index in range(1, self._num_peers):
                self._say(index, do="join", first=first, swarm=self._swarms[index])
            for index in range(1, self._num_peers):
                self._hear(index)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._ask(range(self._num_peers), do="leave")
        for peer in self._peers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                peer.wait(0.1 if kind else 20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(peer.pid, signal.SIGKILL)  # its own session: daemons and helpers of hivemind's too
            peer.wait()
            for pipe in (peer.stdin, peer.stdout):
                if pipe is not None:
                    pipe.close()

    def prepare(self, specs: Sequence[Spec]) -> None:
        """Everyone makes its vectors."""
        self._group = self._ask(range(self._num_peers), do="prepare", specs=specs)

    def round(self) -> Round:
        """One all-reduce.

        Raises:
            RuntimeError: the mean is wrong, or (ours) members hold different bits.
        """
        for _ in range(ATTEMPTS):
            answers = self._try()
            error = max(answer["error"] for answer in answers)
            if error <= self._max_error or self.kind != "hivemind":
                break
            print(f"{self.kind}: a mean is off by {error:.2g}; once more", flush=True)
        if error > self._max_error:
            raise RuntimeError(f"{self.kind}: a mean is off by {error:.2g}")
        if self.kind.startswith("ours") and len({answer["sha256"] for answer in answers}) != 1:
            raise RuntimeError("ours: members hold different bits")
        return Round(
            seconds=max(answer["ended"] for answer in answers) - min(answer["began"] for answer in answers),
            cpu_s=statistics.mean(answer["cpu_s"] for answer in answers),
            peak_mb=max(answer["peak_mb"] for answer in answers),
        )

    def _try(self) -> list[Any]:
        everyone = range(self._num_peers)
        for _ in range(ATTEMPTS):
            if all(answer["met"] for answer in self._ask(everyone, do="meet", group=self._group)):
                return self._ask(everyone, do="go")
        raise RuntimeError(f"{self.kind}: no group of {self._num_peers} in {ATTEMPTS} attempts")

    def _ask(self, indices: Sequence[int], **command: object) -> list[Any]:
        for index in indices:
            self._say(index, **command)
        return [self._hear(index) for index in indices]

    def _say(self, index: int, **command: object) -> None:
        pipe = _pipe(self._peers[index].stdin)
        pipe.write(json.dumps(command) + "\n")
        pipe.flush()

    def _hear(self, index: int) -> Any:
        answer = _pipe(self._peers[index].stdout).readline()
        if not answer:
            log = (self._folder / f"{self.kind}-{index}.log").read_text()[-3000:]
            raise RuntimeError(f"peer {index} of {self.kind} died:\n{log}")
        return json.loads(answer)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("the peer has no pipe")
    return pipe


def fits(num_peers: int, num_elements: int, kinds: Sequence[str]) -> bool:
    """Whether the vectors of all kinds' peers fit into the memory that is free now."""
    vectors = sum(MEMORY_PER_PEER[kind] for kind in kinds) * 4 * num_elements
    available = int(psutil.virtual_memory().available)
    return num_peers * vectors < available


def measure(
    num_peers: int, sizes_mb: Sequence[int], repeats: int, kinds: Sequence[str], hivemind_repeats: int
) -> dict[tuple[int, str], list[Round]]:
    """Rounds by size in MB and kind, after one of each that is not counted; hivemind, which is slow, may have fewer."""
    results: dict[tuple[int, str], list[Round]] = {}
    with tempfile.TemporaryDirectory(prefix="averaging-speed-") as folder:
        groups = [Group(kind, num_peers, Path(folder)) for kind in kinds]
        started: list[Group] = []
        try:
            for group in groups:
                started.append(group.__enter__())
            for size_mb in sizes_mb:
                num_elements = size_mb * 1_000_000 // 4
                if not fits(num_peers, num_elements, kinds):
                    print(f"{size_mb} MB with {num_peers} peers is left out: too little memory is free", flush=True)
                    continue
                for group in groups:
                    group.prepare([("delta", num_elements, "fp32")])
                for turn in range(repeats + 1):
                    for group in groups:
                        if group.kind == "hivemind" and turn > hivemind_repeats:
                            continue
                        measured = group.round()
                        if turn:
                            results.setdefault((size_mb, group.kind), []).append(measured)
        except BaseException as exc:
            for group in started:
                group.__exit__(type(exc), exc, None)
            raise
        for group in started:
            group.__exit__(None, None, None)
    return results


def run(quick: bool) -> list[Claim]:
    """Measure, print the table, and return the claims."""
    rivals, variants = ("ours", "hivemind", "gloo"), ("ours", FRESH, LIBP2P)
    # Only what is compared is alive at a time: idle peers take their share of two cores too.
    cases: list[tuple[int, list[int], int, tuple[str, ...]]] = [
        (4, [100], 7, rivals),
        (4, [100], 1, (FRESH,)),
    ]
    if not quick:
        cases = [
            (2, [10, 100, 330], 3, rivals),
            (4, [10, 100, 330], 11, rivals),
            (4, [10, 100], 5, variants),
            (8, [10, 100, 330], 3, rivals),
        ]
    rows: list[list[str]] = []
    claims: list[Claim] = []
    ours_of: dict[tuple[int, int], list[Round]] = {}
    for num_peers, sizes_mb, repeats, kinds in cases:
        results = measure(num_peers, sizes_mb, repeats, kinds, 2 if quick else repeats)
        ours_of |= {(num_peers, size_mb): rounds for (size_mb, kind), rounds in results.items() if kind == "ours"}
        for size_mb, kind in results:
            if FRESH in kinds and kind == "ours":
                continue  # has its row
            rounds, ours = results[size_mb, kind], ours_of[num_peers, size_mb]
            rows.append(
                [
                    f"{size_mb} MB, {num_peers} peers, {kind}",
                    f"{statistics.median(one.seconds for one in rounds):.3f}",
                    f"{_over(rounds, ours):.2f}",
                    f"{statistics.median(one.cpu_s for one in rounds):.2f}",
                    f"{statistics.median(one.peak_mb for one in rounds):.0f}",
                ]
            )
        if num_peers == 4:
            claims += claims_of(results, "100 MB fp32, 4 peers")
    columns = ("all-reduce", "seconds", "over ours", "CPU s per peer", "peak MB above the level before")
    table("All-reduce on loopback, medians", columns, rows)
    return claims


def claims_of(results: dict[tuple[int, str], list[Round]], name: str) -> list[Claim]:
    """What 100 MB have to show, of the kinds that were measured."""
    claims, ours = [], results.get((100, "ours"), [])
    if ours and (100, "hivemind") in results:
        claims.append(at_least(f"{name}: hivemind's seconds over ours", _over(results[100, "hivemind"], ours), 5.0))
    if ours and (100, "gloo") in results:
        claims.append(at_most(f"{name}: our seconds over gloo's", _over(ours, results[100, "gloo"]), 2.0))
    if (100, FRESH) in results:
        peak = statistics.median(one.peak_mb for one in results[100, FRESH])
        claims.append(at_most(f"{name}: our peak memory above the level before, fresh memory, MB", peak, 100 + 64))
    return claims


def _over(rounds: Sequence[Round], under: Sequence[Round]) -> float:
    return ratio_of_medians([one.seconds for one in rounds], [one.seconds for one in under])


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    return report(run(options.quick), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
