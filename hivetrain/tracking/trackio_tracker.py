"""Trackio: a local dashboard over one SQLite store that all neurons of a machine write to. The only importer.

Kept local on purpose: the store is a folder on a local disk (SQLite's WAL is unsafe on network file systems), no
hub is asked who we are, no Space is created, nothing is uploaded, whatever the environment says.

Trackio is talkative, and fails silently towards its caller: its prints go to our debug log, its warnings
("this batch could not be persisted") to our warnings, once per kind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hivetrain.errors import ConfigError, ServiceError
from hivetrain.tracking.metrics import PLOT_ORDER
from hivetrain.tracking.tracker import AlertLevel, RunInfo, Value

logger = logging.getLogger(__name__)

# Each of these would make trackio send metrics off this machine.
_REMOTE_SETTINGS = (
    "TRACKIO_SPACE_ID",
    "TRACKIO_SERVER_URL",
    "TRACKIO_BUCKET_ID",
    "TRACKIO_DATASET_ID",
    "TRACKIO_WEBHOOK_URL",
    "GRADIO_SHARE",
)


class TrackioTracker:
    """A `Tracker` on the trackio store at ``store``. A process can open only one store.

    A neuron that restarts under the same name continues its run.
    """

    def __init__(self, store: Path, info: RunInfo) -> None:
        self._store = store
        self._info = info
        self._trackio: Any = None
        self._run: Any = None
        self._last_step = 0

    def start(self) -> None:
        """Import trackio, about a second, and open the run.

        Raises:
            ServiceError: this process uses another store already, or the store cannot be written.
        """
        probe_store(self._store)
        self._trackio = import_trackio(self._store)
        self._run = self._trackio.init(
            project=self._info.project,
            name=self._info.name,
            group=self._info.group,
            # Trackio groups by any config value, but offers its own "group" only where there are several.
            config={"run": self._info.group, **self._info.config},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._last_step = step
        self._run.log(dict(metrics), step=step)

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        self._run.alert(title, text, level=self._trackio.AlertLevel(level), step=self._last_step)

    def finish(self) -> None:
        """Write out what trackio's own thread holds; trackio itself gives up after 30 s."""
        self._run.finish()


class Dashboard:
    """Trackio's dashboard of one store, served from threads of this process.

    Args:
        store: the folder that the neurons' `TrackioTracker` write to.
        host: address to listen on; anyone who reaches it can read the metrics.
        port: port to listen on.
        project: the project to show first; empty: the viewer chooses.
    """

    def __init__(self, store: Path, *, host: str = "127.0.0.1", port: int, project: str = "") -> None:
        self._store = store
        self._host = host
        self._port = port
        self._project = project
        self._app: Any = None
        self.url = ""

    def start(self) -> None:
        """Serve; returns when the dashboard answers.

        Raises:
            ConfigError: the port is taken.
            ServiceError: the store cannot be opened.
        """
        os.environ.setdefault("TRACKIO_PLOT_ORDER", ",".join(PLOT_ORDER))
        os.environ["HF_HUB_OFFLINE"] = "1"
        probe_store(self._store)
        trackio = import_trackio(self._store)
        try:
            self._app, self.url, _, _ = trackio.show(
                project=self._project or None,
                open_browser=False,
                block_thread=False,
                share=False,
                mcp_server=False,
                host=self._host,
                server_port=self._port,
            )
        except OSError as error:
            raise ConfigError(
                f"the dashboard cannot listen on {self._host}:{self._port}: it is taken, or not an address of this "
                "machine; choose another with --port or --host"
            ) from error

    def close(self) -> None:
        """Stop serving."""
        if self._app is not None:
            self._app.close()


def import_trackio(store: Path) -> ModuleType:
    """Trackio, bound to ``store``, silenced and kept off the network.

    Raises:
        ServiceError: trackio was imported before with another store, which it reads once, at import.
    """
    for name in _REMOTE_SETTINGS:
        if os.environ.pop(name, None) is not None:
            logger.warning("%s is ignored: the tracker stays on this machine", name)
    os.environ["TRACKIO_DIR"] = str(store.resolve())
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import trackio
    from trackio import run, utils

    if store.resolve() != utils.TRACKIO_DIR:
        raise ServiceError(
            f"this process already uses the trackio store {utils.TRACKIO_DIR}, so it cannot use {store.resolve()}: "
            "one process, one store"
        )
    for module in (trackio, run, utils):
        module.print = _print_to_log
        module._emit_nonfatal_warning = _warn_to_log
    # Trackio asks the hub for the name behind the user's token, and stores it: neither is wanted here.
    run._get_default_namespace = lambda: None
    return trackio  # type: ignore[no-any-return]


def probe_store(store: Path) -> None:
    """Create ``store`` and write to it once: trackio would go on without a word.

    Raises:
        ServiceError: the folder cannot be written.
    """
    probe = store / f".probe-{os.getpid()}"
    try:
        store.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise ServiceError(f"the trackio store {store} cannot be written: {error}") from error


def _print_to_log(*parts: object, **_: object) -> None:
    # The write token of the dashboard is printed among the rest: it must not reach a log.
    text = " ".join(str(part) for part in parts)
    if "write_token" not in text:
        logger.debug("trackio: %s", text)


def _warn_to_log(message: str, *_: object, **__: object) -> None:
    logger.warning("%s", message)
