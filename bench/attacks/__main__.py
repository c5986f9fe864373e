"""Every cheat of the catalogue: what it is paid, after how many rounds it is found out, and by what evidence.

    python -m bench.attacks [--quick] [--json FILE] [--keep DIR] [--only NAME ...] [--network]

In memory: 20 rounds of one cheat beside three honest miners and one validator, in production code (`rounds`), and 200
plays of the lottery of challenges over them (`pay`). `--network` runs three rounds of each in the real network instead.
What is done lies in `--keep DIR`, where a later call goes on. Other parts: `bench.attacks.loss`, `bench.attacks.cost`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.attacks.catalogue import CATALOGUE, make_cheat
from bench.attacks.cheat import Cheat, Kind
from bench.attacks.miner import IN_THE_NETWORK
from bench.attacks.network import run_all
from bench.attacks.outside import OUTSIDE
from bench.attacks.pay import Done, evidence, found_within, pay, with_share
from bench.attacks.rounds import HonestRound, cheat_round, honest_rounds
from bench.attacks.world import TINY, World, make_world
from bench.harness import Claim, at_least, at_most, report, table

NUM_ROUNDS, NUM_HONEST, NUM_PLAYS = 20, 3, 200
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
EPOCHS = (1, 4, 16)
QUICK = ("random", "skip-25", "on-demand")
WHOLE_GOAL, PART_GOAL, OTHERS_GOAL = 0.05, 1.0, 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is known of one cheat.

    Attributes:
        work: share of an honest miner's tokens that it trained on.
        pay, per_work: relative to an honest miner's.
        caught: share of the plays in which it is found out, within ``rounds`` on average.
        others: pay of the honest miner that it hurts most, over that of the one that it hurts least.
        by_share: share of miners checked -> [pay, pay per work, windows replayed].
        within: share of miners checked -> found out within 1, 4 and 16 epochs.
    """

    name: str
    what: str
    kind: str
    work: float
    pay: float
    per_work: float | None
    caught: float
    rounds: float | None
    others: float
    evidence: str
    by_share: dict[str, tuple[float, float | None, float]] = field(default_factory=dict)
    within: dict[str, tuple[float, ...]] = field(default_factory=dict)
    setting: str = ""


def measure(world: World, honest: Sequence[HonestRound], name: str, num_plays: int, setting: str) -> Row:
    """Let one cheat run beside the honest miners, and play."""
    cheat = make_cheat(name)
    if cheat.resting is not None:
        works, rests = Cheat(name, cheat.what), cheat.resting
        done = Done(
            cheat=cheat,
            rounds=[cheat_round(world, works, one) for one in honest],
            resting=[cheat_round(world, rests, one) for one in honest],
        )
    else:
        done = Done(cheat=cheat, rounds=[cheat_round(world, cheat, one) for one in honest])
    scoring = world.parts.recipe.scoring
    paid, _ = pay(scoring, honest, done, num_plays)
    by_share: dict[str, tuple[float, float | None, float]] = {}
    within: dict[str, tuple[float, ...]] = {}
    if cheat.kind in (Kind.WHOLE, Kind.PART):
        for share in SHARES:
            found, plays = pay(with_share(scoring, share), honest, done, num_plays // 2)
            by_share[f"{share:g}"] = (found.relative, found.per_work, found.replayed)
            within[f"{share:g}"] = found_within(plays, EPOCHS)
    return Row(
        name=name,
        what=cheat.what,
        kind=cheat.kind.value,
        work=paid.work,
        pay=paid.relative,
        per_work=paid.per_work,
        caught=paid.caught,
        rounds=paid.rounds,
        others=paid.worst,
        evidence=evidence(done)[:160],
        by_share=by_share,
        within=within,
        setting=setting,
    )


def rows_of(
    names: Sequence[str], world: World, honest: Sequence[HonestRound], plays: int, keep: Path | None
) -> list[Row]:
    """Measured now, or read from where an earlier call kept them."""
    setting = f"{world.parts.recipe.sha256()[:12]} {len(honest)} rounds {plays} plays"
    rows: list[Row] = []
    for name in names:
        path = keep / f"{name}.json" if keep is not None else None
        if path is not None and path.exists():
            row = Row(**json.loads(path.read_text()))
            if row.setting == setting:
                rows.append(row)
                continue
        row = measure(world, honest, name, plays, setting)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(row), indent=1) + "\n")
        rows.append(row)
        print(f"{row.name}: pay {row.pay:.3f} for {row.work:.2f} of the work", flush=True)
    return rows


