"""Every fault of the all-reduce on real sockets and real processes: who is blamed, how long it takes, what is held.

    python -m bench.faults [--quick] [--json FILE]

Three senders and a validator, each a process with a libp2p daemon of its own (`bench.faults_peer`), go through rounds
in which one of them has one fault; who died is started again. A fault is handled where the others finish within the
deadline with the same bits, those are the mean of who did their part (checked chunk by chunk against the definition),
and whoever is at fault is blamed for the right cause and nobody else is. The same faults in virtual time, against more
group sizes: `tests/fault/test_averaging_matrix.py`. How a round goes on without its leader:
`tests/integration/test_network_failover.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.faults_peer import DEADLINE_S, JOINS_NOTHING, OTHER_PLAN, TWO_GROUPS, Setup, write
from bench.harness import Claim, arguments, at_least, at_most, report, table
from tests.keys import TestIdentity as Key

ELEMENTS = 425_984  # of each of three sections: 5 MB in fp32, two batches to a part
NUM_SENDERS, NUM_PEERS = 3, 4
SENDER, VALIDATOR = 1, 3
STEP_TIMEOUT_S = 100.0
DEAD_BEFORE = "dead before"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One fault, and what the others must make of it.

    Attributes:
        blame: the causes for which whoever has it may be blamed.
        certain: somebody must blame it.
        is_in: "all", "none" or "some" of the mean's chunks.
        bad: who has it.
        dies: its process does not outlive the round.
    """

    name: str
    blame: frozenset[str] = frozenset()
    certain: bool = True
    is_in: str = "some"
    bad: int = SENDER
    dies: bool = False


def case(name: str, *blame: str, certain: bool | None = None, **fields: Any) -> Case:
    """A case with these causes; certain wherever there are any."""
    return Case(name=name, blame=frozenset(blame), certain=bool(blame) if certain is None else certain, **fields)


CASES = [
    case("no fault", is_in="all"),
    case(JOINS_NOTHING, "absent", is_in="none"),
    case("nan", "not_finite", is_in="none"),
    case("infinity", "not_finite", is_in="none"),
    case("1e30", "out_of_bound", "not_finite", is_in="none"),
    case("wrong average", "wrong_average"),
    case("refuses everyone", "absent", "late"),
    case("too few batches", "late", "absent"),
    case("too many batches", "malformed", "absent"),
    case("too few bytes", "truncated", "malformed", "absent"),
    case("other bytes", "not_committed", "absent"),
    case("wrong shape", "wrong_schema", "absent"),
    case(OTHER_PLAN, "absent", is_in="none"),
    case("slow", "late", "absent"),
    case("duplicate identity", "late", certain=False),
    case("outsider", is_in="all"),
    case(TWO_GROUPS, is_in="all"),
    case("stopped", "late", "absent"),
    case(DEAD_BEFORE, "absent", is_in="none", dies=True),
    case("killed in the exchange", "late", "absent", dies=True),
    case("killed after sending", "late", "absent", certain=False, dies=True),
    case("killed in the exchange", "late", "absent", bad=VALIDATOR, dies=True),
]
QUICK = {
    "no fault",
    "nan",
    "wrong average",
    "other bytes",
    "outsider",
    TWO_GROUPS,
    DEAD_BEFORE,
    "killed in the exchange",
}


class Stuck(Exception):
    """A process ended, or did not do its part in time."""


