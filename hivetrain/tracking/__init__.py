"""Metrics, statuses and events: what people see of a run. Nothing here decides anything.

Importing this package imports neither trackio nor wandb: ``start()`` of a tracker does, on its own thread.
"""

from __future__ import annotations

from hivetrain.tracking.events import Event, EventLog, EventReader
from hivetrain.tracking.factory import TrackerKind, jsonl_path, make_tracker, trackio_store
from hivetrain.tracking.jsonl import JsonlTracker, read_jsonl, read_series
from hivetrain.tracking.safe import SafeTracker, Trackers
from hivetrain.tracking.status import NeuronStatus, StatusWriter, read_statuses, write_status
from hivetrain.tracking.tracker import AlertLevel, RunInfo, Tracker, Value
from hivetrain.tracking.trackio_tracker import TrackioTracker
from hivetrain.tracking.wandb_tracker import WandbMode, WandbTracker

__all__ = [
    "AlertLevel",
    "Event",
    "EventLog",
    "EventReader",
    "JsonlTracker",
    "NeuronStatus",
    "RunInfo",
    "SafeTracker",
    "StatusWriter",
    "Tracker",
    "TrackerKind",
    "Trackers",
    "TrackioTracker",
    "Value",
    "WandbMode",
    "WandbTracker",
    "jsonl_path",
    "make_tracker",
    "read_jsonl",
    "read_series",
    "read_statuses",
    "trackio_store",
    "write_status",
]
