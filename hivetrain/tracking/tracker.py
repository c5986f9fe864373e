"""What a neuron asks of a tracker: four methods, and the record that names its run.

A tracker shows; it is never the source of truth. The global epoch is the newest tag on the hub, and nothing
reads it, or anything else, back from a tracker. Backends may raise and may block: neurons hold them behind
`hivetrain.tracking.safe.SafeTracker`, which lets neither reach the training loop.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, SupportsFloat, runtime_checkable

Value = float | int | str
AlertLevel = Literal["info", "warn", "error"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """How one neuron appears in a tracker.

    Attributes:
        project: what the dashboard lists first; letters, digits, ``-`` and ``_``.
        name: the neuron within the project, such as ``miner-1``; also the name of its JSONL file.
        group: what joins the neurons of one run: the first characters of the run id.
        config: settings to show beside the curves. Never secrets.
    """

    project: str
    name: str
    group: str
    config: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field, value in (("project", self.project), ("name", self.name), ("group", self.group)):
            if not _NAME.fullmatch(value):
                raise ValueError(
                    f"{field} must be 1 to 100 letters, digits, '.', '_' or '-', and start with a letter or digit, "
                    f"got {value!r}"
                )
        # Trackio drops dots from a project's file name, and two projects would share one file.
        if "." in self.project:
            raise ValueError(f"project must not hold a '.', got {self.project!r}")


class Tracker(Protocol):
    """One place where metrics go. Calls come from one thread at a time."""

    def start(self) -> None:
        """Open the backend. Slow imports happen here.

        Raises:
            HivetrainError: the backend cannot be opened. Libraries may raise anything else.
        """
        ...

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        """Record ``metrics`` at ``step``. Steps may repeat and need not be consecutive."""
        ...

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        """Record something that a person should see."""
        ...

    def finish(self) -> None:
        """Write out what is pending and close. Nothing is logged afterwards."""
        ...


@runtime_checkable
class Abandonable(Protocol):
    """A tracker that holds something which would outlive a stuck thread and delay the process's exit."""

    def abandon(self) -> None:
        """Let go of it, from any thread, while `Tracker.start` or `Tracker.finish` hangs in another."""
        ...


def plain(metrics: Mapping[str, object]) -> dict[str, Value]:
    """``metrics`` as Python numbers and strings; what is neither (a list, a whole tensor) is left out.

    A number of numpy or torch is copied out, so that the caller may overwrite it afterwards.
    """
    values: dict[str, Value] = {}
    for name, value in metrics.items():
        if isinstance(value, float | int | str):
            values[name] = value
        elif isinstance(value, SupportsFloat):
            try:
                values[name] = float(value)
            except (TypeError, ValueError, RuntimeError):  # RuntimeError: torch, more than one element
                continue
    return values


def finite_or_none(value: Value) -> Value | None:
    """``value``, or None for NaN and the infinities, which JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
