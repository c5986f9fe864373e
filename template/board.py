"""Where the model's thread and the network's handlers meet: a board to read from, a mailbox to post to.

Handlers never touch torch. They answer from what the model's thread last wrote on the board, and what needs the
model goes into the mailbox as a task whose reply they await.
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
from dataclasses import dataclass, replace
from typing import Any

from hivetrain.averaging.group import GroupPlan
from hivetrain.contribution import Contribution
from template.protocol import AllReduce, AllReduceReply


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How far this neuron is. ``round`` -1 and ``epoch`` -1: not in one yet."""

    state: str = "starting"
    epoch: int = -1
    round: int = -1
    step: int = 0
    num_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    base_manifest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceTask:
    """A leader's call that passed every check that needs no model."""

    request: AllReduce
    plan: GroupPlan
    caller: str
    reply: concurrent.futures.Future[AllReduceReply]


class Board:
    """The model thread's last report, its contribution of this round, and its mailbox."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report = Report()
        self._contribution: Contribution | None = None
        self._outcomes: dict[tuple[int, int], AllReduceReply] = {}
        self.mailbox: queue.SimpleQueue[AllReduceTask] = queue.SimpleQueue()

    @property
    def report(self) -> Report:
        """The last report."""
        return self._report

    def update(self, **changes: Any) -> Report:
        """Change fields of the report."""
        with self._lock:
            self._report = replace(self._report, **changes)
            return self._report

    @property
    def contribution(self) -> Contribution | None:
        """What this neuron handed in for the current round."""
        return self._contribution

    def begin_round(self, round_number: int, epoch: int, base_manifest: str) -> None:
        """Forget the last round's contribution."""
        with self._lock:
            self._contribution = None
            self._outcomes.clear()
            self._report = replace(
                self._report, round=round_number, epoch=epoch, base_manifest=base_manifest, step=0, num_steps=0
            )

    def commit(self, contribution: Contribution) -> None:
        """Show the contribution; from here on nothing else may be sent."""
        with self._lock:
            self._contribution = contribution

    def outcome(self, round_number: int, attempt: int) -> AllReduceReply | None:
        """What an attempt gave here, for a leader that asks again."""
        return self._outcomes.get((round_number, attempt))

    def record_outcome(self, reply: AllReduceReply) -> None:
        """Keep what an attempt gave."""
        with self._lock:
            self._outcomes[(reply.round, reply.attempt)] = reply
