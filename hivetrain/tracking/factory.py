"""The trackers that a neuron's configuration asks for, behind the safety of `Trackers`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hivetrain.tracking.jsonl import JsonlTracker
from hivetrain.tracking.safe import Trackers
from hivetrain.tracking.tracker import RunInfo, Tracker
from hivetrain.tracking.trackio_tracker import TrackioTracker
from hivetrain.tracking.wandb_tracker import WandbMode, WandbTracker

TrackerKind = Literal["trackio", "wandb", "none"]


def jsonl_path(folder: Path, name: str) -> Path:
    """Where the neuron ``name`` writes its JSON lines."""
    return folder / "metrics" / f"{name}.jsonl"


def trackio_store(folder: Path) -> Path:
    """The trackio store: what the dashboard is given as ``--dir``."""
    return folder / "trackio"


def make_tracker(
    kind: TrackerKind,
    info: RunInfo,
    folder: Path,
    *,
    wandb_mode: WandbMode = "offline",
    finish_timeout_s: float = 5.0,
) -> Trackers:
    """JSON lines always, and the backend ``kind``; nothing is opened before ``start()``.

    Args:
        kind: ``none`` is JSON lines alone.
        info: how this neuron appears.
        folder: on a local disk; neurons of one machine share it: ``metrics/NAME.jsonl``, ``trackio/``, ``wandb/``.
        wandb_mode: ``online`` uploads while the neuron runs.
        finish_timeout_s: how long ``finish()`` takes at most.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    backends: dict[str, Tracker] = {"jsonl": JsonlTracker(jsonl_path(folder, info.name), info)}
    if kind == "trackio":
        backends["trackio"] = TrackioTracker(trackio_store(folder), info)
    elif kind == "wandb":
        backends["wandb"] = WandbTracker(folder, info, mode=wandb_mode, finish_timeout_s=finish_timeout_s)
    elif kind != "none":
        raise ValueError(f"tracker must be trackio, wandb or none, got {kind!r}")
    return Trackers(backends, finish_timeout_s=finish_timeout_s)
