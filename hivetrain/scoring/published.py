"""Reading what validators published of a round, from the hub or from a copy of it."""

from __future__ import annotations

from hivetrain.errors import IntegrityError
from hivetrain.hub.store import ArtefactReader
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

MAX_RECORDS = 64
"""Validators of one subnet: what else lies there is not read."""


def read_records(
    store: ArtefactReader, repo: str, round_number: int, verify: Verify
) -> tuple[list[RoundRecord], dict[str, str]]:
    """Every validator's record of one round, and why some are refused, by validator.

    Raises:
        HubError: the hub does not answer.
    """
    records: list[RoundRecord] = []
    refused: dict[str, str] = {}
    for path in store.list_artefacts(repo, CHECKS_BRANCH, record_folder(round_number))[: 16 * MAX_RECORDS]:
        named = parse_record_path(path)
        if named is None or len(records) + len(refused) >= MAX_RECORDS:
            continue
        try:
            records.append(read_record(store, repo, round_number, named[1], verify))
        except IntegrityError as exc:
            refused[named[1]] = str(exc)
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
