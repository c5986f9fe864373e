"""The seam to the model hub: where a run's epochs are published, found and fetched.

An epoch is one immutable set of files with its manifest, and *the tag is the publish*: `publish` puts
`epoch-000042` if it is absent, so that of two publishers of one epoch exactly one wins. Nothing that is read is
trusted before its sha256 and size are the manifest's; the manifest's own digest is on chain.

Implementations: `hivetrain.hub.client.HubStore` (production and the local server) and
`hivetrain.hub.memory.MemoryStore` (tests), under one contract suite.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from hivetrain.errors import HubError, IntegrityError
from hivetrain.manifest import MANIFEST_NAME, FileEntry, Manifest, Ref, epoch_tag, parse_manifest

MAX_ARTEFACT_BYTES = 64 << 20

_EPOCH_TAG = re.compile(r"epoch-([0-9]{6,9})")


def always() -> None:
    """Where an epoch may be tagged however long its upload took."""


def genesis_base(_epoch: int) -> int:
    """Where no merge ever replaces the base, epoch 0 holds everybody's."""
    return 0


class ModelStore(Protocol):
    """Epochs of one run. Every method may raise `HubError` when the hub does not answer rightly."""

    def publish(
        self, manifest: Manifest, files: Mapping[str, bytes | Path], before_tag: Callable[[], None] = always
    ) -> Ref:
        """Publish one epoch, whole or not at all. Publishing the same manifest again gives the same `Ref`.

        Args:
            files: exactly those that ``manifest.files`` names.
            before_tag: called when everything is uploaded; what it raises ends the publish without a tag.

        Raises:
            HubConflict: the epoch is published, with another nonce.
            ValueError: ``files`` are not what the manifest says.
        """
        ...

    def latest(self) -> Ref | None:
        """The newest published epoch, or None before the first.

        Raises:
            IntegrityError: its manifest does not parse, or is another epoch's.
        """
        ...

    def resolve(self, epoch: int) -> Ref | None:
        """One published epoch, or None; raises as `latest`."""
        ...

    def epochs(self) -> list[int]:
        """The published epochs that are still kept, ascending."""
        ...

    def fetch(self, ref: Ref, names: Iterable[str], dest: Path) -> dict[str, Path]:
        """Download files of an epoch into ``dest``. A file appears there only after it was verified.

        Returns:
            The path of each name. A file that lies there already, and is right, is not downloaded again.

        Raises:
            IntegrityError: a digest or size that is not the manifest's, or a name that it does not hold.
            HubNotFound: the epoch was pruned.
        """
        ...

    def read(self, ref: Ref, name: str) -> bytes:
        """One small file of an epoch, or its manifest; raises as `fetch`."""
        ...

    def clear(self, epoch: int, why_false: Callable[[Manifest], str | None]) -> str | None:
        """Remove the tag of an epoch that is not one; says why, or None where it stays or there is none.

        Args:
            why_false: why nobody may follow a manifest, or None. What does not parse as one is never asked about.
        """
        ...

    def prune(self, keep: int, base_epoch: Callable[[int], int] = genesis_base, newest: int | None = None) -> list[int]:
        """Drop all epochs but 0, the newest ``keep`` and their bases, and free their space; returns those dropped.

        Args:
            base_epoch: the epoch whose tag holds the base of an epoch.
            newest: tags past this epoch are nobody's, and are not looked at; None for whatever there is.

        Raises:
            ValueError: ``keep`` is below 1.
        """
        ...


class ArtefactReader(Protocol):
    """The reading half of `ArtefactStore`. Whoever reads a file verifies its signature."""

    def read_artefact(self, repo: str, branch: str, path: str, max_bytes: int = MAX_ARTEFACT_BYTES) -> bytes:
        """One file of a branch.

        Raises:
            HubNotFound: no such repository, branch or file.
            IntegrityError: longer than ``max_bytes``.
        """
        ...

    def list_artefacts(self, repo: str, branch: str, folder: str) -> list[str]:
        """Paths of the files below a folder of a branch, ascending; empty where there is no such folder."""
        ...


class ArtefactStore(ArtefactReader, Protocol):
    """Small files beside the epochs: checks, scores, receipts."""

    def publish_artefacts(self, repo: str, branch: str, files: Mapping[str, bytes]) -> str:
        """Add or replace files on a branch in one commit; makes repository and branch. Returns the commit."""
        ...


def parse_epoch_tag(tag: str) -> int | None:
    """The epoch that a tag publishes, or None for any other tag."""
    match = _EPOCH_TAG.fullmatch(tag)
    # Only the canonical spelling: "epoch-0000001" must not pass for a second epoch 1.
    return int(match[1]) if match and epoch_tag(int(match[1])) == tag else None


