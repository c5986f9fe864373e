"""What each neuron is doing, as one small file per neuron: what ``hivetrain up`` and ``hivetrain status`` read.

A neuron replaces its file as a whole (write beside it, then rename), so a reader sees the old status or the new
one. The folder is local and for people to look at: nothing in the protocol depends on it, so a neuron that cannot
write its status says so once and goes on.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

from pydantic import TypeAdapter, ValidationError

logger = logging.getLogger(__name__)

MAX_STATUS_BYTES = 1 << 16
MIN_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class NeuronStatus:
    """One neuron, now.

    Attributes:
        name: unique on this machine, such as ``miner-1``.
        role: ``miner``, ``validator``, ``averager``, ``hub``, ...
        pid: its process.
        state: one word for what it does: ``starting``, ``waiting``, ``training``, ``committing``, ``all-reduce``,
            ``publishing``, ``resync``, ``stopping``, ``failed``.
        ready: it takes part, or can.
        uid: its place in the metagraph; None: has none, or does not know yet.
        hotkey: empty for what is no neuron, such as the hub.
        epoch: the epoch whose state it holds; -1: none yet.
        round: -1: none yet.
        phase: of the round.
        step: inner steps done in this round, of ``num_steps``.
        loss: nats per token, the newest; a validator's is the held-out loss.
        tokens_per_second: the newest.
        score: in [0, 1]; None: not known.
        weight: in [0, 1]; None: not known.
        detail: a few words for a person.
        updated_at: unix seconds.
    """

    name: str
    role: str
    pid: int
    state: str = "starting"
    ready: bool = False
    uid: int | None = None
    hotkey: str = ""
    epoch: int = -1
    round: int = -1
    phase: str = ""
    step: int = 0
    num_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    score: float | None = None
    weight: float | None = None
    detail: str = ""
    updated_at: float = 0.0

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or "/" in self.name:
            raise ValueError(f"name must be a file name that is not hidden, got {self.name!r}")


class StatusChanges(TypedDict, total=False):
    """The fields of `NeuronStatus` that change while a neuron runs."""

    state: str
    ready: bool
    uid: int | None
    hotkey: str
    epoch: int
    round: int
    phase: str
    step: int
    num_steps: int
    loss: float | None
    tokens_per_second: float | None
    score: float | None
    weight: float | None
    detail: str


_ADAPTER = TypeAdapter(NeuronStatus)
_URGENT = ("state", "ready", "uid", "epoch", "round", "phase")  # written at once, whenever they change


def write_status(folder: Path, status: NeuronStatus) -> None:
    """Replace ``folder/NAME.json`` as a whole.

    Raises:
        OSError: the folder cannot be written; the old file is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Hidden, and per process: a half-written file is never read, and two writers do not share it.
    temporary = folder / f".{status.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(_ADAPTER.dump_json(status))  # pydantic writes NaN as null
        os.replace(temporary, folder / f"{status.name}.json")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_status(path: Path) -> NeuronStatus | None:
    """The status in one file, or None where it is gone, too large, torn or something else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_STATUS_BYTES + 1)
    except OSError:
        return None
    if len(content) > MAX_STATUS_BYTES:
        return None
    try:
        status = _ADAPTER.validate_json(content)
    except ValidationError:
        return None
    return status if status.name == path.stem else None


def read_statuses(folder: Path) -> list[NeuronStatus]:
    """The statuses in ``folder``, ``miner-2`` before ``miner-10``. Torn and foreign files are left out."""
    paths = [path for path in folder.glob("*.json") if not path.name.startswith(".")]
    statuses = [status for path in paths if (status := read_status(path)) is not None]
    return sorted(statuses, key=lambda status: _natural(status.name))


class StatusWriter:
    """Keeps a neuron's status file up to date; safe to call from any thread, never raises for a bad disk.

    A change of state, epoch, round or phase is written at once; other changes at most five times a second. What
    waits is written by the next `update` or by `flush`.

    Args:
        folder: where `read_statuses` looks.
        name: the neuron's name.
        role: its role.
        clock: unix seconds.
    """

    def __init__(self, folder: Path, name: str, role: str, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._status = NeuronStatus(name=name, role=role, pid=os.getpid(), updated_at=clock())
        self._written_at: float | None = None
        self._pending = True
        self._failed = False

    @property
    def status(self) -> NeuronStatus:
        """The newest status, written or not."""
        with self._lock:
            return self._status

    def update(self, **changes: Unpack[StatusChanges]) -> None:
        """Change some fields.

        Raises:
            TypeError: a field that `NeuronStatus` does not have.
        """
        with self._lock:
            old, now = self._status, self._clock()
            self._status = replace(old, **changes, updated_at=now)
            self._pending = True
            urgent = any(getattr(old, name) != getattr(self._status, name) for name in _URGENT)
            # A wall clock may be set back: a negative age must not hold the file up.
            waits = self._written_at is not None and 0 <= now - self._written_at < MIN_INTERVAL_S
            if urgent or not waits:
                self._write(now)

    def flush(self) -> None:
        """Write what waits."""
        with self._lock:
            if self._pending:
                self._write(self._clock())

    def _write(self, now: float) -> None:
        self._written_at = now
        try:
            write_status(self._folder, self._status)
        except OSError as error:
            if not self._failed:
                logger.warning("cannot write the status of %s: %s", self._status.name, error)
            self._failed = True
            return
        self._pending = False
        self._failed = False


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
