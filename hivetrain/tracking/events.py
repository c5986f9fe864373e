"""What happened, one line each, for the live screen and for whoever reads the log afterwards.

All neurons of a machine append to one file; each line is one ``write``, so lines do not mix.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from hivetrain.tracking.jsonl import MAX_LINE_BYTES, LineFile

logger = logging.getLogger(__name__)

FieldValue = float | int | str | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to one neuron.

    Attributes:
        time: unix seconds.
        name: the neuron.
        event: what kind, in one word with underscores: ``set_weights``, ``published``, ``member_left_out``.
        text: the same for a person, one line.
        fields: the same as values.
    """

    time: float
    name: str
    event: str
    text: str = ""
    fields: Mapping[str, FieldValue] = field(default_factory=dict)


_ADAPTER = TypeAdapter(Event)


class EventLog:
    """Appends events of the neuron ``name``. Never raises for a bad disk: says so once and goes on.

    Calls come from one thread at a time.
    """

    def __init__(self, path: Path, name: str, *, clock: Callable[[], float] = time.time) -> None:
        self._file = LineFile(path)
        self._name = name
        self._clock = clock
        self._failed = False

    def append(self, event: str, text: str = "", **fields: FieldValue) -> None:
        """Append one event; NaN and the infinities among ``fields`` become None."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}
        record = {"time": self._clock(), "name": self._name, "event": event, "text": text, "fields": finite}
        try:
            self._file.append(record)
        except OSError as error:
            if not self._failed:
                logger.warning("cannot write events of %s: %s", self._name, error)
            self._failed = True
            return
        self._failed = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class EventReader:
    """Reads what was appended since the last call.

    Args:
        path: the file; it need not exist yet.
        max_bytes: how much one call reads at most; the rest comes with the next.
    """

    def __init__(self, path: Path, *, max_bytes: int = 4 * MAX_LINE_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._offset = 0
        self._inode: int | None = None

    def read_new(self) -> list[Event]:
        """The new events, in order. A line still being written comes with a later call; foreign lines are skipped."""
        try:
            file = self._path.open("rb")
        except OSError:
            return []
        with file:
            self._restart_if_replaced(file.fileno(), file.seek(0, 2))
            file.seek(self._offset)
            content = file.read(self._max_bytes)
        end = content.rfind(b"\n") + 1
        if end == 0 and len(content) == self._max_bytes:
            end = len(content)  # no line of ours is this long: skip it
        self._offset += end
        events = [_parse(line) for line in content[:end].splitlines()]
        return [event for event in events if event is not None]

    def _restart_if_replaced(self, fd: int, size: int) -> None:
        inode = os.fstat(fd).st_ino
        if inode != self._inode or size < self._offset:
            self._offset = 0
        self._inode = inode


def _parse(line: bytes) -> Event | None:
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError:
        return None
