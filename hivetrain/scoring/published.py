"""Reading what validators published of a round, from the hub or from a copy of it.

Whoever holds the hub's token can put files beside theirs, so those who are known are asked for by name first.
"""

from __future__ import annotations

from collections.abc import Collection

from hivetrain.errors import HivetrainError, HubNotFound, IntegrityError
from hivetrain.hub.store import MAX_ARTEFACT_BYTES, ArtefactReader
from hivetrain.identity import Verify
from hivetrain.scoring.record import (
    CHECKS_BRANCH,
    MAX_RECORD_BYTES,
    RoundRecord,
    parse_record,
    parse_record_path,
    record_folder,
    record_path,
)

MAX_STRANGERS = 64
"""Records of hotkeys that nobody knows for validators: of more than so many the rest is not read."""


class ReadLimit(HivetrainError):
    """More would have to be read than the reader is ready to: nothing follows from what was not read."""


class BoundedReader:
    """An `ArtefactReader` that reads so many files and bytes of another one, and lists each folder once.

    Args:
        max_files: looks at a file, those that find none included.
        max_bytes: of all files together.
    """

    def __init__(self, store: ArtefactReader, *, max_files: int, max_bytes: int) -> None:
        self._store = store
        self._files_left = max_files
        self._bytes_left = max_bytes
        self._words = f"{max_files} files and {max_bytes >> 20} MiB"
        self._listed: dict[tuple[str, str, str], list[str]] = {}

    def read_artefact(self, repo: str, branch: str, path: str, max_bytes: int = MAX_ARTEFACT_BYTES) -> bytes:
        """See `ArtefactReader.read_artefact`.

        Raises:
            ReadLimit: this file is past the bound.
        """
        allowed = min(max_bytes, self._bytes_left)
        if self._files_left < 1 or allowed < 1:
            raise ReadLimit(f"{self._words} are read, and no more")
        self._files_left -= 1
        try:
            raw = self._store.read_artefact(repo, branch, path, allowed)
        except IntegrityError as exc:
            self._bytes_left -= allowed
            if allowed < max_bytes:
                raise ReadLimit(f"{self._words} are read, and no more") from exc
            raise
        self._bytes_left -= len(raw)
        return raw

    def list_artefacts(self, repo: str, branch: str, folder: str) -> list[str]:
        """See `ArtefactReader.list_artefacts`; what lies there the first time."""
        key = (repo, branch, folder)
        if key not in self._listed:
            self._listed[key] = self._store.list_artefacts(*key)
        return self._listed[key]


def read_records(
    store: ArtefactReader,
    repo: str,
    round_number: int,
    verify: Verify,
    validators: Collection[str] = (),
    strangers: bool = True,
) -> tuple[list[RoundRecord], dict[str, str]]:
    """Every validator's record of one round, and why some are refused, by validator.

    Args:
        validators: those that are known; they are read by their names, however much else lies there.
        strangers: whether to list what else lies there.

    Raises:
        HubError: the hub does not answer.
    """
    records: list[RoundRecord] = []
    refused: dict[str, str] = {}
    names = sorted(validators)
    if strangers:
        named = (
            parse_record_path(path) for path in store.list_artefacts(repo, CHECKS_BRANCH, record_folder(round_number))
        )
        others = sorted({one[1] for one in named if one is not None and one[0] == round_number} - set(names))
        names += others[:MAX_STRANGERS]
    for validator in names:
        if parse_record_path(record_path(round_number, validator)) is None:
            continue  # no hotkey: nobody can have a record under it
        try:
            records.append(read_record(store, repo, round_number, validator, verify))
        except HubNotFound:
            continue
        except IntegrityError as exc:
            refused[validator] = str(exc)
    return records, refused


def read_record(store: ArtefactReader, repo: str, round_number: int, validator: str, verify: Verify) -> RoundRecord:
    """One validator's record of one round.

    Raises:
        HubNotFound: there is none.
        IntegrityError: it is not its own.
        HubError: the hub does not answer.
    """
    raw = store.read_artefact(repo, CHECKS_BRANCH, record_path(round_number, validator), MAX_RECORD_BYTES)
    return parse_record(raw, validator=validator, round_number=round_number, verify=verify)
