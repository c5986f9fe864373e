"""Every cheat in the real network: processes, sockets, the embedded chain; three rounds beside two honest miners.

Every miner is checked in every round here: three rounds are too few to wait for a draw. What it is paid where fewer are
checked is the simulation's to say.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.attacks.cheat import Kind
from bench.attacks.miner import make_cheat
from bench.harness import Claim, at_least, at_most, report, table

NUM_EPOCHS = 3
TIMEOUT_S = 600.0
RECIPE = """\
name = "attacks"
[inner]
max_steps = 20
snapshot_every = 5
[scoring]
check_share = 1.0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRow:
    """What one cheat got in the real network.

    Attributes:
        ok: every epoch was published, and the honest miners were in it, agreed, and were paid.
        pay: its weights summed over the rounds, over an honest miner's; None where nobody was paid.
        work: tokens that it really trained on, over an honest miner's; None where it did not say.
        caught: rounds until the validator's first reason against it; None where there was none.
        evidence: that reason, or the one for its newest score.
    """

    name: str
    kind: str
    ok: bool
    failed: str
    pay: float | None
    evidence: str
    work: float | None = None
    caught: int | None = None

    @property
    def per_work(self) -> float | None:
        """Pay per unit of work; None where it did none, or was not paid."""
        return self.pay / self.work if self.pay is not None and self.work else None


def run_one(name: str, folder: Path) -> NetworkRow:
    """`hivetrain up --attack NAME` for three epochs, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, outcome, network = folder / "run.toml", folder / "outcome.json", folder / "network"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "neurons.cli", "up", "--dir", str(network), "--fresh", "--attack", name]
    command += ["--miners", "3", "--epochs", str(NUM_EPOCHS), "--recipe", str(recipe), "--json", str(outcome)]
    command += ["--no-dashboard", "--tracker", "none", "--block-time", "0.5", "--timeout", str(TIMEOUT_S)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=TIMEOUT_S + 60)
    if not outcome.exists():
        return NetworkRow(
            name=name,
            kind=make_cheat(name).kind.value,
            ok=False,
            failed=(done.stderr or done.stdout).strip()[-300:],
            pay=None,
            work=None,
            caught=None,
            evidence="",
        )
    told = json.loads(outcome.read_text())
    attack = told.get("attack") or {}
    caught, evidence = _evidence(network, str(attack.get("hotkey", "")))
    return NetworkRow(
        name=name,
        kind=make_cheat(name).kind.value,
        ok=bool(told["ok"]),
        failed="; ".join(told["failed"])[:300],
        pay=attack.get("pay"),
        work=_work(network / "logs" / f"{attack.get('member', '')}.log"),
        caught=caught,
        evidence=evidence,
    )


def _work(log: Path) -> float | None:
    """What a cheating miner says that it worked, over what it should have."""
    said = re.findall(r"worked (\d+) of (\d+) tokens", log.read_text(errors="replace")) if log.exists() else []
    return sum(int(done) for done, _ in said) / sum(int(whole) for _, whole in said) if said else None


def _evidence(network: Path, hotkey: str) -> tuple[int | None, str]:
    """The first reason of the validator's that is against it: of its log's checks, or of its newest score.

    Returns:
        How many rounds it took to find it, and the reason.
    """
    log = network / "logs" / "validator-1.log"
    marks = (f"check of {hotkey[:8]}: ", f"receipt of {hotkey[:8]} is refused: ")
    number, found = 0, ""
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        for mark in marks:
            if not found and mark in line and not any(fine in line for fine in ("passed", "not done here")):
                found = line.split(mark, 1)[1][:160]
                if mark is marks[0]:
                    return number, found
        if counted := re.search(r" round (\d+): \d+ receipts, \d+ refused", line):
            number = int(counted.group(1)) + 1
            if found:  # receipts are refused before they are counted
                return number, found
    path = network / "validator-1" / "scores.json"
    if not path.exists():
        return None, ""
    score = json.loads(path.read_text())["scores"].get(hotkey, {})
    reasons = score.get("reasons", {})
    worst = min(reasons, key=lambda part: float(score.get(part, 1.0)), default="")
    return None, str(reasons.get(worst, score.get("unscored", "")))[:160]


def run_all(names: Sequence[str], keep: Path | None, json_path: Path | None) -> int:
    """Run each of ``names``, or read what an earlier call kept; the exit status."""
    rows: list[NetworkRow] = []
    with tempfile.TemporaryDirectory(prefix="hivetrain-network-") as scratch:
        for name in names:
            path = (keep or Path(scratch)) / f"network-{name}.json"
            if path.exists():
                rows.append(NetworkRow(**json.loads(path.read_text())))
                continue
            row = run_one(name, Path(scratch) / name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(row), indent=1) + "\n")
            shutil.rmtree(Path(scratch) / name, ignore_errors=True)
            rows.append(row)
            print(f"{name}: pay {row.pay}, {'the run holds' if row.ok else row.failed}", flush=True)
    table(
        f"{NUM_EPOCHS} epochs in the real network, every miner checked",
        ("cheat", "kind", "work done", "pay", "per unit of work", "caught in round", "the others", "evidence"),
        [
            (
                row.name,
                row.kind,
                *("-" if figure is None else f"{figure:.2f}" for figure in (row.work, row.pay, row.per_work)),
                "-" if row.caught is None else str(row.caught),
                "paid, agreed" if row.ok else row.failed,
                row.evidence,
            )
            for row in rows
        ],
    )
    return report(_claims(rows), json_path)


def _claims(rows: Sequence[NetworkRow]) -> list[Claim]:
    claims = [at_least("runs whose honest miners were paid, of all", _share(row.ok for row in rows), 1.0)]
    claims.append(
        at_least("cheats that told what they worked, of all", _share(row.work is not None for row in rows), 1.0)
    )
    by_kind = {kind: [row for row in rows if row.kind == kind.value and row.pay is not None] for kind in Kind}
    for what, values, goal in (
        (
            "pay of a cheat that skips all of the work, less what it worked",
            {row.name: (row.pay or 0.0) - (row.work or 0.0) for row in by_kind[Kind.WHOLE]},
            0.05,
        ),
        ("pay of a cheat that skips a part", {row.name: row.pay or 0.0 for row in by_kind[Kind.PART]}, 1.0 + 1e-3),
        ("pay of a cheat that does the work", {row.name: row.pay or 0.0 for row in by_kind[Kind.WORKS]}, 1.0 + 1e-3),
    ):
        if values:
            most = max(values, key=values.__getitem__)
            claims.append(at_most(f"{what}, at most ({most})", values[most], goal))
    if by_kind[Kind.PART]:  # of one of them three draws of a window tell little
        per_work = statistics.mean((row.pay or 0.0) / max(row.work or 0.0, 1e-3) for row in by_kind[Kind.PART])
        claims.append(at_most("pay per unit of work of cheats that skip a part, mean", per_work, 1.0))
    return claims


def _share(those: Iterable[bool]) -> float:
    return statistics.mean(float(one) for one in those)
