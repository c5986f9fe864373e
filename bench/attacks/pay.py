"""The lottery of challenges over known facts, and the pay that comes of it.

One play draws a run's block hashes and coins, and then goes through its rounds with the production draw, weights in
the mean, scores and moving average. *Pay* is the share of the weights, summed over the rounds. One validator: with
more of them everyone is drawn more often.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.attacks.cheat import Cheat
from bench.attacks.checking import Checks
from bench.attacks.rounds import CheatRound, HonestRound
from bench.attacks.world import VALIDATOR
from hivetrain.run import Scoring
from hivetrain.scoring import CheckResult, MovingAverage, Score, Unscored, score_facts
from hivetrain.scoring import score as score_module
from hivetrain.verification.receipt import Receipt
from template.validator.collect import Collected
from template.validator.reward import Seen, gather_facts, round_weights
from template.validator.verify import draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """What one play paid.

    Attributes:
        cheat, honest: pay of the cheat, and of an honest miner on average.
        caught: the first round, from 1, in which a check or the all-reduce found it out; None: never.
        replayed: windows that were replayed, over all that the miners had.
        work: of an honest miner's.
        worst: pay of the honest miner that got least, over that of the one that got most.
    """

    cheat: float
    honest: float
    worst: float
    caught: int | None
    replayed: float
    work: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a cheat did in every round, and would have done had it rested (`Cheat.resting`)."""

    cheat: Cheat
    rounds: Sequence[CheatRound]
    resting: Sequence[CheatRound] = ()

    @property
    def hotkey(self) -> str:
        """The cheat's."""
        return self.rounds[0].key.hotkey


def play(seed: int, scoring: Scoring, honest: Sequence[HonestRound], done: Done) -> Play:
    """Draw and pay one run."""
    average, key = MovingAverage(None, scoring), done.hotkey
    hotkeys = [*(one.hotkey for one in honest[0].keys), key]
    paid = dict.fromkeys(hotkeys, 0.0)
    caught: int | None = None
    replayed = windows = 0
    work: list[float] = []
    rests = False
    for number, ours in enumerate(honest):
        its = (done.resting if rests else done.rounds)[number]
        work.append(its.work_done)
        receipts = {one.receipt.hotkey: one.receipt for one in ours.contributions}
        found: dict[str, Checks] = dict(zip(receipts, ours.checks, strict=True))
        refused: dict[str, str] = {}
        if its.receipt is not None:
            receipts[key], found[key] = its.receipt, its.checks
        else:
            refused[key] = its.refused
        checks, num_windows = _draw(seed, number, scoring, receipts, found, average)
        replayed += num_windows
        windows += sum(receipt.num_snapshots for receipt in receipts.values())
        is_in = its.seen is not None and round_weights(receipts, checks, average, number).get(key, 0.0) > 0
        seen: Seen = (its.seen if is_in and its.seen is not None else ours.seen,)
        proven = its.proven if is_in else {}
        scores = _score(hotkeys, receipts, refused, checks, seen, average, number, scoring, done.cheat, proven)
        average.update(number, scores, set(hotkeys))
        for hotkey, share in average.weights().items():
            paid[hotkey] += share
        if caught is None and (_failed(checks.get(key)) or key in refused or _blamed(seen, key)):
            caught = number + 1
        if done.resting and key in checks:
            rests = not rests
    return Play(
        cheat=paid.pop(key),
        honest=statistics.fmean(paid.values()),
        worst=min(paid.values()) / max(paid.values()),
        caught=caught,
        replayed=replayed / windows,
        work=statistics.fmean(work),
    )


def _draw(
    seed: int,
    number: int,
    scoring: Scoring,
    receipts: Mapping[str, Receipt],
    found: Mapping[str, Checks],
    average: MovingAverage,
) -> tuple[dict[str, CheckResult | None], int]:
    """What the checks that are drawn in a round find, and how many windows they replay."""
    coins = hashlib.sha256(f"coins {seed} {number}".encode()).digest()
    block_hash = hashlib.sha256(f"block {seed} {number}".encode()).hexdigest()
    checks: dict[str, CheckResult | None] = {}
    num_windows = 0
    for hotkey, receipt in receipts.items():
        drawn = draw(
            block_hash=block_hash,
            validator=VALIDATOR.hotkey,
            miner=hotkey,
            coins=coins,
            num_snapshots=receipt.num_snapshots,
            scoring=scoring,
            owes=average.owes(hotkey),
        )
        num_windows += len(drawn.windows)
        if drawn.windows:
            checks[hotkey] = worst([found[hotkey][window] for window in drawn.windows])
    return checks, num_windows


