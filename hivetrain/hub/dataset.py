"""The seam to a data set's files: parquet that is read by range, one row group at a time.

Reading one assigned row group must move that row group's bytes, not the file's. So a remote file is unbuffered:
it asks for exactly the bytes that the parquet reader wants. Over HTTP a row group costs its own bytes and 64 KiB
for the footer.

Implementations: `hivetrain.hub.client.HubDataset` and `LocalDataset`, under one contract suite.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from hivetrain.errors import DataError


class DatasetFiles(Protocol):
    """The parquet files of one pinned revision."""

    def list_parquet(self, config: str) -> list[tuple[str, int]]:
        """``(path, size in bytes)`` of every parquet file below the folder ``config``; all when it is empty.

        Returns:
            Sorted by path, so that every node numbers the files alike. Empty where there is none.
        """
        ...

    def open(self, path: str) -> BinaryIO:
        """A seekable file that fetches what is read from it, and nothing else.

        Raises:
            DataError: no such file.
        """
        ...


class LocalDataset:
    """A data set in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list_parquet(self, config: str) -> list[tuple[str, int]]:
        """See `DatasetFiles.list_parquet`."""
        top = self._inside(config) if config else self._folder
        found = ((path.relative_to(self._folder).as_posix(), path.stat().st_size) for path in top.rglob("*.parquet"))
        return sorted(found)

    def open(self, path: str) -> BinaryIO:
        """See `DatasetFiles.open`."""
        try:
            return cast("BinaryIO", self._inside(path).open("rb", buffering=0))
        except OSError as exc:
            raise DataError(f"cannot open {path} of the data set in {self._folder}: {exc.strerror}") from exc

    def _inside(self, path: str) -> Path:
        target = (self._folder / path).resolve()
        if not target.is_relative_to(self._folder.resolve()):
            raise DataError(f"{path!r} is outside the data set")
        return target


class RangeFile(io.RawIOBase):
    """A read-only file of known size behind ``read_range(start, stop)``, which returns exactly those bytes."""

    def __init__(self, size_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._read_range = read_range
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; costs nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, or all that are left: one request."""
        left = max(self._size_bytes - self._position, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count == 0:
            return b""
        data = self._read_range(self._position, self._position + count)
        self._position += len(data)
        return data

    def readinto(self, buffer: object) -> int:
        """Fill ``buffer`` with the next bytes; returns how many."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # the signature of RawIOBase wants a Buffer
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)
