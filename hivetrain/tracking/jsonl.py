"""Metrics as JSON lines: always on, no dependency, readable by anything while the neuron runs.

Every line is one ``write`` to a file opened for appending, so lines of several processes do not mix and a
killed process loses nothing that it had written (a power cut may: there is no fsync). A write that was cut
short, by a kill or by a full disk, leaves a torn line: the next writer starts on a fresh line and readers
skip the torn one.

Lines are objects with ``time`` (unix seconds) and one of ``run`` (a start), ``metrics`` with ``step``, or
``alert``. NaN and the infinities are null.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hivetrain.tracking.tracker import AlertLevel, RunInfo, Value, finite_or_none

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20


class LineFile:
    """A file to which JSON objects are appended, one line each.

    Args:
        path: the file; it and its folder are created by the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._torn = False

    def append(self, record: Mapping[str, object]) -> None:
        """Append one line.

        Raises:
            OSError: the line was not written, or not as a whole.
            ValueError: the record holds NaN, or is longer than `MAX_LINE_BYTES`.
        """
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a line of {self.path} must be at most {MAX_LINE_BYTES} bytes, got {len(line)}")
        if self._fd is None:
            self._fd = self._open()
        if self._torn:
            line = b"\n" + line
        written = os.write(self._fd, line)
        self._torn = written < len(line)
        if self._torn:
            raise OSError(f"wrote {written} of {len(line)} bytes to {self.path}: is the disk full?")

    def close(self) -> None:
        """Close the file. A later `append` opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(fd).st_size
        self._torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        return fd


class JsonlTracker:
    """A `Tracker` that appends to one file per neuron."""

    def __init__(self, path: Path, info: RunInfo, *, clock: Callable[[], float] = time.time) -> None:
        self._file = LineFile(path)
        self._info = info
        self._clock = clock
        self._start_line: dict[str, object] | None = None

    def start(self) -> None:
        """Nothing is opened: the line of the start goes before the first record, so a full disk may recover."""
        self._start_line = {
            "time": self._clock(),
            "run": {"project": self._info.project, "name": self._info.name, "group": self._info.group},
            "config": {name: finite_or_none(value) for name, value in self._info.config.items()},
            "pid": os.getpid(),
        }

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._write({"step": step, "metrics": {name: finite_or_none(value) for name, value in metrics.items()}})

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        self._write({"alert": {"title": title, "text": text, "level": level}})

    def finish(self) -> None:
        self._write_start()
        self._file.close()

    def _write_start(self) -> None:
        if self._start_line is not None:
            self._file.append(self._start_line)
            self._start_line = None

    def _write(self, record: Mapping[str, object]) -> None:
        self._write_start()
        self._file.append({"time": self._clock(), **record})


def read_jsonl(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a file of JSON lines, in order. Torn lines are skipped; a missing file holds none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield record


def read_series(path: Path, metric: str) -> list[tuple[int, float | None]]:
    """``(step, value)`` of one numeric metric, in the order of writing; None where it was not finite."""
    series: list[tuple[int, float | None]] = []
    for record in read_jsonl(path):
        metrics, step = record.get("metrics"), record.get("step")
        if not isinstance(metrics, dict) or not isinstance(step, int) or metric not in metrics:
            continue
        value = metrics[metric]
        if value is None or isinstance(value, float | int):
            series.append((step, None if value is None else float(value)))
    return series


def parse_line(line: bytes) -> dict[str, object] | None:
    """One line as an object, or None for a line that is torn, blank or not an object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
