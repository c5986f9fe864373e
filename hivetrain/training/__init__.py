"""Training: the state of a run, a miner's inner steps, the group's outer step, and held-out loss."""

from hivetrain.training.evaluate import heldout_loss
from hivetrain.training.inner import Batches, InnerLoop, RoundWork, StepReport, TrainingDiverged, learning_rate
from hivetrain.training.outer import outer_step, pseudo_gradient
from hivetrain.training.state import (
    Snapshot,
    State,
    at_snapshot,
    genesis_state,
    load_state,
    state_files,
    state_hash,
)

__all__ = [
    "Batches",
    "InnerLoop",
    "RoundWork",
    "Snapshot",
    "State",
    "StepReport",
    "TrainingDiverged",
    "at_snapshot",
    "genesis_state",
    "heldout_loss",
    "learning_rate",
    "load_state",
    "outer_step",
    "pseudo_gradient",
    "state_files",
    "state_hash",
]
