"""A real hub server in a real process, for any test that needs one."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hivetrain.manifest import FileEntry, Manifest
from hivetrain.ports import free_port

START_DEADLINE_S = 30.0


class HubProcess:
    """The server over ``folder``; it keeps its port and its data over restarts."""

    def __init__(self, folder: Path, *options: str, token: str | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = options
        self._token = token
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """What starts it."""
        module = [sys.executable, "-m", "hivetrain.hub.server"]
        return [*module, "--dir", str(self.folder), "--port", str(self.port), *self._options]

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = {**os.environ, **({"HIVETRAIN_HUB_TOKEN": self._token} if self._token else {})}
        self._process = subprocess.Popen(self.command(), env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_DEADLINE_S
        while not self._answers():
            assert self._process.poll() is None, f"the hub exited with {self._process.returncode}"
            assert time.monotonic() < deadline, "the hub does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> int:
        """Send a signal, wait for the end, return the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout=20)

    def close(self) -> None:
        """Stop it if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGTERM)

    def request(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One raw request, its path sent as it is; ``body`` may be bytes or an iterable of chunks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=dict(headers or {}))  # type: ignore[arg-type]
            response = connection.getresponse()
            return response.status, response.read()

    def blob(self, data: bytes) -> Path:
        """Where the server keeps these bytes."""
        name = hashlib.sha256(data).hexdigest()
        return self.folder / "blobs" / name[:2] / name

    def blob_bytes(self) -> int:
        """What all blobs take, unfinished ones included."""
        return sum(path.stat().st_size for path in (self.folder / "blobs").rglob("*") if path.is_file())

    def _answers(self) -> bool:
        try:
            return self.request("GET", "/health")[0] == 200
        except OSError:
            return False


@contextlib.contextmanager
def running_hub(folder: Path, *options: str, token: str | None = None) -> Iterator[HubProcess]:
    """A started hub, stopped at the end."""
    hub = HubProcess(folder, *options, token=token)
    try:
        hub.start()
        yield hub
    finally:
        hub.close()


def make_manifest(epoch: int, files: Mapping[str, bytes], nonce: str = "") -> Manifest:
    """A manifest of ``files`` whose other fields are made up."""
    entries = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) for name, data in files.items()
    }
    return Manifest(
        run_id="1" * 64,
        epoch=epoch,
        round=epoch - 1,
        parent="" if epoch == 0 else "2" * 64,
        schema_hash="3" * 64,
        state_hash="4" * 64,
        files=entries,
        val_loss=4.0,
        block=10 * epoch,
        nonce=nonce or secrets.token_hex(8),
        leader="leader",
    )
