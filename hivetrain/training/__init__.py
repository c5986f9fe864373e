"""Training: the state of a run, a miner's inner steps, the group's outer step, and held-out loss."""

from hivetrain.training.base import LiveBase, install_base_
from hivetrain.training.evaluate import heldout_loss
from hivetrain.training.inner import Batches, InnerLoop, RoundWork, StepReport, TrainingDiverged, learning_rate
from hivetrain.training.merge import merge_into_base
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
    "LiveBase",
    "RoundWork",
    "Snapshot",
    "State",
    "StepReport",
    "TrainingDiverged",
    "at_snapshot",
    "genesis_state",
    "heldout_loss",
    "install_base_",
    "learning_rate",
    "load_state",
    "merge_into_base",
    "outer_step",
    "pseudo_gradient",
    "state_files",
    "state_hash",
]
