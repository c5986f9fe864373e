"""A model store in memory: what the contract means with nothing around it. For tests of whoever uses a store."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from hivetrain.errors import HubConflict, HubNotFound, IntegrityError
from hivetrain.hub.store import (
    MAX_ARTEFACT_BYTES,
    always,
    check_files,
    epochs_to_drop,
    fetch_verified,
    genesis_base,
    make_ref,
    verified,
    verified_manifest,
)
from hivetrain.manifest import MANIFEST_NAME, Manifest, Ref


class MemoryStore:
    """`ModelStore` and `ArtefactStore` of one process. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commits: dict[str, dict[str, bytes]] = {}
        self._tags: dict[int, str] = {}
        self._artefacts: dict[tuple[str, str], dict[str, bytes]] = {}

    def publish(
        self, manifest: Manifest, files: Mapping[str, bytes | Path], before_tag: Callable[[], None] = always
    ) -> Ref:
        """See `ModelStore.publish`."""
        check_files(manifest, files)
        tree = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
        tree[MANIFEST_NAME] = manifest.to_bytes()
        commit = hashlib.sha1(tree[MANIFEST_NAME], usedforsecurity=False).hexdigest()
        before_tag()
        with self._lock:
            if manifest.epoch not in self._tags:
                self._commits[commit] = tree
                self._tags[manifest.epoch] = commit
        ref = self.resolve(manifest.epoch)
        if ref is None or ref.manifest.nonce != manifest.nonce:
            raise HubConflict(f"epoch {manifest.epoch} was published by somebody else")
        return ref

    def latest(self) -> Ref | None:
        """See `ModelStore.latest`."""
        epochs = self.epochs()
        return self.resolve(epochs[-1]) if epochs else None

    def resolve(self, epoch: int) -> Ref | None:
        """See `ModelStore.resolve`."""
        with self._lock:
            commit = self._tags.get(epoch)
            if commit is None:
                return None
            return make_ref(epoch, commit, self._commits[commit][MANIFEST_NAME])

    def epochs(self) -> list[int]:
        """See `ModelStore.epochs`."""
        with self._lock:
            return sorted(self._tags)

    def fetch(self, ref: Ref, names: Iterable[str], dest: Path) -> dict[str, Path]:
        """See `ModelStore.fetch`."""
        return {name: fetch_verified(ref, name, dest, partial(self._stream, ref, name)) for name in names}

    def _stream(self, ref: Ref, name: str) -> Iterator[bytes]:
        yield self._bytes(ref, name)

    def read(self, ref: Ref, name: str) -> bytes:
        """See `ModelStore.read`."""
        if name == MANIFEST_NAME:
            return verified_manifest(ref, self._bytes(ref, name))
        return b"".join(verified(ref, name, self._stream(ref, name)))

    def clear(self, epoch: int, why_false: Callable[[Manifest], str | None]) -> str | None:
        """See `ModelStore.clear`."""
        ref = self.resolve(epoch)
        why = why_false(ref.manifest) if ref is not None else None
        with self._lock:
            if ref is not None and why is not None and self._tags.get(epoch) == ref.commit:
                del self._tags[epoch]
        return why

    def prune(self, keep: int, base_epoch: Callable[[int], int] = genesis_base, newest: int | None = None) -> list[int]:
        """See `ModelStore.prune`."""
        with self._lock:
            dropped = epochs_to_drop(self._tags, keep, base_epoch, newest)
            for epoch in dropped:
                del self._commits[self._tags.pop(epoch)]
        return dropped

    def publish_artefacts(self, repo: str, branch: str, files: Mapping[str, bytes]) -> str:
        """See `ArtefactStore.publish_artefacts`."""
        with self._lock:
            tree = self._artefacts.setdefault((repo, branch), {})
            tree.update(files)
            return hashlib.sha1(repr(sorted(tree.items())).encode(), usedforsecurity=False).hexdigest()

    def read_artefact(self, repo: str, branch: str, path: str, max_bytes: int = MAX_ARTEFACT_BYTES) -> bytes:
        """See `ArtefactStore.read_artefact`."""
        with self._lock:
            try:
                data = self._artefacts[repo, branch][path]
            except KeyError as exc:
                raise HubNotFound(f"no {path} on {branch} of {repo}") from exc
        if len(data) > max_bytes:
            raise IntegrityError(f"{path} has {len(data)} bytes, the limit is {max_bytes}")
        return data

    def list_artefacts(self, repo: str, branch: str, folder: str) -> list[str]:
        """See `ArtefactStore.list_artefacts`."""
        with self._lock:
            paths = self._artefacts.get((repo, branch), {})
            return sorted(path for path in paths if path.startswith(f"{folder}/"))

    def corrupt(self, ref: Ref, name: str) -> None:
        """Flip one bit of a stored file, as a bad disk would."""
        with self._lock:
            data = bytearray(self._commits[ref.commit][name])
            data[0] ^= 1
            self._commits[ref.commit][name] = bytes(data)

    def _bytes(self, ref: Ref, name: str) -> bytes:
        with self._lock:
            try:
                return self._commits[ref.commit][name]
            except KeyError as exc:
                raise HubNotFound(f"no {name} in epoch {ref.epoch}: it was pruned") from exc
