"""Serve the dashboard of a trackio store until told to stop.

    python -m hivetrain.tracking.dashboard --dir STATE/tracking/trackio --port 7860

No browser is opened, nothing is shared, nothing outside this machine is contacted. ``GET /version`` answers when
the dashboard is up. Exit codes: 0 after SIGTERM or Ctrl-C, 2 when it cannot work as asked.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from hivetrain.errors import ConfigError, HivetrainError
from hivetrain.tracking.trackio_tracker import Dashboard

logger = logging.getLogger(__name__)


def serve(store: Path, *, host: str, port: int, project: str) -> None:
    """Serve until SIGTERM or SIGINT. Must run in the main thread.

    Raises:
        ConfigError: the port is out of range or taken.
        ServiceError: the store cannot be opened.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port must be in 1..65535, got {port}")
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    dashboard = Dashboard(store, host=host, port=port, project=project)
    dashboard.start()
    logger.info("dashboard of %s at %s", store, dashboard.url)
    stop.wait()
    dashboard.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` and serve; the exit code."""
    parser = argparse.ArgumentParser(prog="hivetrain.tracking.dashboard", description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="the trackio store")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--project", default="", help="project to show first")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        serve(args.dir, host=args.host, port=args.port, project=args.project)
    except HivetrainError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
