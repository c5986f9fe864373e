"""From what this validator saw of a round to every miner's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hivetrain.averaging.butterfly import AllReduceOutcome
from hivetrain.averaging.group import GroupPlan
from hivetrain.run import Scoring
from hivetrain.scoring import Bandwidth, CheckResult, MovingAverage, RoundFacts, Score, Unscored, score_round
from hivetrain.verification.receipt import Receipt
from template.validator.collect import Collected

FULLY_INCLUDED = 0.999


def round_weights(
    receipts: Mapping[str, Receipt],
    checks: Mapping[str, CheckResult | None],
    average: MovingAverage,
    round_number: int,
) -> dict[str, float]:
    """What each sender's vector counts in the mean: receipted samples, 0 after a failed check or in cooldown."""
    weights: dict[str, float] = {}
    for hotkey, receipt in receipts.items():
        result = checks.get(hotkey)
        failed = result is not None and result.fault is not None
        barred = average.cooldown_left(hotkey, round_number) > 0
        weights[hotkey] = 0.0 if failed or barred else float(receipt.num_samples)
    return weights


def measured(plan: GroupPlan, outcome: AllReduceOutcome, hotkey: str) -> Bandwidth:
    """What we saw of ``hotkey``'s sending to our own part."""
    link = next((link for link in outcome.links if link.hotkey == hotkey), None)
    in_time = outcome.included.get(hotkey, 0.0) >= FULLY_INCLUDED
    if link is None:
        return Bandwidth(size_bytes=0, seconds=0.0, in_time=in_time)
    return Bandwidth(size_bytes=link.bytes_received, seconds=link.seconds, in_time=in_time)


def score_miners(
    *,
    miners: Sequence[str],
    collected: Collected,
    checks: Mapping[str, CheckResult | None],
    plan: GroupPlan | None,
    outcome: AllReduceOutcome | None,
    average: MovingAverage,
    round_number: int,
    scoring: Scoring,
) -> dict[str, Score | Unscored]:
    """Score every miner of the round; `Unscored` where our own side failed."""
    facts: dict[str, RoundFacts] = {}
    scores: dict[str, Score | Unscored] = {}
    for hotkey in miners:
        if hotkey in collected.ours:
            scores[hotkey] = Unscored(why=collected.ours[hotkey])
            continue
        if hotkey in checks and checks[hotkey] is None:
            scores[hotkey] = Unscored(why="the check that was drawn could not be done here")
            continue
        receipt = collected.receipts.get(hotkey)
        result = checks.get(hotkey)
        bandwidth = None
        if receipt is not None and plan is not None and outcome is not None:
            # Without a receipt here nothing of it could be checked here: its sending earns nothing.
            bandwidth = measured(plan, outcome, hotkey)
        if bandwidth is None and result is not None and result.fault is not None:
            bandwidth = Bandwidth(size_bytes=0, seconds=0.0, in_time=False)  # shut out: the failed check decides
        facts[hotkey] = RoundFacts(
            tokens=receipt.num_tokens if receipt is not None else 0,
            receipt_fault=collected.refused.get(hotkey, ""),
            checks=(result,) if result is not None else (),
            bandwidth=bandwidth,
            cooldown_left=average.cooldown_left(hotkey, round_number),
        )
    return scores | score_round(facts, scoring)
