"""One round's score of each miner: gradient × (w_steps · steps + w_bandwidth · bandwidth), each in [0, 1].

Pure: what a validator saw goes in, scores with their reasons in words come out. `Unscored` is for our own
failures, which never cost a miner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from hivetrain.errors import Fault
from hivetrain.run import Scoring

SMALL_BYTES = 1_000_000
"""Below this many bytes a rate measures latency, not bandwidth: arriving in time is enough."""

PROVEN = frozenset({Fault.DOUBLE_COMMIT, Fault.WRONG_AVERAGE})
"""Faults of a check that signed bytes prove to anybody: a validator that names one publishes the evidence."""

LIES = PROVEN | {Fault.WRONG_REPLAY, Fault.NOT_COMMITTED, Fault.NOT_FINITE}
"""Faults of a check that prove a lie: they start a cooldown. Silence (REFUSED) costs the round, and proves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One check of one miner.

    Attributes:
        distance: relative L2 distance of the replay, None where the check never got so far.
        fault: what the miner did wrong, None for a check that it passed.
        detail: in words.
        windows: those that were replayed, and ``distances`` the distance of each.
        first_wrong_step: the first inner step whose committed record the replay contradicts, where one is known.
        evidence: what others can look at: the step records that it opened, a second receipt; bytes by kind.
    """

    distance: float | None = None
    fault: Fault | None = None
    detail: str = ""
    windows: tuple[int, ...] = ()
    distances: tuple[float, ...] = ()
    first_wrong_step: int | None = None
    evidence: Mapping[str, bytes] = field(default_factory=dict)

    def in_words(self) -> str:
        """One line for a log."""
        if self.fault is not None:
            return f"{self.fault.value}: {self.detail}"
        return f"passed, {self.detail}, replay distance {self.distance or 0.0:.2e}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """What a sitting validator measured of a member's sending.

    Attributes:
        size_bytes: bytes received from the member.
        seconds: from the first byte to the last.
        in_time: whether it came before the deadline.
        fault: what the validator saw the member do wrong in the all-reduce, in words; "" for nothing.
    """

    size_bytes: int
    seconds: float
    in_time: bool
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFacts:
    """What one validator knows of one miner after one round.

    Attributes:
        tokens: receipted tokens; 0 without a valid receipt.
        receipt_fault: why there is no valid receipt, in words; "" when there is one.
        checks: results of the checks that were drawn.
        bandwidth: None where nothing was measured by us (no all-reduce took place here).
        measures: what validators published of its sending in the round before, by validator, ourselves among them:
            where there are two or more, their median decides how fast it was.
        cooldown_left: rounds that the miner still goes without pay.
    """

    tokens: int = 0
    receipt_fault: str = ""
    checks: Sequence[CheckResult] = ()
    bandwidth: Bandwidth | None = None
    measures: Mapping[str, Bandwidth] = field(default_factory=dict)
    cooldown_left: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One miner's score of one round, each part in [0, 1] with its reason in words.

    Attributes:
        lied: a lie is proven: no pay for the cooldown.
        refused, passed: it would not show what it committed to, or did and nothing was wrong.
    """

    gradient: float
    steps: float
    bandwidth: float
    score: float
    lied: bool = False
    refused: bool = False
    passed: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscored:
    """Our side failed: this round changes nothing for this miner."""

    why: str


def gradient_score(distance: float, scoring: Scoring) -> float:
    """1 up to ``distance_full``, falling linearly to 0 at ``distance_zero``; 0 for NaN."""
    if not distance < scoring.distance_zero:
        return 0.0
    span = scoring.distance_zero - scoring.distance_full
    return min(1.0, (scoring.distance_zero - distance) / span)


def score_round(facts: Mapping[str, RoundFacts], scoring: Scoring) -> dict[str, Score | Unscored]:
    """Score every miner of one round.

    Args:
        facts: by hotkey, for every miner that was registered at the round's first block.
        scoring: the recipe's weights and bounds.
    """
    best = max((fact.tokens for fact in facts.values() if _paid_tokens(fact) > 0), default=0)
    return {hotkey: _score(fact, best, scoring) for hotkey, fact in facts.items()}


