"""Content-addressed files on disk: a blob is named by the sha256 of its bytes, and is there whole or not at all.

A blob is written to a temporary file, hashed on the way, synced, and renamed into place, so that a process
killed at any instant leaves either the old state or the new one. Temporary files of a dead process are removed
at the next start.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobMismatch(Exception):
    """Uploaded bytes are not the announced ones; the message holds both."""


class IncomingBlob:
    """A blob on its way to the disk. As a context manager it leaves nothing behind unless `keep` was called.

    Args:
        store: where it will live.
        max_bytes: writing more than this raises `BlobMismatch`.
    """

    def __init__(self, store: BlobStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        descriptor, name = tempfile.mkstemp(dir=store.temp_dir)
        self._file = os.fdopen(descriptor, "wb")
        self._path = Path(name)

    def write(self, chunk: bytes) -> None:
        """Append ``chunk``.

        Raises:
            BlobMismatch: more than ``max_bytes`` in all.
        """
        self._size_bytes += len(chunk)
        if self._size_bytes > self._max_bytes:
            raise BlobMismatch(f"upload is longer than the {self._max_bytes} bytes announced")
        self._hash.update(chunk)
        self._file.write(chunk)

    def keep(self, sha256: str, size_bytes: int) -> None:
        """Check the bytes against what was announced, sync them and put them in place.

        Raises:
            BlobMismatch: another size or another digest.
        """
        if self._size_bytes != size_bytes:
            raise BlobMismatch(f"upload has {self._size_bytes} bytes, {size_bytes} were announced")
        if self._hash.hexdigest() != sha256:
            raise BlobMismatch(f"upload has sha256 {self._hash.hexdigest()}, {sha256} was announced")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        target = self._store.path(sha256)
        target.parent.mkdir(exist_ok=True)
        os.replace(self._path, target)
        _sync_folder(target.parent)

    def __enter__(self) -> IncomingBlob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


class BlobStore:
    """Blobs under one folder, in 256 subfolders. Callers serialise `remove` against whoever counts on a blob."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.temp_dir = folder / "incoming"

    def start(self) -> None:
        """Make the folders and clear what a killed process left unfinished."""
        self.temp_dir.mkdir(parents=True, exist_ok=True)
        for leftover in self.temp_dir.iterdir():
            leftover.unlink()

    def path(self, sha256: str) -> Path:
        """Where the blob lies, or would lie."""
        if not SHA256.fullmatch(sha256):
            raise ValueError(f"a blob is named by 64 hex digits, got {sha256!r}")
        return self._folder / sha256[:2] / sha256

    def size_bytes(self, sha256: str) -> int | None:
        """The blob's size, or None where there is none."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def put(self, data: bytes) -> str:
        """Store ``data``; returns its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size_bytes(sha256) != len(data):
            with IncomingBlob(self, len(data)) as blob:
                blob.write(data)
                blob.keep(sha256, len(data))
        return sha256

    def read(self, sha256: str) -> bytes:
        """The blob's bytes."""
        return self.path(sha256).read_bytes()

    def remove(self, sha256: str) -> int:
        """Delete the blob; returns the bytes freed."""
        size = self.size_bytes(sha256) or 0
        self.path(sha256).unlink(missing_ok=True)
        return size

    def names(self) -> Iterator[str]:
        """The sha256 of every blob."""
        for folder in self._folder.iterdir():
            if folder != self.temp_dir:
                yield from (entry.name for entry in folder.iterdir() if SHA256.fullmatch(entry.name))


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost with the power.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
