"""The words of the hub server: commits, changes, files, and refusals."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


class Refused(Exception):
    """A request that the hub answers with a 4xx.

    Args:
        status: the HTTP status.
        message: expected and actual, in words.
        code: `X-Error-Code`, by which the client picks its exception; may be empty.
    """

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of one tree. ``git_oid`` is what git would call the bytes (or the LFS pointer to them)."""

    path: str
    blob: str
    size_bytes: int
    git_oid: str
    lfs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One commit. ``parent`` is empty for the first of a history."""

    sha: str
    parent: str
    title: str
    message: str
    created: float  # unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One line of a commit: a new file when ``entry`` is set, else the deletion of a file or a folder."""

    path: str
    entry: Entry | None = None
    folder: bool = False


def entry_of(path: str, blob: str, size_bytes: int, *, data: bytes | None) -> Entry:
    """The entry of a plain file (``data`` given) or of an LFS file (``data`` is None)."""
    content = data if data is not None else lfs_pointer(blob, size_bytes)
    git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return Entry(path=path, blob=blob, size_bytes=size_bytes, git_oid=git_oid, lfs=data is None)


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """The small file that git keeps in the place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()
