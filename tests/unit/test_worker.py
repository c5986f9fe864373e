"""The process that replays: its death, its slowness and its hub are our own failures."""

from __future__ import annotations
