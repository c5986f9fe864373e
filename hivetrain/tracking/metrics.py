"""The metric names of a run: one spelling for the neurons, the logs, the dashboard and the docs.

The part before the first ``/`` is the dashboard's section. A metric about one member of the group ends in
that member's label, so that a validator's run shows one curve per miner:
``scores/gradient/uid-3``, ``weights/uid-3`` (see `per_member`).

The x axis of a run is the ``step`` argument of `Tracker.log`: a miner counts inner steps over the whole run, a
validator counts rounds.
"""

from __future__ import annotations

from typing import Final

TRAIN_LOSS: Final = "train/loss"  # nats per token, mean of one inner step
TRAIN_STEP: Final = "train/step"  # inner steps within the round
TRAIN_TOKENS_PER_SECOND: Final = "train/tokens_per_second"
TRAIN_LEARNING_RATE: Final = "train/learning_rate"
TRAIN_GRAD_NORM: Final = "train/grad_norm"  # before clipping

GLOBAL_EPOCH: Final = "progress/global_epoch"  # mirrors the newest tag; nothing reads it back from a tracker
GLOBAL_SAMPLES: Final = "progress/global_samples"  # samples of receipts that were verified, over the whole run
ROUND: Final = "progress/round"

VAL_LOSS: Final = "val/loss"  # nats per token on the held-out rows, of the published state

ALLREDUCE_SECONDS: Final = "allreduce/seconds"
ALLREDUCE_BYTES_SENT: Final = "allreduce/bytes_sent"
ALLREDUCE_BYTES_RECEIVED: Final = "allreduce/bytes_received"
ALLREDUCE_FAULTS: Final = "allreduce/faults"  # members left out or replaced
ALLREDUCE_MEMBERS: Final = "allreduce/members"

SCORE: Final = "scores/score"  # these four and WEIGHT take `per_member`; each in [0, 1]
SCORE_GRADIENT: Final = "scores/gradient"
SCORE_STEPS: Final = "scores/steps"
SCORE_BANDWIDTH: Final = "scores/bandwidth"
WEIGHT: Final = "weights"

PLOT_ORDER: Final = (TRAIN_LOSS, VAL_LOSS, "train/*", "progress/*", "allreduce/*", "scores/*", "weights/*")
"""The order of sections and plots on the dashboard: the losses first."""


def per_member(metric: str, member: str) -> str:
    """The name of ``metric`` for one member: ``per_member(WEIGHT, "uid-3") == "weights/uid-3"``."""
    return f"{metric}/{member}"
