"""Weights & Biases: offline by default, online by a flag. The only importer of wandb.

Offline, a run is a folder ``wandb/offline-run-*`` that ``wandb leet`` shows and ``wandb sync`` uploads later; no
account is needed and nothing leaves the machine, wandb's own error reports included.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from hivetrain.errors import ConfigError
from hivetrain.tracking.tracker import AlertLevel, RunInfo, Value

WandbMode = Literal["offline", "online"]

STEP = "step"
"""Our step, and the x axis. wandb's own ``_step`` must never fall, and ours does after a resync."""


class WandbTracker:
    """A `Tracker` that writes wandb runs below ``folder/wandb``.

    Args:
        folder: parent of wandb's own folder.
        info: how the run appears.
        mode: ``online`` needs an API key, from the environment or from ``wandb login``.
        finish_timeout_s: how long wandb uploads at the end; the rest stays on disk for ``wandb sync``.
    """

    def __init__(
        self, folder: Path, info: RunInfo, *, mode: WandbMode = "offline", finish_timeout_s: float = 5.0
    ) -> None:
        self._folder = folder
        self._info = info
        self._mode = mode
        self._finish_timeout_s = finish_timeout_s
        self._wandb: Any = None
        self._run: Any = None

    def start(self) -> None:
        """Import wandb, about a second, start its service process and open the run.

        Raises:
            ConfigError: online, and no API key is known.
        """
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ["WANDB_SILENT"] = "true"
        self._folder.mkdir(parents=True, exist_ok=True)  # wandb falls back to /tmp where it cannot write
        if not os.access(self._folder, os.W_OK):
            raise PermissionError(f"the wandb folder {self._folder} cannot be written")
        import wandb

        # Without a key wandb.init would ask for one on the terminal, and wait.
        if self._mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError("wandb online needs an API key: set WANDB_API_KEY, or run `wandb login`, or stay offline")
        self._wandb = wandb
        self._run = wandb.init(
            mode=self._mode,
            dir=str(self._folder),
            project=self._info.project,
            name=self._info.name,
            group=self._info.group,
            config=dict(self._info.config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                finish_timeout=self._finish_timeout_s,
                x_disable_meta=True,
                x_disable_stats=self._mode == "offline",
            ),
        )
        self._run.define_metric("*", step_metric=STEP)

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._run.log({**metrics, STEP: step})

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        self._run.alert(title, text, level=self._wandb.AlertLevel(level.upper()))

    def finish(self) -> None:
        self._run.finish()

    def abandon(self) -> None:
        """End wandb's service process; what it wrote to disk stays, for ``wandb sync``.

        wandb waits for that process when ours exits, and the process for its server: 96 s were measured for a
        server that accepts connections and never answers.
        """
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()
