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
        self._heard = self._begun = -1
        self._signed: dict[int, str] = {}
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
            self._heard = self._begun = -1
            self._signed = {}
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

    # -- attempts at this round's all-reduce --------------------------------------------------------------

    @property
    def heard(self) -> int:
        """The highest attempt whose leader called here, whether or not we are in its group; -1: nobody did."""
        return self._heard

    @property
    def begun(self) -> int:
        """The highest attempt at an exchange that has begun here, -1 before the first. Lower ones have to end."""
        return self._begun

    @property
    def newest_attempt(self) -> int:
        """The highest attempt for which we exchanged or signed, -1 for none. Nobody is heard for a lower one."""
        return max(self._begun, *self._signed, -1)

    def hear(self, attempt: int) -> None:
        """The rightful leader of ``attempt`` has called, with what a member may follow: a plan to refuse is silence."""
        with self._lock:
            self._heard = max(self._heard, attempt)

    def begin_attempt(self, attempt: int) -> None:
        """The exchange of ``attempt`` begins here."""
        with self._lock:
            self._heard, self._begun = max(self._heard, attempt), max(self._begun, attempt)

    def holds(self, state_hash: str) -> bool:
        """Whether that is a state which an attempt at this round gave here."""
        return bool(state_hash) and state_hash in self._signed.values()

    def sign_once(self, attempt: int, state_hash: str) -> bool:
        """Whether ``state_hash`` may be signed for ``attempt``: one state per attempt, and the first one stands."""
        with self._lock:
            return self._signed.setdefault(attempt, state_hash) == state_hash
