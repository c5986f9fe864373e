"""A commitment's bytes as the chain's fields, and back.

Up to 128 bytes go as ``Raw<N>``, up to 512 as ``BigRaw``. The SDK's codec shows ``BigRaw`` as text where the bytes
are UTF-8 and as ``0x`` hex where they are not, so bytes that spell such hex themselves cannot be told apart:
they are refused when written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_RAW_BYTES = 128
MAX_COMMITMENT_BYTES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainCommitment:
    """What a hotkey committed, and the block that holds it (its hash did not exist yet at that time)."""

    block: int
    data: bytes


def encode_fields(data: bytes) -> list[dict[str, str]]:
    """The fields of a commitment holding ``data``.

    Raises:
        ValueError: more than 512 bytes, or more than 128 that begin with ``0x``.
    """
    if len(data) > MAX_COMMITMENT_BYTES:
        raise ValueError(f"a commitment holds at most {MAX_COMMITMENT_BYTES} bytes, got {len(data)}")
    if len(data) <= MAX_RAW_BYTES:
        return [{f"Raw{len(data)}": "0x" + data.hex()}]
    if data.startswith(b"0x"):
        raise ValueError(f'a commitment of more than {MAX_RAW_BYTES} bytes must not begin with "0x"')
    return [{"BigRaw": "0x" + data.hex()}]


def decode_fields(record: Any) -> bytes | None:
    """The bytes of a ``CommitmentOf`` record; None for one that holds no plain bytes (sealed, hashed, malformed)."""
    try:
        fields = record["info"]["fields"]
        pieces = [_plain_bytes(field) for field in fields if field != "None"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return b"".join(pieces) if pieces else None


def _plain_bytes(field: Any) -> bytes:
    ((variant, value),) = field.items()
    if variant == "BigRaw" or variant.startswith("Raw"):
        if isinstance(value, list | tuple | bytes):
            return bytes(value)
        if not value.startswith("0x"):
            return bytes(value.encode())
        return bytes.fromhex(value[2:])
    raise ValueError(f"{variant} holds no plain bytes")
