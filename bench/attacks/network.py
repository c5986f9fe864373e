"""Every cheat in the real network: processes, sockets, the embedded chain; three rounds beside two honest miners.

Every miner is checked in every round here: three rounds are too few to wait for a draw. What it is paid where fewer are
checked is the simulation's to say.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
        evidence: the validator's reason for its newest score.
    """

    name: str
    kind: str
    ok: bool
    failed: str
    pay: float | None
    evidence: str


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
            evidence="",
        )
    told = json.loads(outcome.read_text())
    attack = told.get("attack") or {}
    return NetworkRow(
        name=name,
        kind=make_cheat(name).kind.value,
        ok=bool(told["ok"]),
        failed="; ".join(told["failed"])[:300],
        pay=attack.get("pay"),
        evidence=_evidence(network, str(attack.get("hotkey", ""))),
    )


def _evidence(network: Path, hotkey: str) -> str:
    """The first reason of the validator's that is against it: of its log's checks, or of its newest score."""
    log = network / "logs" / "validator-1.log"
    marks = (f"check of {hotkey[:8]}: ", f"receipt of {hotkey[:8]} is refused: ")
    if log.exists():
        for line in log.read_text(errors="replace").splitlines():
            for mark in marks:
                if mark in line and not any(fine in line for fine in ("passed", "not done here")):
                    return line.split(mark, 1)[1][:160]
    path = network / "validator-1" / "scores.json"
    if not path.exists():
        return ""
    score = json.loads(path.read_text())["scores"].get(hotkey, {})
    reasons = score.get("reasons", {})
    worst = min(reasons, key=lambda part: float(score.get(part, 1.0)), default="")
    return str(reasons.get(worst, score.get("unscored", "")))[:160]


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
        ("cheat", "kind", "pay", "the others", "evidence"),
        [
            (
                row.name,
                row.kind,
                "-" if row.pay is None else f"{row.pay:.3f}",
                "paid, agreed" if row.ok else row.failed,
                row.evidence,
            )
            for row in rows
        ],
    )
    return report(_claims(rows), json_path)


def _claims(rows: Sequence[NetworkRow]) -> list[Claim]:
    claims = [at_least("runs whose honest miners were paid, of all", sum(row.ok for row in rows) / len(rows), 1.0)]
    for kind, goal in ((Kind.WHOLE, 0.05), (Kind.PART, 1.0), (Kind.WORKS, 1.0 + 1e-3)):
        paid = {row.name: row.pay for row in rows if row.kind == kind.value and row.pay is not None}
        if paid:
            most = max(paid, key=paid.__getitem__)
            claims.append(at_most(f"pay of a cheat of the kind {kind.value}, at most ({most})", paid[most], goal))
    return claims
