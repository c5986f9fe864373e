"""What the hub server answers: the JSON shapes that `huggingface_hub` 2.4 reads."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Mapping

from hivetrain.hub.records import Commit, Entry, lfs_pointer

Json = dict[str, object]


def repo(name: str, sha: str, entries: Iterable[Entry]) -> Json:
    """A repository at a revision."""
    siblings = [
        {"rfilename": entry.path, "size": entry.size_bytes, "blobId": entry.git_oid, "lfs": _lfs(entry)}
        for entry in entries
    ]
    fixed: Json = {"private": False, "tags": [], "downloads": 0, "likes": 0}
    return fixed | {"id": name, "modelId": name, "sha": sha, "siblings": siblings}


def refs(branches: Iterable[tuple[str, str]], tags: Iterable[tuple[str, str]]) -> Json:
    """Every branch and tag, given as ``(name, commit)``."""
    return {
        "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in branches],
        "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in tags],
        "converts": [],
        "pullRequests": [],
    }


def commit(commit: Commit) -> Json:
    """One line of a history."""
    date = datetime.datetime.fromtimestamp(commit.created, datetime.UTC)
    return {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": "local"}],
        "date": date.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
    }


def tree(sha: str, entries: Mapping[str, Entry], top: str, recursive: bool) -> list[Json]:
    """Files and folders below the folder ``top`` of a commit; empty when there is no such folder."""
    prefix = top + "/" if top else ""
    listing: dict[str, Json] = {}
    for path, entry in entries.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            name = prefix + "/".join(parts[:depth])
            listing.setdefault(name, folder(sha, name))
        if recursive or len(parts) == 1:
            listing[path] = file(entry)
    return list(listing.values())


def file(entry: Entry) -> Json:
    """A file of a tree."""
    answer: Json = {"type": "file", "path": entry.path, "size": entry.size_bytes, "oid": entry.git_oid}
    lfs = _lfs(entry)
    return answer | ({"lfs": lfs} if lfs else {})


def folder(sha: str, path: str) -> Json:
    """A folder of a tree."""
    oid = hashlib.sha1(f"{sha}/{path}".encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}


def _lfs(entry: Entry) -> Json | None:
    if not entry.lfs:
        return None
    pointer_size = len(lfs_pointer(entry.blob, entry.size_bytes))
    return {"oid": entry.blob, "sha256": entry.blob, "size": entry.size_bytes, "pointerSize": pointer_size}