class Group:
    """The processes of one group. A context: whatever happens, none of them is left."""

    def __init__(self, folder: Path, cases: Sequence[tuple[Case, str]]) -> None:
        self.folder = folder
        self.cases = list(cases)
        self.peers: dict[int, subprocess.Popen[bytes]] = {}
        rounds = [(each.name, each.bad, codec) for each, codec in cases]
        self.setup = Setup(num_senders=NUM_SENDERS, num_peers=NUM_PEERS, elements=ELEMENTS, rounds=rounds)
        write(folder / "setup.json", dataclasses.asdict(self.setup))

    def __enter__(self) -> Group:
        for index in range(NUM_PEERS):
            self.start(index, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers.values():
            peer.kill()
            peer.wait()

    def start(self, index: int, first_round: int) -> None:
        """A member's process, from that round on."""
        command = [sys.executable, "-m", "bench.faults_peer", str(self.folder), str(index), str(first_round)]
        root = Path(__file__).parents[1]
        with (self.folder / f"log-{index}").open("a") as log:
            self.peers[index] = subprocess.Popen(command, stdout=log, stderr=log, cwd=root)

    def wait_for(self, *names: str) -> list[Any]:
        """What these files hold, once all are there.

        Raises:
            Stuck: they do not come.
        """
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while not all((self.folder / name).exists() for name in names):
            for index, peer in self.peers.items():
                if peer.poll() not in (None, 0, -signal.SIGKILL):
                    raise Stuck(f"member {index} exited: {(self.folder / f'log-{index}').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise Stuck(f"no {', '.join(names)} after {STEP_TIMEOUT_S:g} s")
            time.sleep(0.02)
        return [json.loads((self.folder / name).read_text()) for name in names]

    def round(self, number: int) -> dict[int, dict[str, Any]]:
        """Run one round; outcomes of those without a fault, by member.

        Raises:
            Stuck: one of them does not finish.
        """
        case, _ = self.cases[number]
        told = self.wait_for(*(f"ready-{number}-{i}.json" for i in range(NUM_PEERS)))
        victim = self.peers[case.bad]
        if case.name == DEAD_BEFORE:
            victim.kill()
            victim.wait()
        write(self.folder / f"go-{number}.json", told)
        has_fault = case.certain or case.dies or case.name == "duplicate identity"
        honest = [i for i in range(NUM_PEERS) if i != case.bad or not has_fault]
        outcomes = dict(zip(honest, self.wait_for(*(f"outcome-{number}-{i}.json" for i in honest)), strict=True))
        if case.dies:
            victim.wait(60)
            if number + 1 < len(self.cases):
                self.start(case.bad, number + 1)
        else:
            victim.send_signal(signal.SIGCONT)
            self.wait_for(f"outcome-{number}-{case.bad}.json")
        return outcomes

    def daemons(self) -> list[int]:
        """Process ids of the libp2p daemons of those who ended in peace."""
        alive = [i for i in range(NUM_PEERS) if not (self.cases[-1][0].dies and i == self.cases[-1][0].bad)]
        return [int(end["daemon"]) for end in self.wait_for(*(f"end-{i}.json" for i in alive))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a round gave.

    Attributes:
        blamed: causes for which the one with the fault was blamed.
        wronged: others who were blamed, each with its cause.
        wrong: what is not as it must be, in words.
    """

    seconds: float
    blamed: list[str]
    wronged: list[str]
    right_values: bool
    same_bits: bool
    wrong: list[str]


def judge(case: Case, outcomes: dict[int, dict[str, Any]]) -> Verdict:
    """Whether those without a fault did what they must."""
    bad, errors = Key(case.bad + 1).hotkey, [str(one["error"]) for one in outcomes.values() if "error" in one]
    done = {i: one for i, one in outcomes.items() if "error" not in one}
    records = [(hotkey, f"{kind}: {detail}") for one in done.values() for hotkey, kind, detail in one["faults"]]
    blamed = {text.split(":")[0] for hotkey, text in records if hotkey == bad}
    wronged = [text for hotkey, text in records if hotkey not in (bad, "")]
    right = all(one["complete"] and not one["wrong_chunks"] for one in done.values())
    groups = [{0, 1}, {2, 3}] if case.name == TWO_GROUPS else [set(range(NUM_PEERS))]
    same = all(len({one["sha256"] for i, one in done.items() if i in group}) == 1 for group in groups)
    out = {hotkey for one in done.values() for hotkey in one["left_out"]}
    wrong = errors + [f"wronged: {text}" for text in wronged]
    if not right:
        wrong.append("values are not the mean")
    if not same:
        wrong.append("bits differ")
    if not out <= {bad} or (case.is_in == "all" and out) or (case.is_in == "none" and bad not in out):
        wrong.append(f"{len(out)} members are left out")
    if not blamed <= case.blame or (case.certain and not blamed):
        wrong.append(f"blamed for {sorted(blamed)}, expected some of {sorted(case.blame)}")
    seconds = max((float(one["seconds"]) for one in done.values()), default=float("inf"))
    if seconds > DEADLINE_S:
        wrong.append("past the deadline")
    return Verdict(
        seconds=seconds, blamed=sorted(blamed), wronged=wronged, right_values=right, same_bits=same, wrong=wrong
    )


@contextlib.contextmanager
def group_of(cases: Sequence[tuple[Case, str]]) -> Iterator[Group]:
    """A group that goes through these cases, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="hivetrain-faults-") as folder, Group(Path(folder), cases) as group:
        yield group


def run(quick: bool) -> list[Claim]:
    """Print the table; the claims."""
    cases = [(each, codec) for codec in ("fp32", "int4") for each in CASES]
    if quick:
        cases = [(each, codec) for each, codec in cases if each.name in QUICK and codec == "fp32"]
    verdicts: list[Verdict] = []
    with group_of(cases) as group:
        try:
            for number, (each, codec) in enumerate(cases):
                verdicts.append(judge(each, group.round(number)))
                print(f"{each.name}, {codec}: {verdicts[-1].seconds:.1f} s", file=sys.stderr, flush=True)
        except Stuck as exc:  # the rounds after it do not count as handled
            print(exc, file=sys.stderr, flush=True)
    rows = [
        (
            each.name + (", validator" if each.bad == VALIDATOR else ""),
            codec,
            ", ".join(verdict.blamed) or "nobody",
            f"{verdict.seconds:.1f} of {DEADLINE_S:g}",
            "yes" if verdict.right_values else "NO",
            "yes" if verdict.same_bits else "NO",
            "yes" if not verdict.wrong else "; ".join(verdict.wrong)[:120],
        )
        for (each, codec), verdict in zip(cases, verdicts, strict=False)
    ]
    columns = ("fault", "codec", "blamed for", "seconds", "mean", "same bits", "handled")
    table("Faults on loopback sockets, three senders and a validator", columns, rows)
    whole = f", {len(cases)} rounds of {2 * len(CASES)}" if quick else f", {len(cases)} rounds"
    return [
        at_least(f"faults handled on real sockets{whole}", sum(not v.wrong for v in verdicts) / len(cases), 1.0),
        at_most("faults on real sockets: honest members blamed", sum(len(v.wronged) for v in verdicts), 0),
        at_most("faults on real sockets: rounds past the deadline", sum(v.seconds > DEADLINE_S for v in verdicts), 0),
    ]


def main() -> int:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no process is left behind
    options = arguments(__doc__ or "")
    return report(run(options.quick), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
