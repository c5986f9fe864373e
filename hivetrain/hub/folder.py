"""A copy of a run's hub in a plain folder, to be read only: what `hivetrain mirror` writes, and `hf download` can.

    FOLDER/epoch-000042/...                 the files of that tag, manifest.json among them
    FOLDER/checks/round-000042/HOTKEY.json  the files of the branch `checks`

Everything read from it is verified as if it came from the hub: a copy is worth what its signatures and digests are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from hivetrain.errors import HubError, HubNotFound, IntegrityError
from hivetrain.hub.client import HubStore
from hivetrain.hub.store import (
    MAX_ARTEFACT_BYTES,
    always,
    check_name,
    fetch_verified,
    genesis_base,
    make_ref,
    parse_epoch_tag,
    verified,
    verified_manifest,
    write_atomically,
)
from hivetrain.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, Ref, epoch_tag

_CHUNK_BYTES = 1 << 20


class FolderStore:
    """The reading half of `ModelStore` and `ArtefactStore`; repository and branch names are not looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def epochs(self) -> list[int]:
        """See `ModelStore.epochs`."""
        try:
            names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        except OSError as exc:
            raise HubError(f"cannot read {self.folder}: {exc.strerror}") from exc
        return sorted(epoch for name in names if (epoch := parse_epoch_tag(name)) is not None)

    def resolve(self, epoch: int) -> Ref | None:
        """See `ModelStore.resolve`."""
        path = self.folder / epoch_tag(epoch) / MANIFEST_NAME
        if not path.is_file():
            return None
        return make_ref(epoch, epoch_tag(epoch), self._read(path, MAX_MANIFEST_BYTES))

    def latest(self) -> Ref | None:
        """See `ModelStore.latest`."""
        epochs = self.epochs()
        return self.resolve(epochs[-1]) if epochs else None

    def fetch(self, ref: Ref, names: Iterable[str], dest: Path) -> dict[str, Path]:
        """See `ModelStore.fetch`."""
        return {name: fetch_verified(ref, name, dest, partial(self._stream, ref, name)) for name in names}

    def read(self, ref: Ref, name: str) -> bytes:
        """See `ModelStore.read`."""
        if name == MANIFEST_NAME:
            path = self.folder / epoch_tag(ref.epoch) / MANIFEST_NAME
            return verified_manifest(ref, self._read(path, MAX_MANIFEST_BYTES))
        return b"".join(verified(ref, name, self._stream(ref, name)))

    def publish(
        self, manifest: Manifest, files: Mapping[str, bytes | Path], before_tag: Callable[[], None] = always
    ) -> Ref:
        """A copy is read only.

        Raises:
            HubError: always.
        """
        raise HubError(f"{self.folder} is a copy: nothing is published into it")

    def clear(self, epoch: int, why_false: Callable[[Manifest], str | None]) -> str | None:
        """A copy keeps what it has."""
        return None

    def prune(self, keep: int, base_epoch: Callable[[int], int] = genesis_base, newest: int | None = None) -> list[int]:
        """A copy keeps what it has."""
        return []

    def read_artefact(self, repo: str, branch: str, path: str, max_bytes: int = MAX_ARTEFACT_BYTES) -> bytes:
        """See `ArtefactStore.read_artefact`."""
        return self._read(self._path(path), max_bytes)

    def list_artefacts(self, repo: str, branch: str, folder: str) -> list[str]:
        """See `ArtefactStore.list_artefacts`."""
        root = self._path(folder)
        return sorted(str(path.relative_to(self.folder)) for path in root.rglob("*") if path.is_file())

    def _path(self, name: str) -> Path:
        try:
            check_name(name)
        except ValueError as exc:
            raise HubNotFound(str(exc)) from exc
        return self.folder / name

    def _stream(self, ref: Ref, name: str) -> Iterator[bytes]:
        path = self.folder / epoch_tag(ref.epoch) / name
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        except OSError as exc:
            raise HubNotFound(f"cannot read {path}: {exc.strerror}") from exc

    def _read(self, path: Path, max_bytes: int) -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        except OSError as exc:
            raise HubNotFound(f"cannot read {path}: {exc.strerror}") from exc
        if len(content) > max_bytes:
            raise IntegrityError(f"{path} is longer than {max_bytes} bytes")
        return content


def mirror(store: HubStore, repo: str, branch: str, folder: Path) -> int:
    """Copy every epoch that the hub still has, and the files of ``branch``, into ``folder``; the number of epochs.

    What lies there already, and is right, is not downloaded again.

    Raises:
        ServiceError: the hub does not answer, or the folder cannot be written.
    """
    epochs = store.epochs()
    for epoch in epochs:
        ref = store.resolve(epoch)
        if ref is None:
            continue  # pruned meanwhile
        dest = folder / epoch_tag(epoch)
        store.fetch(ref, ref.manifest.files, dest)
        write_atomically(dest / MANIFEST_NAME, [store.read(ref, MANIFEST_NAME)])
    for path in store.list_artefacts(repo, branch, "checks"):
        try:
            check_name(path)
        except ValueError as exc:
            raise IntegrityError(f"the hub lists a file that cannot be copied: {exc}") from exc
        if not (folder / path).is_file():
            write_atomically(folder / path, [store.read_artefact(repo, branch, path)])
    return len(epochs)


__all__ = ["FolderStore", "mirror"]
