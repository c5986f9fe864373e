"""From what this validator saw of a round to every miner's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from hivetrain.averaging.butterfly import AllReduceOutcome
from hivetrain.averaging.group import GroupPlan
from hivetrain.errors import Fault
from hivetrain.run import Scoring
from hivetrain.scoring import Bandwidth, CheckResult, MovingAverage, RoundFacts, Score, Unscored, score_facts
from hivetrain.verification.receipt import Receipt
from template.validator.collect import Collected

MOSTLY_INCLUDED = 0.5
"""A sender that more than this share of the mean holds was in time: one reducer's word alone leaves nobody unpaid."""

SILENT = frozenset({Fault.ABSENT, Fault.LATE})
"""What a bad link looks like too: no fault of a sender that the mean holds all the same."""

MAX_WORDS = 500
"""Longest reason that is scored and published."""

Seen = Sequence[tuple[GroupPlan, AllReduceOutcome]]
"""The attempts at a round's all-reduce that this validator sat in to their end, in their order."""


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


def measured(seen: Seen, hotkey: str) -> Bandwidth | None:
    """What we saw of ``hotkey``'s sending to our own part, or of its faults; None where our own side saw nothing."""
    # The attempt that gave a whole mean counts; where none did, the last one.
    _, (plan, outcome) = max(enumerate(seen), key=lambda one: (one[1][1].complete, one[0]))
    in_time = outcome.included.get(hotkey, 0.0) > MOSTLY_INCLUDED
    for tried, one in seen:
        for fault in one.faults:
            # A sender's silence towards us; a reducer's is recorded only where nobody holds its mean.
            to_us = fault.part not in {part.index for part in tried.parts() if part.reducer.hotkey == hotkey}
            excused = fault.fault in SILENT and ((in_time and to_us) or _all_went_silent(tried, one))
            if fault.hotkey == hotkey and not excused:
                words = f"{fault.fault.value}: {fault.detail}"[:MAX_WORDS]
                return Bandwidth(size_bytes=0, seconds=0.0, in_time=False, fault=words)
    if not any(outcome.included.values()) or (not in_time and _all_went_silent(plan, outcome)):
        return None
    link = next((link for link in outcome.links if link.hotkey == hotkey), None)
    size_bytes, seconds = (link.bytes_received, link.seconds) if link is not None else (0, 0.0)
    if in_time and size_bytes == 0:
        return None  # it sent to the others: we reduced nothing, or had stopped
    return Bandwidth(size_bytes=size_bytes, seconds=seconds, in_time=in_time)


def _all_went_silent(plan: GroupPlan, outcome: AllReduceOutcome) -> bool:
    """Whether every one of several senders went silent here: then our own line is the likelier cause."""
    senders = {member.hotkey for member in plan.members if member.sends}
    return len(senders) > 1 and senders <= {fault.hotkey for fault in outcome.faults if fault.fault in SILENT}


def gather_facts(
    *,
    miners: Sequence[str],
    collected: Collected,
    checks: Mapping[str, CheckResult | None],
    seen: Seen,
    average: MovingAverage,
    round_number: int,
    proven: Mapping[str, CheckResult] = MappingProxyType({}),
    measures: Mapping[str, Mapping[str, Bandwidth]] = MappingProxyType({}),
) -> dict[str, RoundFacts | Unscored]:
    """What this validator knows of every miner of the round; `Unscored` where our own side failed.

    Args:
        proven: lies that were proved beside this round's checks, such as two receipts for an earlier round.
        measures: what validators published of each miner's sending in the round before, by miner, by validator.
    """
    facts: dict[str, RoundFacts | Unscored] = {}
    for hotkey in miners:
        if hotkey not in proven and hotkey in collected.ours:
            facts[hotkey] = Unscored(why=collected.ours[hotkey][:MAX_WORDS])
            continue
        if hotkey not in proven and hotkey in checks and checks[hotkey] is None:
            facts[hotkey] = Unscored(why="the check that was drawn could not be done here")
            continue
        receipt = collected.receipts.get(hotkey)
        results = [one for one in (checks.get(hotkey), proven.get(hotkey)) if one is not None]
        bandwidth = None
        if receipt is not None and seen:
            # Without a receipt here nothing of it could be checked here: its sending earns nothing.
            bandwidth = measured(seen, hotkey)
        if bandwidth is None and any(one.fault is not None for one in results):
            bandwidth = Bandwidth(size_bytes=0, seconds=0.0, in_time=False)  # shut out: the failed check decides
        facts[hotkey] = RoundFacts(
            tokens=receipt.num_tokens if receipt is not None else 0,
            receipt_fault=collected.refused.get(hotkey, "")[:MAX_WORDS],
            checks=tuple(replace(one, detail=one.detail[:MAX_WORDS]) for one in results),
            bandwidth=bandwidth,
            measures=measures.get(hotkey, {}),
            cooldown_left=average.cooldown_left(hotkey, round_number),
        )
    return facts


def score_miners(
    *,
    miners: Sequence[str],
    collected: Collected,
    checks: Mapping[str, CheckResult | None],
    seen: Seen,
    average: MovingAverage,
    round_number: int,
    scoring: Scoring,
) -> dict[str, Score | Unscored]:
    """Score every miner of the round; `Unscored` where our own side failed."""
    facts = gather_facts(
        miners=miners, collected=collected, checks=checks, seen=seen, average=average, round_number=round_number
    )
    return score_facts(facts, scoring)
