"""A model hub of our own: small enough to read, and the real `huggingface_hub` client works against it.

    python -m hivetrain.hub.server --dir D --host 127.0.0.1 --port 8800

With `HIVETRAIN_HUB_TOKEN` in the environment every write needs that bearer token. Reading is open: bind to
loopback, or put a reverse proxy with TLS in front. One process serves one folder; whatever it has answered
survives `kill -9`. Existing hub servers were tried and rejected: none keeps `parentCommit`, or none embeds.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from hivetrain.hub.records import Refused
from hivetrain.hub.routes import HubRoutes, Limits, refusal
from hivetrain.hub.storage import HubStorage

TOKEN_VARIABLE = "HIVETRAIN_HUB_TOKEN"

logger = logging.getLogger(__name__)


def create_app(storage: HubStorage, limits: Limits, token: str | None) -> ASGIApp:
    """The server as an ASGI application over a started ``storage``."""
    routes = HubRoutes(storage, limits, token)
    routes.start()
    inner = Starlette(routes=routes.table(), exception_handlers={Refused: refusal, ClientDisconnect: refusal})

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Match routes on the raw path: a branch named "a/b" comes as "a%2Fb" and is one segment.
        if scope["type"] == "http":
            scope = {**scope, "path": scope["raw_path"].decode("latin-1").partition("?")[0]}
        await inner(scope, receive, send)

    return app


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM.

    Returns:
        0 after a clean stop; 2 when the folder or the port cannot be used, after one line that says so.
    """
    args = _parser().parse_args(argv)
    if not 0 <= args.port <= 65535:
        return _give_up(f"--port must be in 0..65535, got {args.port}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        limits = Limits(max_file_bytes=args.max_file_mb << 20, max_commit_bytes=args.max_commit_mb << 20)
    except ValueError as exc:
        return _give_up(str(exc))
    storage = HubStorage(args.dir)
    try:
        listener = _listen(args.host, args.port)
    except OSError as exc:
        hint = "another program uses it: choose another with --port" if exc.errno == errno.EADDRINUSE else exc.strerror
        return _give_up(f"cannot listen on {args.host}:{args.port}: {hint}")
    with listener:
        try:
            storage.start()
        except BlockingIOError:
            return _give_up(f"{args.dir} is served by another hub: choose another with --dir")
        except OSError as exc:
            return _give_up(f"cannot use {args.dir}: {exc.strerror}")
        try:
            _serve(create_app(storage, limits, os.environ.get(TOKEN_VARIABLE) or None), listener)
        finally:
            storage.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hivetrain.hub.server", description="A local model hub.")
    parser.add_argument("--dir", type=Path, required=True, help="folder that holds everything; made when missing")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8800, help="0 picks a free one and logs it")
    parser.add_argument("--max-file-mb", type=int, default=8192, help="largest single file")
    parser.add_argument("--max-commit-mb", type=int, default=64, help="largest commit, large files not counted")
    return parser


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a restart bind while old connections linger; two live listeners still exclude each other.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _serve(app: ASGIApp, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=3
    )
    config.server_header = False
    server = uvicorn.Server(config)

    def stop(signum: int, frame: object) -> None:
        server.should_exit = True

    # uvicorn takes these over while it serves, and raises them again afterwards: then they must be harmless.
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    host, port = listener.getsockname()[:2]
    logger.info("model hub on http://%s:%d", host, port)
    server.run(sockets=[listener])


def _give_up(message: str) -> int:
    sys.stderr.write(f"hivetrain.hub.server: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
