"""Epochs, artefacts, data sets and snapshots on a model hub.

What the hub's client leaves undone is done here: digests are checked (it checks sizes only), and a commit is
read back (it reports success when it dropped an operation as "unchanged", and a broken connection does not say
whether the commit happened).
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from hivetrain.errors import DataError, HubConflict, HubError, HubNotFound, IntegrityError
from hivetrain.hub.dataset import RangeFile
from hivetrain.hub.remote import HubExists, HubTransient, RemoteFile, RemoteRepo
from hivetrain.hub.store import (
    MAX_ARTEFACT_BYTES,
    always,
    check_files,
    check_name,
    checked,
    epochs_to_drop,
    fetch_verified,
    genesis_base,
    make_ref,
    parse_epoch_tag,
    verified,
    verified_manifest,
    write_atomically,
)
from hivetrain.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, Ref, epoch_tag

SNAPSHOT_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")
FORBIDDEN_PATTERNS = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
"""Never downloaded, whatever the caller asks for: code, and formats that can hold pickles."""

LOOK_AGAIN_S = 1.0
"""How long a tag must have been seen before a commit without a manifest tells anything: a hub may show a tag first."""

_STAGING = "staging-"

logger = logging.getLogger(__name__)


class HubStore:
    """`ModelStore` and `ArtefactStore` on a hub. Any thread may call it.

    Each epoch is one commit on a staging branch that is cut from the repository's first commit, is tagged, and
    then loses the branch. So an epoch's history holds no other epoch, and deleting its tag frees its space.

    Args:
        clock, sleep: in seconds; for the second look at a tag that seems to hold nothing.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        repo: str,
        token: str | None = None,
        timeout_s: float = 60,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._remote = RemoteRepo(endpoint, "model", repo, token, timeout_s)
        self._first_commit = ""
        self._clock = clock
        self._sleep = sleep
        self._tagged_since: dict[str, float] = {}  # commits that `clear` saw tagged, and since when

    def publish(
        self, manifest: Manifest, files: Mapping[str, bytes | Path], before_tag: Callable[[], None] = always
    ) -> Ref:
        """See `ModelStore.publish`."""
        check_files(manifest, files)
        # Named by the nonce, so that a retry finds what an earlier attempt did.
        branch = f"{_STAGING}{epoch_tag(manifest.epoch)}-{hashlib.sha256(manifest.nonce.encode()).hexdigest()[:12]}"
        try:
            return self._remote.retry(lambda: self._publish_once(manifest, files, branch, before_tag))
        finally:
            self._drop_branch(branch)

    def _publish_once(
        self, manifest: Manifest, files: Mapping[str, bytes | Path], branch: str, before_tag: Callable[[], None]
    ) -> Ref:
        published = self._ours(manifest)
        if published is not None:
            return published
        raw = manifest.to_bytes()
        commit = self._staged_commit(branch, {**files, MANIFEST_NAME: raw}, raw)
        self._check_commit(commit, manifest, raw)
        before_tag()
        try:
            self._remote.create_tag(epoch_tag(manifest.epoch), commit)
        except HubExists as exc:
            published = self._ours(manifest)
            if published is None:
                raise HubConflict(f"epoch {manifest.epoch} was published by somebody else, and pruned") from exc
            return published
        return make_ref(manifest.epoch, commit, raw)

    def _staged_commit(self, branch: str, files: Mapping[str, bytes | Path], raw_manifest: bytes) -> str:
        first = self._first()
        self._remote.create_branch(branch, first)
        with contextlib.suppress(HubNotFound):
            if self._remote.read(branch, MANIFEST_NAME, MAX_MANIFEST_BYTES) == raw_manifest:
                return self._remote.commit_of(branch)
        return self._remote.commit(branch, files, branch.removeprefix(_STAGING), parent=first)

    def _check_commit(self, commit: str, manifest: Manifest, raw_manifest: bytes) -> None:
        if self._remote.read(commit, MANIFEST_NAME, MAX_MANIFEST_BYTES) != raw_manifest:
            raise HubTransient(f"commit {commit} of {self._remote.repo} does not hold the manifest that was sent")
        there = {file.path: file for file in self._remote.files(commit)}
        for name, entry in manifest.files.items():
            file = there.get(name)
            if file is None or file.size_bytes != entry.size_bytes or file.sha256 not in ("", entry.sha256):
                raise HubTransient(f"commit {commit} of {self._remote.repo} does not hold {name} as it was sent")

    def _ours(self, manifest: Manifest) -> Ref | None:
        try:
            published = self._find(manifest.epoch)
        except IntegrityError as exc:
            raise HubConflict(f"epoch {manifest.epoch} is taken by something that is no manifest") from exc
        if published is not None and published.manifest.nonce != manifest.nonce:
            raise HubConflict(
                f"epoch {manifest.epoch} was published by {published.manifest.leader}, in round"
                f" {published.manifest.round}; ours is of {manifest.leader}, round {manifest.round}"
            )
        return published

    def _first(self) -> str:
        if not self._first_commit:
            try:
                self._first_commit = self._remote.first_commit()
            except HubNotFound:
                self._remote.create()
                self._first_commit = self._remote.first_commit()
        return self._first_commit

    def _drop_branch(self, branch: str) -> None:
        try:
            self._remote.delete_branch(branch)
        except HubNotFound:
            pass
        except HubError as exc:
            logger.warning("a staging branch stays until the next prune: %s", exc)

    def latest(self) -> Ref | None:
        """See `ModelStore.latest`."""
        return self._remote.retry(lambda: self._find(None))

    def resolve(self, epoch: int) -> Ref | None:
        """See `ModelStore.resolve`."""
        return self._remote.retry(lambda: self._find(epoch))

    def epochs(self) -> list[int]:
        """See `ModelStore.epochs`."""
        return sorted(self._remote.retry(self._tags))

    def _find(self, epoch: int | None) -> Ref | None:
        """One epoch, or the newest, in one attempt."""
        tags = self._tags()
        if epoch is None:
            epoch = max(tags, default=-1)
        if epoch not in tags:
            return None
        return make_ref(epoch, tags[epoch], self._remote.read(tags[epoch], MANIFEST_NAME, MAX_MANIFEST_BYTES))

    def _tags(self) -> dict[int, str]:
        """Epoch to commit, in one attempt."""
        try:
            tags = self._remote.tags()
        except HubNotFound:
            return {}
        pairs = ((parse_epoch_tag(name), commit) for name, commit in tags.items())
        return {epoch: commit for epoch, commit in pairs if epoch is not None}

    def fetch(self, ref: Ref, names: Iterable[str], dest: Path) -> dict[str, Path]:
        """See `ModelStore.fetch`."""
        return {name: self._fetch_one(ref, name, dest) for name in names}

    def _fetch_one(self, ref: Ref, name: str, dest: Path) -> Path:
        def stream() -> Iterator[bytes]:
            return self._remote.stream(ref.commit, name)

        return self._remote.retry(lambda: fetch_verified(ref, name, dest, stream))

    def read(self, ref: Ref, name: str) -> bytes:
        """See `ModelStore.read`."""
        if name == MANIFEST_NAME:
            raw = self._remote.retry(lambda: self._remote.read(ref.commit, MANIFEST_NAME, MAX_MANIFEST_BYTES))
            return verified_manifest(ref, raw)
        return self._remote.retry(lambda: b"".join(verified(ref, name, self._remote.stream(ref.commit, name))))

    def clear(self, epoch: int, why_false: Callable[[Manifest], str | None]) -> str | None:
        """See `ModelStore.clear`."""
        return self._remote.retry(lambda: self._clear_once(epoch, why_false))

    def _clear_once(self, epoch: int, why_false: Callable[[Manifest], str | None]) -> str | None:
        tags, now = self._tags(), self._clock()
        since = {commit: self._tagged_since.get(commit, now) for commit in tags.values()}
        self._tagged_since = since  # another thread's `clear` may replace it any time
        commit = tags.get(epoch)
        if commit is None:
            return None
        try:
            raw = self._read_manifest(commit, since[commit] + LOOK_AGAIN_S)
            why = why_false(make_ref(epoch, commit, raw).manifest)
        except (IntegrityError, HubNotFound) as exc:
            why = str(exc)
        # The hub deletes a tag whatever it points at: somebody else may have put the right one meanwhile.
        if why is not None and self._tags().get(epoch) == commit:
            with contextlib.suppress(HubNotFound):
                self._remote.delete_tag(epoch_tag(epoch))
        return why

    def _read_manifest(self, commit: str, sure_at: float) -> bytes:
        """A commit's manifest; where there is none before ``sure_at``, once more then.

        All tags wait for it together: many false ones hold a publisher up no longer than one.
        """
        try:
            return self._remote.read(commit, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except HubNotFound:
            left_s = sure_at - self._clock()
            if left_s <= 0:
                raise
        self._sleep(left_s)
        return self._remote.read(commit, MANIFEST_NAME, MAX_MANIFEST_BYTES)

    def prune(self, keep: int, base_epoch: Callable[[int], int] = genesis_base, newest: int | None = None) -> list[int]:
        """See `ModelStore.prune`. The production hub itself decides when it gives the space back."""
        tags = self._remote.retry(self._tags)
        dropped = epochs_to_drop(tags, keep, base_epoch, newest)
        for epoch in dropped:
            self._drop_tag(epoch_tag(epoch))
        if tags:
            self._drop_stale_branches(max(tags) if newest is None else newest)
            freed = self._remote.retry(self._remote.collect)
            if dropped:
                logger.info("pruned %d epochs, freed %s bytes", len(dropped), "unknown" if freed is None else freed)
        return dropped

    def _drop_tag(self, tag: str) -> None:
        with contextlib.suppress(HubNotFound):  # another pruner was faster
            self._remote.retry(lambda: self._remote.delete_tag(tag))

    def _drop_stale_branches(self, newest: int) -> None:
        for branch in self._remote.retry(self._remote.branches):
            epoch = parse_epoch_tag(branch.removeprefix(_STAGING).rpartition("-")[0])
            # Whoever still publishes an epoch that is tagged has lost: it needs its branch no more.
            if branch.startswith(_STAGING) and epoch is not None and epoch <= newest:
                self._drop_branch(branch)

    def publish_artefacts(self, repo: str, branch: str, files: Mapping[str, bytes]) -> str:
        """See `ArtefactStore.publish_artefacts`."""
        remote = self._remote.of(repo)

        def action() -> str:
            try:
                return remote.commit(branch, files, f"{len(files)} artefacts")
            except HubNotFound:
                remote.create()
                remote.create_branch(branch)
                return remote.commit(branch, files, f"{len(files)} artefacts")

        return remote.retry(action)

    def read_artefact(self, repo: str, branch: str, path: str, max_bytes: int = MAX_ARTEFACT_BYTES) -> bytes:
        """See `ArtefactStore.read_artefact`."""
        remote = self._remote.of(repo)
        return remote.retry(lambda: remote.read(branch, path, max_bytes))

    def list_artefacts(self, repo: str, branch: str, folder: str) -> list[str]:
        """See `ArtefactStore.list_artefacts`."""
        remote = self._remote.of(repo)
        try:
            return sorted(file.path for file in remote.retry(lambda: remote.files(branch, folder)))
        except HubNotFound:
            return []


class HubDataset:
    """`DatasetFiles` on a hub, at one revision."""

    def __init__(
        self, endpoint: str, repo: str, revision: str, token: str | None = None, timeout_s: float = 60
    ) -> None:
        self._remote = RemoteRepo(endpoint, "dataset", repo, token, timeout_s)
        self._revision = revision or "main"

    def resolve_revision(self, revision: str = "main") -> str:
        """The commit that ``revision`` names now: what a recipe pins."""
        return self._remote.retry(lambda: self._remote.commit_of(revision))

    def list_parquet(self, config: str) -> list[tuple[str, int]]:
        """See `DatasetFiles.list_parquet`."""
        try:
            files = self._remote.retry(lambda: self._remote.files(self._revision, config))
        except HubNotFound:
            self.resolve_revision(self._revision)  # raises when it is more than the folder that is missing
            return []
        return sorted((file.path, file.size_bytes) for file in files if file.path.endswith(".parquet"))

    def open(self, path: str) -> BinaryIO:
        """See `DatasetFiles.open`."""
        size = self._remote.retry(lambda: self._remote.size_bytes(self._revision, path))
        if size is None:
            raise DataError(f"no file {path} in {self._remote.repo} at {self._revision}")
        return cast("BinaryIO", RangeFile(size, lambda start, stop: self._read_range(path, start, stop)))

    def _read_range(self, path: str, start: int, stop: int) -> bytes:
        label = f"bytes {start} to {stop} of {path}"

        def action() -> bytes:
            chunks = self._remote.stream(self._revision, path, (start, stop))
            return b"".join(checked(label, chunks, size_bytes=stop - start))

        return self._remote.retry(action)


def publish_dataset(endpoint: str, repo: str, files: Mapping[str, bytes | Path], token: str | None = None) -> str:
    """Put files on `main` of a data set, which is made when missing; returns the commit to pin.

    Raises:
        HubError: the hub did not take them.
    """
    remote = RemoteRepo(endpoint, "dataset", repo, token, timeout_s=60)

    def action() -> str:
        remote.create()
        # Safe to repeat: files that are there already make no second commit.
        return remote.commit("main", files, f"{len(files)} files")

    return remote.retry(action)


def snapshot(
    endpoint: str,
    repo: str,
    revision: str,
    dest: Path,
    token: str | None = None,
    patterns: Iterable[str] = SNAPSHOT_PATTERNS,
) -> Path:
    """Download a model or tokenizer into ``dest``, verified against the hub's own digests; returns ``dest``.

    Raises:
        HubError: the hub did not answer, or has no file that matches.
        IntegrityError: bytes or names that are not as the hub should list them.
    """
    remote = RemoteRepo(endpoint, "model", repo, token, timeout_s=60)
    patterns = tuple(patterns)
    commit = remote.retry(lambda: remote.commit_of(revision))
    files = remote.retry(lambda: remote.files(commit))
    wanted = [file for file in files if _is_wanted(file.path, patterns)]
    if not wanted:
        raise HubNotFound(f"{repo} at {revision} has no file like {', '.join(patterns)}")
    for file in wanted:
        _download(remote, commit, file, dest)
    return dest


def _is_wanted(path: str, patterns: tuple[str, ...]) -> bool:
    name = path.rpartition("/")[2].lower()
    if name.startswith(".") or any(fnmatch.fnmatch(name, pattern) for pattern in FORBIDDEN_PATTERNS):
        return False
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _download(remote: RemoteRepo, commit: str, file: RemoteFile, dest: Path) -> None:
    try:
        check_name(file.path)
    except ValueError as exc:
        raise IntegrityError(f"{remote.repo} lists a file that cannot be fetched: {exc}") from exc

    def action() -> None:
        if file.sha256:
            digest, expected = hashlib.sha256(), file.sha256
        else:
            digest, expected = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False), file.git_oid
        chunks = remote.stream(commit, file.path)
        write_atomically(
            dest / file.path,
            checked(file.path, chunks, size_bytes=file.size_bytes, digest=digest, expected=expected),
        )

    remote.retry(action)
