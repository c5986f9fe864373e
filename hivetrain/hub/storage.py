"""What the hub server knows: repositories, commits, branches and tags in SQLite; bytes in `BlobStore`.

A commit stores its *changes*, not its tree; a tree is the newest change of every path along the chain of
parents. So a branch of ten thousand small commits costs ten thousand rows, not their square.

Every public method is one transaction under one lock, and is safe to call from any thread. WAL with full
synchronisation: what a method returned survives a kill, and what was under way leaves no trace.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from hivetrain.hub.blobs import BlobStore
from hivetrain.hub.records import Change, Commit, Entry, Refused, entry_of

PENDING_GRACE_S = 3600.0
"""How long collection spares a blob that was uploaded, or announced as present, but is not committed yet."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS repos (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (kind, name));
CREATE TABLE IF NOT EXISTS commits (
    repo INTEGER NOT NULL, sha TEXT NOT NULL, parent TEXT, title TEXT NOT NULL, message TEXT NOT NULL,
    created REAL NOT NULL, PRIMARY KEY (repo, sha)
);
CREATE TABLE IF NOT EXISTS changes (
    repo INTEGER NOT NULL, sha TEXT NOT NULL, path TEXT NOT NULL, blob TEXT, size INTEGER NOT NULL,
    git_oid TEXT NOT NULL, lfs INTEGER NOT NULL, PRIMARY KEY (repo, sha, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refs (
    repo INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, sha TEXT NOT NULL, PRIMARY KEY (repo, kind, name)
);
CREATE TABLE IF NOT EXISTS pending (blob TEXT PRIMARY KEY, since REAL NOT NULL);
"""

_CHAIN = """
WITH RECURSIVE chain (sha, parent, depth) AS (
    SELECT sha, parent, 0 FROM commits WHERE repo = :repo AND sha = :sha
    UNION ALL
    SELECT commits.sha, commits.parent, depth + 1 FROM commits JOIN chain ON commits.sha = chain.parent
    WHERE commits.repo = :repo
)
"""


class HubStorage:
    """The whole store, below one folder that one process owns at a time.

    Args:
        folder: created when missing.
        clock: unix seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.blobs = BlobStore(folder / "blobs")
        self._folder = folder
        self._clock = clock
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._owner: IO[bytes] | None = None

    def start(self) -> None:
        """Open the database.

        Raises:
            BlockingIOError: another process owns the folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._owner = (self._folder / "lock").open("wb")
        try:
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._owner.close()
            raise
        self.blobs.start()
        self._database = sqlite3.connect(self._folder / "hub.sqlite", check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database and give the folder up."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None
            if self._owner is not None:
                self._owner.close()
                self._owner = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._database is None:
                raise RuntimeError("HubStorage.start was not called")
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def upload_secret(self) -> bytes:
        """The key that signs upload addresses; the same after a restart."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('upload_secret', ?)", (secrets.token_hex(32),))
            (value,) = db.execute("SELECT value FROM meta WHERE key = 'upload_secret'").fetchone()
        return bytes.fromhex(value)

    # Repositories and references

    def create_repo(self, kind: str, name: str) -> bool:
        """Make a repository whose `main` is one empty commit; False when it exists."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM repos WHERE kind = ? AND name = ?", (kind, name)).fetchone():
                return False
            cursor = db.execute("INSERT INTO repos (kind, name) VALUES (?, ?)", (kind, name))
            root = self._insert_commit(db, _identity(cursor.lastrowid), "", "initial commit", "", ())
            db.execute("INSERT INTO refs VALUES (?, 'branch', 'main', ?)", (cursor.lastrowid, root))
        return True

    def repo(self, kind: str, name: str) -> int:
        """The repository's id.

        Raises:
            Refused: 404, there is none.
        """
        with self._transaction() as db:
            row = db.execute("SELECT id FROM repos WHERE kind = ? AND name = ?", (kind, name)).fetchone()
        if row is None:
            raise Refused(404, f"no {kind} repository {name}", "RepoNotFound")
        return int(row[0])

    def resolve(self, repo: int, revision: str) -> str:
        """The commit that a branch, a tag or a full commit sha names.

        Raises:
            Refused: 404, nothing does.
        """
        with self._transaction() as db:
            return self._resolve(db, repo, revision)

    def refs(self, repo: int, kind: str) -> list[tuple[str, str]]:
        """``(name, commit)`` of every branch or tag, by name."""
        with self._transaction() as db:
            rows = db.execute("SELECT name, sha FROM refs WHERE repo = ? AND kind = ? ORDER BY name", (repo, kind))
            return [(str(name), str(sha)) for name, sha in rows]

    def create_ref(self, repo: int, kind: str, name: str, revision: str) -> None:
        """Make a branch or a tag: put-if-absent.

        Raises:
            Refused: 409, it exists; 404, the revision does not.
        """
        with self._transaction() as db:
            sha = self._resolve(db, repo, revision)
            if db.execute("SELECT 1 FROM refs WHERE repo = ? AND kind = ? AND name = ?", (repo, kind, name)).fetchone():
                raise Refused(409, f"{kind} {name} already exists")
            db.execute("INSERT INTO refs VALUES (?, ?, ?, ?)", (repo, kind, name, sha))

    def delete_ref(self, repo: int, kind: str, name: str) -> None:
        """Delete a branch or a tag.

        Raises:
            Refused: 404, there is none; 400, it is `main`.
        """
        if (kind, name) == ("branch", "main"):
            raise Refused(400, "branch main cannot be deleted")
        with self._transaction() as db:
            cursor = db.execute("DELETE FROM refs WHERE repo = ? AND kind = ? AND name = ?", (repo, kind, name))
            if not cursor.rowcount:
                raise Refused(404, f"no {kind} {name}", "RevisionNotFound")

    # Commits and trees

    def history(self, repo: int, sha: str) -> list[Commit]:
        """The commit and its ancestors, newest first."""
        query = _CHAIN + (
            "SELECT c.sha, c.parent, c.title, c.message, c.created FROM chain JOIN commits c"
            " ON c.sha = chain.sha AND c.repo = :repo ORDER BY depth"
        )
        with self._transaction() as db:
            rows = db.execute(query, {"repo": repo, "sha": sha}).fetchall()
        return [
            Commit(sha=sha, parent=parent or "", title=title, message=message, created=created)
            for sha, parent, title, message, created in rows
        ]

    def tree(self, repo: int, sha: str) -> dict[str, Entry]:
        """Every file of a commit, by path in order."""
        with self._transaction() as db:
            return self._tree(db, repo, sha)

    def entry(self, repo: int, sha: str, path: str) -> Entry:
        """One file of a commit.

        Raises:
            Refused: 404, there is none.
        """
        with self._transaction() as db:
            found = self._tree(db, repo, sha, path)
        if path not in found:
            raise Refused(404, f"no file {path!r} at {sha}", "EntryNotFound")
        return found[path]

    def commit(
        self, repo: int, branch: str, changes: Iterable[Change], *, title: str, message: str, parent: str
    ) -> str:
        """Put one commit on a branch; returns its sha.

        Args:
            parent: when given, the branch's head must be this commit (a prefix will do).

        Raises:
            Refused: 404, no such branch or file to delete; 412, the head is another; 400, a blob is missing.
        """
        with self._transaction() as db:
            row = db.execute("SELECT sha FROM refs WHERE repo = ? AND kind = 'branch' AND name = ?", (repo, branch))
            found = row.fetchone()
            if found is None:
                raise Refused(404, f"no branch {branch}", "RevisionNotFound")
            head = str(found[0])
            if not head.startswith(parent):
                raise Refused(412, f"the head of {branch} is {head}, not {parent}: a commit has happened since")
            resolved = self._resolve_changes(db, repo, head, list(changes))
            sha = self._insert_commit(db, repo, head, title, message, resolved.values())
            db.execute("UPDATE refs SET sha = ? WHERE repo = ? AND kind = 'branch' AND name = ?", (sha, repo, branch))
        return sha

    def squash(self, repo: int, branch: str, title: str) -> None:
        """Replace a branch's history by one commit of the same tree.

        Raises:
            Refused: 404, no such branch.
        """
        if branch not in dict(self.refs(repo, "branch")):
            raise Refused(404, f"no branch {branch}", "RevisionNotFound")
        with self._transaction() as db:
            tree = self._tree(db, repo, self._resolve(db, repo, branch))
            changes = [Change(path=entry.path, entry=entry) for entry in tree.values()]
            sha = self._insert_commit(db, repo, "", title, "", changes)
            db.execute("UPDATE refs SET sha = ? WHERE repo = ? AND kind = 'branch' AND name = ?", (sha, repo, branch))

    # Blobs

    def has_blob(self, sha256: str, size_bytes: int) -> bool:
        """Whether the blob is here; if so, collection spares it for a while."""
        with self._transaction() as db:
            if self.blobs.size_bytes(sha256) != size_bytes:
                return False
            self._spare(db, sha256)
        return True

    def spare(self, sha256: str) -> None:
        """Keep collection off a blob that is about to be stored or committed."""
        with self._transaction() as db:
            self._spare(db, sha256)

    def put_file(self, path: str, data: bytes) -> Entry:
        """Store a small file's bytes; the entry is for a commit soon after."""
        self.spare(hashlib.sha256(data).hexdigest())
        return entry_of(path, self.blobs.put(data), len(data), data=data)

    def collect(self) -> tuple[int, int]:
        """Drop commits that no branch or tag reaches, and the blobs that only they held.

        Returns:
            ``(blobs removed, bytes freed)``.
        """
        reachable = (
            "WITH RECURSIVE live (repo, sha) AS (SELECT repo, sha FROM refs UNION"
            " SELECT commits.repo, commits.parent FROM commits JOIN live USING (repo, sha) WHERE parent != '')"
        )
        with self._lock:
            with self._transaction() as db:
                for table in ("changes", "commits"):
                    db.execute(f"{reachable} DELETE FROM {table} WHERE (repo, sha) NOT IN live")
                db.execute("DELETE FROM pending WHERE since <= ?", (self._clock() - PENDING_GRACE_S,))
                rows = db.execute("SELECT blob FROM changes WHERE blob IS NOT NULL UNION SELECT blob FROM pending")
                needed = {str(blob) for (blob,) in rows}
            # Rows first, files second: a kill in between leaves files that nothing names, which the next
            # collection finds, and never a name without its file.
            doomed = [blob for blob in self.blobs.names() if blob not in needed]
            return len(doomed), sum(self.blobs.remove(blob) for blob in doomed)

    def _spare(self, db: sqlite3.Connection, sha256: str) -> None:
        db.execute("INSERT OR REPLACE INTO pending VALUES (?, ?)", (sha256, self._clock()))

    # Inside a transaction

    def _resolve(self, db: sqlite3.Connection, repo: int, revision: str) -> str:
        row = db.execute(
            "SELECT sha FROM refs WHERE repo = :repo AND name = :rev UNION ALL"
            " SELECT sha FROM commits WHERE repo = :repo AND sha = :rev LIMIT 1",
            {"repo": repo, "rev": revision},
        ).fetchone()
        if row is None:
            raise Refused(404, f"no revision {revision}", "RevisionNotFound")
        return str(row[0])

    def _tree(self, db: sqlite3.Connection, repo: int, sha: str, path: str | None = None) -> dict[str, Entry]:
        # SQLite takes the bare columns from the row that MIN picked: the change nearest to the head.
        query = _CHAIN + (
            "SELECT path, blob, size, git_oid, lfs, MIN(depth) FROM chain CROSS JOIN changes"
            " ON changes.sha = chain.sha AND changes.repo = :repo"
            + (" AND path = :path" if path is not None else "")
            + " GROUP BY path ORDER BY path"
        )
        rows = db.execute(query, {"repo": repo, "sha": sha, "path": path})
        return {
            name: Entry(path=name, blob=blob, size_bytes=size, git_oid=git_oid, lfs=bool(lfs))
            for name, blob, size, git_oid, lfs, _ in rows
            if blob is not None
        }

    def _resolve_changes(
        self, db: sqlite3.Connection, repo: int, head: str, changes: list[Change]
    ) -> dict[str, Change]:
        # Only deletions ask what is there: additions to a long history stay cheap.
        tree = self._tree(db, repo, head) if any(change.entry is None for change in changes) else {}
        resolved: dict[str, Change] = {}
        for change in changes:
            if change.entry is not None:
                if self.blobs.size_bytes(change.entry.blob) != change.entry.size_bytes:
                    raise Refused(400, f"{change.path}: its {change.entry.size_bytes} bytes were not uploaded")
                resolved[change.path] = change
                continue
            prefix = change.path.rstrip("/") + "/"
            gone = [path for path in tree if path == change.path or (change.folder and path.startswith(prefix))]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {change.path}", "EntryNotFound")
            # A file that the same commit adds stays.
            resolved.update({path: Change(path=path) for path in gone if path not in resolved})
        return resolved

    def _insert_commit(
        self, db: sqlite3.Connection, repo: int, parent: str, title: str, message: str, changes: Iterable[Change]
    ) -> str:
        sha = secrets.token_hex(20)
        db.execute("INSERT INTO commits VALUES (?, ?, ?, ?, ?, ?)", (repo, sha, parent, title, message, self._clock()))
        for change in changes:
            entry = change.entry
            row = (entry.blob, entry.size_bytes, entry.git_oid, entry.lfs) if entry else (None, 0, "", False)
            db.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?)", (repo, sha, change.path, *row))
            if entry:
                db.execute("DELETE FROM pending WHERE blob = ?", (entry.blob,))
        return sha


def _identity(row_id: int | None) -> int:
    if row_id is None:
        raise RuntimeError("SQLite gave no row id")
    return row_id
