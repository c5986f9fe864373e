"""The manifest: canonical bytes, what is signed, and what is refused."""

from __future__ import annotations

import pytest

from hivetrain.errors import IntegrityError
from hivetrain.manifest import MAX_MANIFEST_BYTES, Manifest, Ref, epoch_tag, parse_manifest, state_message


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "run_id": "1" * 64,
        "epoch": 3,
        "round": 5,
        "parent": "2" * 64,
        "schema_hash": "3" * 64,
        "state_hash": "4" * 64,
        "files": {"a": {"sha256": "5" * 64, "size_bytes": 1}},
        "members": ("alice",),
        "weights": {"alice": 200.0},
        "val_loss": 5.5,
        "block": 9,
        "nonce": "n" * 16,
        "leader": "victor",
    }
    return Manifest.model_validate(fields | changes)


def test_manifest_survives_a_round_trip_with_the_same_hash() -> None:
    one = manifest()
    again = parse_manifest(one.to_bytes())
    assert again == one
    assert again.sha256() == one.sha256()


def test_the_leader_signs_everything_but_its_own_signature() -> None:
    one = manifest()
    signed = one.model_copy(update={"leader_signature": "ab"})
    assert signed.signed_bytes() == one.signed_bytes()
    assert signed.sha256() != one.sha256()
    assert manifest(val_loss=5.4).signed_bytes() != one.signed_bytes()
    assert manifest(signatures={"alice": "cd"}).signed_bytes() != one.signed_bytes()


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'{"version": 2}', manifest().to_bytes().replace(b'"epoch":3', b'"epoch":-3')],
)
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse_manifest(raw)


@pytest.mark.parametrize(
    "text", [b'"val_loss":NaN', b'"val_loss":Infinity', b'"weights":{"alice":-1.0},"val_loss":5.5']
)
def test_a_value_that_is_not_finite_or_negative_is_refused(text: bytes) -> None:
    raw = manifest(weights={}).to_bytes().replace(b'"weights":{}', b'"weights":{"alice":1.0}')
    assert parse_manifest(raw)
    if b"weights" in text:
        raw = raw.replace(b'"weights":{"alice":1.0}', b'"weights":{"alice":-1.0}')
    else:
        raw = raw.replace(b'"val_loss":5.5', text)
    with pytest.raises(IntegrityError):
        parse_manifest(raw)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(IntegrityError, match="not a manifest"):
        parse_manifest(manifest().to_bytes().replace(b'"epoch":3', b'"epoch":3,"extra":1'))


def test_an_oversized_manifest_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(IntegrityError, match="the limit is"):
        parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1))


def test_a_member_signs_run_round_attempt_and_state() -> None:
    messages = {
        state_message("1" * 64, 5, 0, "4" * 64),
        state_message("2" * 64, 5, 0, "4" * 64),
        state_message("1" * 64, 6, 0, "4" * 64),
        state_message("1" * 64, 5, 1, "4" * 64),
        state_message("1" * 64, 5, 0, "5" * 64),
    }
    assert len(messages) == 5


def test_a_ref_knows_the_hash_of_its_manifest() -> None:
    one = manifest()
    assert Ref(epoch=3, commit="c", manifest=one).manifest_sha256 == one.sha256()
    assert epoch_tag(42) == "epoch-000042"
