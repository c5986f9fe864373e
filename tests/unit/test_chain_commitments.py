"""A commitment's bytes as chain fields, and back from what the SDK's codec shows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from template.chain.commitments import decode_fields, encode_fields


def shown(fields: list[dict[str, str]]) -> dict[str, Any]:
    """The record as the codec decodes it: fixed bytes as hex, BigRaw as text where it is UTF-8."""
    out: list[Any] = []
    for field in fields:
        ((variant, value),) = field.items()
        data = bytes.fromhex(value[2:])
        if variant == "BigRaw":
            try:
                out.append({variant: data.decode()})
            except UnicodeDecodeError:
                out.append({variant: value})
        else:
            out.append({variant: value if data else []})
    return {"deposit": 0, "block": 5, "info": {"fields": out}}


@given(st.binary(max_size=512))
def test_bytes_come_back_as_they_were(data: bytes) -> None:
    if len(data) > 128 and data.startswith(b"0x"):
        return
    assert decode_fields(shown(encode_fields(data))) == data


@given(st.text(min_size=129, max_size=170).filter(lambda text: not text.startswith("0x")))
def test_text_longer_than_a_raw_field_comes_back(text: str) -> None:
    data = text.encode()[:512]
    assert decode_fields(shown(encode_fields(data))) == data


def test_the_variant_follows_the_size() -> None:
    assert encode_fields(b"") == [{"Raw0": "0x"}]
    assert encode_fields(b"abc") == [{"Raw3": "0x616263"}]
    assert list(encode_fields(b"a" * 128)[0]) == ["Raw128"]
    assert list(encode_fields(b"a" * 129)[0]) == ["BigRaw"]


def test_more_than_512_bytes_are_refused() -> None:
    encode_fields(b"a" * 512)
    with pytest.raises(ValueError, match="at most 512 bytes, got 513"):
        encode_fields(b"a" * 513)


def test_long_bytes_that_spell_hex_are_refused() -> None:
    assert decode_fields(shown(encode_fields(b"0x" + b"6" * 100))) == b"0x" + b"6" * 100
    with pytest.raises(ValueError, match='must not begin with "0x"'):
        encode_fields(b"0x" + b"6" * 200)


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        {"info": {"fields": None}},
        {"info": {"fields": []}},
        {"info": {"fields": ["None"]}},
        {"info": {"fields": ["ResetBondsFlag"]}},
        {"info": {"fields": [{"Sha256": "0x" + "00" * 32}]}},
        {"info": {"fields": [{"TimelockEncrypted": {"encrypted": "0x00", "reveal_round": 1}}]}},
        {"info": {"fields": [{"Raw2": "0xzz"}]}},
        {"info": {"fields": [{"Raw2": 5}]}},
        {"info": {"fields": [{"Raw1": "0x00", "Raw2": "0x0000"}]}},
    ],
)
def test_a_record_without_plain_bytes_is_none(record: Any) -> None:
    assert decode_fields(record) is None


def test_several_plain_fields_are_joined() -> None:
    assert decode_fields({"info": {"fields": [{"Raw1": "0x61"}, {"BigRaw": "bc"}]}}) == b"abc"