def show(rows: Sequence[Row], world: World, stopped: Sequence[tuple[str, str, str]]) -> None:
    """The tables."""
    default = world.parts.recipe.scoring.check_share
    title = f"Pay over {NUM_ROUNDS} rounds, {default:g} of the miners checked, relative to an honest miner's"
    columns = ("cheat", "kind", "work", "pay", "per work", "found out", "round", "others", "evidence")
    table(title, columns, [_cells(row) for row in rows])
    graded = [row for row in rows if row.by_share]
    shares = list(graded[0].by_share) if graded else []
    replayed = [f"{graded[0].by_share[share][2]:.3f}" for share in shares] if graded else []
    table(
        "The same by the share of miners checked: pay of who skips all, pay per work of who skips a part",
        ("cheat", *shares),
        [
            ("windows replayed, of all", *replayed),
            *(
                (
                    row.name,
                    *(f"{(row.by_share[s][0] if row.kind == 'whole' else row.by_share[s][1]):.3f}" for s in shares),
                )
                for row in graded
            ),
        ],
    )
    skips = [row for row in graded if row.kind == "part"]
    windows = -(-world.parts.recipe.inner.max_steps // world.parts.recipe.inner.snapshot_every)
    table(
        "Chance to be found out within 1, 4, 16 epochs: measured (and 1 - (1 - share * windows / all windows)^epochs)",
        ("cheat", *shares),
        [(row.name, *(_chances(row, share, windows) for share in shares)) for row in skips],
    )
    table("Without any work", ("attack", "what it does", "what stops it"), list(stopped))


def _cells(row: Row) -> tuple[str, ...]:
    per_work = "-" if row.per_work is None else f"{row.per_work:.3f}"
    rounds = "-" if row.rounds is None else f"{row.rounds:.1f}"
    caught, others = f"{row.caught:.0%}", f"{row.others:.3f}"
    return row.name, row.kind, f"{row.work:.2f}", f"{row.pay:.3f}", per_work, caught, rounds, others, row.evidence


TOUCHED = {"skip-5": 0.05, "skip-10": 0.1, "skip-25": 0.25, "skip-50": 0.5}


def _chances(row: Row, share: str, windows: int) -> str:
    measured = " ".join(f"{chance:.2f}" for chance in row.within[share])
    if row.name not in TOUCHED:
        return measured
    touched = -(-TOUCHED[row.name] * windows // 1)
    reckoned = " ".join(f"{1 - (1 - float(share) * touched / windows) ** epochs:.2f}" for epochs in EPOCHS)
    return f"{measured} ({reckoned})"


def claims_of(
    rows: Sequence[Row], honest: Sequence[HonestRound], stopped: Sequence[tuple[str, str, str]]
) -> list[Claim]:
    """What has to hold."""
    checks = [check for one in honest for checks in one.checks for check in checks]
    claims = [at_most(f"false failures in {len(checks)} checks of honest miners", _failures(checks), 0)]
    whole = [row for row in rows if row.kind == "whole"]
    if whole:
        most = max(whole, key=lambda row: row.pay - row.work)
        name = f"pay of a cheat that skips all of the work, less what it worked, at most ({most.name})"
        claims.append(at_most(name, most.pay - most.work, WHOLE_GOAL))
    part = [row for row in rows if row.kind == "part" and row.per_work is not None]
    if part:
        most = max(part, key=lambda row: row.per_work or 0.0)
        name = f"pay per unit of work of a cheat that skips a part, at most ({most.name})"
        claims.append(at_most(name, most.per_work or 0.0, PART_GOAL))
    works = [row for row in rows if row.kind == "works"]
    if works:
        most = max(works, key=lambda row: row.pay)
        claims.append(at_most(f"pay of a cheat that does the work, at most ({most.name})", most.pay, PART_GOAL + 1e-9))
    if rows:
        hurt = min(rows, key=lambda row: row.others)
        name = f"pay of the honest miner that a cheat hurts most ({hurt.name}), over that of another"
        claims.append(at_least(name, hurt.others, OTHERS_GOAL))
    claims.append(at_most("attacks without any work that nothing stops", sum(not why for *_, why in stopped), 0))
    return claims


def _failures(checks: Sequence[object]) -> int:
    return sum(getattr(check, "fault", None) is not None for check in checks)


def main() -> int:
    """Entry point."""
    options = _options()
    logging.disable(logging.ERROR)  # a cheat's faults are what is measured
    torch.set_num_threads(1)
    known = (*CATALOGUE, *IN_THE_NETWORK) if options.network else tuple(CATALOGUE)
    names = options.only or (QUICK if options.quick else known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no attack {unknown[0]!r}; there are: {', '.join(known)}")
    if options.network:
        return run_all(names, options.keep, options.json)
    with tempfile.TemporaryDirectory(prefix="hivetrain-attacks-") as folder:
        world = make_world(Path(folder), TINY)
        honest = honest_rounds(world, NUM_HONEST, NUM_ROUNDS)
        rows = rows_of(names, world, honest, NUM_PLAYS, options.keep)
        stopped = [(one.name, one.what, one.do(world, honest)) for one in OUTSIDE]
    show(rows, world, stopped)
    return report(claims_of(rows, honest, stopped), options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"three cheats: {', '.join(QUICK)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims here")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what is done here, and go on from it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cheats alone")
    parser.add_argument("--network", action="store_true", help="three rounds of each in the real network")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