def make_ref(epoch: int, commit: str, raw_manifest: bytes) -> Ref:
    """The `Ref` of a manifest as it lies on the hub.

    Raises:
        IntegrityError: not a manifest, or another epoch's.
    """
    manifest = parse_manifest(raw_manifest)
    if manifest.epoch != epoch:
        raise IntegrityError(f"the tag of epoch {epoch} holds the manifest of epoch {manifest.epoch}")
    digest = hashlib.sha256(raw_manifest).hexdigest()
    return Ref(epoch=epoch, commit=commit, manifest=manifest, manifest_sha256=digest)


def check_files(manifest: Manifest, files: Mapping[str, bytes | Path]) -> None:
    """Refuse to publish what the manifest does not say.

    Raises:
        ValueError: a missing, extra, badly named or differing file.
    """
    if set(files) != set(manifest.files):
        raise ValueError(f"files are {sorted(files)}, the manifest names {sorted(manifest.files)}")
    for name, source in files.items():
        check_name(name)
        entry = manifest.files[name]
        digest, size = digest_of(source)
        if (digest, size) != (entry.sha256, entry.size_bytes):
            raise ValueError(
                f"{name} has {size} bytes of sha256 {digest}, the manifest says {entry.size_bytes} of {entry.sha256}"
            )


def check_name(name: str) -> None:
    """Refuse a name that could leave the folder it is fetched into.

    Raises:
        ValueError: absolute, climbing, hidden, or the manifest's own.
    """
    parts = name.split("/")
    if name == MANIFEST_NAME or "\\" in name or not name.isprintable() or len(name) > 255:
        raise ValueError(f"not a name for a published file: {name!r}")
    if any(not part or part.startswith(".") for part in parts):
        raise ValueError(f"a published file's name is a plain relative path, got {name!r}")


def digest_of(source: bytes | Path) -> tuple[str, int]:
    """``(sha256, size in bytes)`` of bytes or of a file."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest(), len(source)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def fetch_verified(ref: Ref, name: str, dest: Path, stream: Callable[[], Iterator[bytes]]) -> Path:
    """Write one file of an epoch to ``dest / name``, unless it lies there already; returns the path.

    Args:
        stream: starts the download.

    Raises:
        IntegrityError: the manifest does not name the file, or the bytes are others.
        HubError: ``dest`` cannot be written.
    """
    entry = _entry(ref, name)
    target = dest / name
    if not (target.is_file() and digest_of(target) == (entry.sha256, entry.size_bytes)):
        write_atomically(target, verified(ref, name, stream()))
    return target


def verified(ref: Ref, name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass the chunks of a published file on; raises as `checked`, or when the manifest does not name it."""
    entry = _entry(ref, name)
    label = f"{name} of epoch {ref.epoch}"
    return checked(label, chunks, size_bytes=entry.size_bytes, digest=hashlib.sha256(), expected=entry.sha256)


def checked(
    label: str, chunks: Iterable[bytes], *, size_bytes: int, digest: hashlib._Hash | None = None, expected: str = ""
) -> Iterator[bytes]:
    """Pass ``chunks`` on, and raise as soon as they are too long, or after the last if they are not the right ones.

    Args:
        digest: a fresh hash whose hex digest must become ``expected``; None checks the size alone.

    Raises:
        IntegrityError: another size or digest.
    """
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if received > size_bytes:
            raise IntegrityError(f"{label} is longer than the {size_bytes} bytes published")
        if digest is not None:
            digest.update(chunk)
        yield chunk
    found = digest.hexdigest() if digest is not None else ""
    if received != size_bytes or found != expected:
        raise IntegrityError(
            f"{label} has {received} bytes of digest {found}, published were {size_bytes} of {expected}"
        )


def write_atomically(target: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that appears under its name only when ``chunks`` came to a good end.

    Raises:
        HubError: the folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as exc:
        raise HubError(f"cannot write {target}: {exc.strerror}") from exc


def verified_manifest(ref: Ref, raw: bytes) -> bytes:
    """``raw`` when it is the manifest that ``ref`` names.

    Raises:
        IntegrityError: it is another.
    """
    digest = hashlib.sha256(raw).hexdigest()
    if digest != ref.manifest_sha256:
        raise IntegrityError(f"manifest of epoch {ref.epoch} has sha256 {digest}, expected {ref.manifest_sha256}")
    return raw


def epochs_to_drop(
    epochs: Iterable[int], keep: int, base_epoch: Callable[[int], int] = genesis_base, newest: int | None = None
) -> list[int]:
    """All up to ``newest`` but epoch 0, the newest ``keep`` and the epochs that hold their bases, ascending.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    ascending = sorted(epoch for epoch in epochs if newest is None or epoch <= newest)
    bases = {base_epoch(epoch) for epoch in ascending[-keep:]}
    return [epoch for epoch in ascending[:-keep] if epoch != 0 and epoch not in bases]


def _entry(ref: Ref, name: str) -> FileEntry:
    try:
        check_name(name)
        return ref.manifest.files[name]
    except (KeyError, ValueError) as exc:
        raise IntegrityError(f"the manifest of epoch {ref.epoch} names no file {name!r}") from exc
