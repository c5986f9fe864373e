"""The process that replays: its death, its slowness and its hub are our own failures."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.errors import ServiceError
from hivetrain.manifest import Ref
from hivetrain.verification.challenge import Draw
from hivetrain.verification.judge import Answer
from hivetrain.verification.receipt import Receipt
from hivetrain.verification.worker import ReplayProcess, WorkerSpec
from tests.hub_fixture import make_manifest
from tests.keys import TestIdentity
