"""The schedule as a Trainer sees it: read, logged and saved, but stepped by the swarm."""

from __future__ import annotations

from typing import Any


class SwarmSchedule:
    """Stands where a Trainer keeps its scheduler.

    A real one here would step once per step of this peer and be ignored, or fail: `hivemind.Optimizer` hands out copies
    of its parameter groups.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, *args: object) -> None:
        """Nothing: the swarm's optimizer steps the schedule once per epoch of the swarm."""

    def get_last_lr(self) -> list[float]:
        """The rates of the next step of the swarm, one per parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, object]:
        """Nothing to keep: the rate is a function of the swarm's epoch, which the optimizer's state holds."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing to restore."""