def score_facts(facts: Mapping[str, RoundFacts | Unscored], scoring: Scoring) -> dict[str, Score | Unscored]:
    """Score every miner of one round, where some of our own facts are missing."""
    known = {hotkey: fact for hotkey, fact in facts.items() if isinstance(fact, RoundFacts)}
    missing: dict[str, Score | Unscored] = {hotkey: one for hotkey, one in facts.items() if isinstance(one, Unscored)}
    return missing | score_round(known, scoring)


def _paid_tokens(fact: RoundFacts) -> int:
    return 0 if any(check.fault is not None for check in fact.checks) else fact.tokens


def _score(fact: RoundFacts, best_tokens: int, scoring: Scoring) -> Score | Unscored:
    gradient, gradient_why, lied = _gradient(fact, scoring)
    if fact.tokens == 0:
        steps, steps_why = 0.0, fact.receipt_fault or "no receipt"
    else:
        tokens = _paid_tokens(fact)
        steps = min(1.0, tokens / best_tokens) if best_tokens else 0.0
        steps_why = f"{tokens} of the group's best {best_tokens} tokens"
    if fact.bandwidth is None and fact.tokens > 0:
        return Unscored(why="no all-reduce was measured here this round")
    bandwidth, bandwidth_why = _bandwidth(fact.bandwidth, fact.measures, scoring)
    total = gradient * (scoring.steps_weight * steps + scoring.bandwidth_weight * bandwidth)
    faults = {check.fault for check in fact.checks}
    return Score(
        gradient=gradient,
        steps=steps,
        bandwidth=bandwidth,
        score=min(1.0, total),
        lied=lied,
        refused=Fault.REFUSED in faults,
        passed=faults == {None} and not lied,
        reasons={"gradient": gradient_why, "steps": steps_why, "bandwidth": bandwidth_why},
    )


def _gradient(fact: RoundFacts, scoring: Scoring) -> tuple[float, str, bool]:
    faults = [(check.fault, check.detail) for check in fact.checks if check.fault is not None]
    for fault, detail in sorted(faults, key=lambda one: one[0] not in LIES)[:1]:
        return 0.0, f"{fault.value}: {detail}", fault in LIES
    if fact.cooldown_left > 0:
        return 0.0, f"in cooldown for {fact.cooldown_left} more rounds", False
    distances = [check.distance for check in fact.checks if check.distance is not None]
    if not distances:
        return 1.0, "not drawn this round", False
    worst = max(distances)
    value = gradient_score(worst, scoring)
    why = f"replay distance {worst:.2e}, full pay up to {scoring.distance_full}"
    return value, why, value == 0.0


def _bandwidth(measured: Bandwidth | None, measures: Mapping[str, Bandwidth], scoring: Scoring) -> tuple[float, str]:
    value, why = _by_one(measured, scoring)
    took_part = measured is not None and measured.size_bytes > 0 and measured.in_time and not measured.fault
    if not took_part or len(measures) < 2:
        return value, why
    # Who may lie in its measure cannot move the median past honest ones while those are more than half.
    values = [_by_one(one, scoring)[0] for one in measures.values()]
    shown = ", ".join(f"{one:.3f}" for one in sorted(values))
    return median(values), f"median of what {len(values)} validators published of the round before: {shown}"


def _by_one(measured: Bandwidth | None, scoring: Scoring) -> tuple[float, str]:
    """What one validator's measure is worth."""
    if measured is not None and measured.fault:
        return 0.0, f"at fault in the all-reduce: {measured.fault}"
    if measured is None or measured.size_bytes == 0:
        return 0.0, "sent nothing in the all-reduce"
    if not measured.in_time:
        return 0.0, "late in the all-reduce"
    if measured.size_bytes < SMALL_BYTES:
        return 1.0, f"{measured.size_bytes} bytes in time (too few for a rate)"
    mbps = 8e-6 * measured.size_bytes / max(measured.seconds, 1e-6)
    value = min(1.0, mbps / scoring.target_mbps)
    if measured.seconds < 1e-3:
        return value, f"{measured.size_bytes} bytes in time, for which nobody waited"
    return value, f"{mbps:.1f} Mbit/s of the target {scoring.target_mbps:g}"
