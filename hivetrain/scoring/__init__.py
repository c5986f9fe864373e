"""From what a validator saw of a miner in one round to a share of the pay."""

from hivetrain.scoring.average import AverageState, MovingAverage
from hivetrain.scoring.score import (
    Bandwidth,
    CheckResult,
    RoundFacts,
    Score,
    Unscored,
    score_facts,
    score_round,
)

__all__ = [
    "AverageState",
    "Bandwidth",
    "CheckResult",
    "MovingAverage",
    "RoundFacts",
    "Score",
    "Unscored",
    "score_facts",
    "score_round",
]