def worst(results: Sequence[CheckResult]) -> CheckResult:
    """What a check of several windows finds: the first fault, or the largest distance."""
    faulty = next((one for one in results if one.fault is not None), None)
    return faulty or max(results, key=lambda one: one.distance or 0.0)


def _score(
    hotkeys: Sequence[str],
    receipts: Mapping[str, Receipt],
    refused: Mapping[str, str],
    checks: Mapping[str, CheckResult | None],
    seen: Seen,
    average: MovingAverage,
    number: int,
    scoring: Scoring,
    cheat: Cheat,
    proven: Mapping[str, CheckResult],
) -> dict[str, Score | Unscored]:
    limit = score_module.SMALL_BYTES
    if cheat.small_rates:
        score_module.SMALL_BYTES = 0
    try:
        facts = gather_facts(
            miners=hotkeys,
            collected=Collected(receipts=dict(receipts), refused=dict(refused)),
            checks=checks,
            seen=seen,
            average=average,
            round_number=number,
            proven=proven,
        )
        return score_facts(facts, scoring)
    finally:
        score_module.SMALL_BYTES = limit


def _failed(check: CheckResult | None) -> bool:
    return check is not None and check.fault is not None


def _blamed(seen: Seen, hotkey: str) -> bool:
    return any(fault.hotkey == hotkey for _, outcome in seen for fault in outcome.faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """The mean of many plays.

    Attributes:
        relative: the cheat's pay over an honest miner's.
        work: share of the honest work that it did.
        per_work: ``relative / work``; None where it did none.
        caught: share of the plays in which it was found out.
        rounds: until then, the mean over those; None where it never was.
        replayed: share of all windows that were replayed.
        worst: pay of the honest miner that got least, over that of the one that got most.
    """

    worst: float
    relative: float
    work: float
    per_work: float | None
    caught: float
    rounds: float | None
    replayed: float


def pay(scoring: Scoring, honest: Sequence[HonestRound], done: Done, num_plays: int) -> tuple[Paid, list[Play]]:
    """Play ``num_plays`` runs."""
    plays = [play(seed, scoring, honest, done) for seed in range(num_plays)]
    relative = statistics.fmean(one.cheat for one in plays) / statistics.fmean(one.honest for one in plays)
    work = statistics.fmean(one.work for one in plays)
    found = [one.caught for one in plays if one.caught is not None]
    mean = Paid(
        worst=statistics.fmean(one.worst for one in plays),
        relative=relative,
        work=work,
        per_work=relative / work if work > 0 else None,
        caught=len(found) / len(plays),
        rounds=statistics.fmean(found) if found else None,
        replayed=statistics.fmean(one.replayed for one in plays),
    )
    return mean, plays


def with_share(scoring: Scoring, check_share: float) -> Scoring:
    """The recipe's scoring with another share of miners checked."""
    return dataclasses.replace(scoring, check_share=check_share)


def evidence(done: Done) -> str:
    """The first thing that anybody could hold against it, in words."""
    for one in (*done.rounds, *done.resting):
        if one.refused:
            return one.refused
        for check in one.checks:
            if check.fault is not None:
                return f"{check.fault.value}: {check.detail}"
        if one.seen is not None:
            for fault in one.seen[1].faults:
                if fault.hotkey == one.key.hotkey:
                    return f"{fault.fault.value}: {fault.detail}"
    return "none"


def found_within(plays: Sequence[Play], epochs: Sequence[int]) -> tuple[float, ...]:
    """Share of the plays in which it is found out within so many epochs."""
    return tuple(sum(one.caught is not None and one.caught <= limit for one in plays) / len(plays) for limit in epochs)
