"""The remainder of error feedback: whose it is, and how anybody can tell without the bytes of the round before.

A receipt commits to three vectors in chunks of raw float32: the *remainder* that went into its payload, and the two
that the next one is put together from, *rest*, what is left of a chunk once the mean includes it, and *carried*, all of
it, for a chunk that the mean leaves out. The manifest names the receipt of every member that is in its mean, and the
chunks whose mean lacks it; so the remainder of a round is a function of its base:

- the base's manifest names a receipt of ours: rest, and carried where it left us out;
- it names none (we took no part, or nothing of ours was in, or it is epoch 0), or it merged its adapter into a base of
  its own, so that the vector means something else: zero;
- a round that made no epoch changes nothing: the next one starts from the same base, so what was trained in between is
  gone, and the remainder that went into it is still owed.

A miner may always use zero instead, for it may have lost its remainder; that takes from nobody but itself.

Shapes: P = elements of the delta section, C = its chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hivetrain.averaging.codecs import Bytes
from hivetrain.errors import Fault, PeerFault
from hivetrain.manifest import Manifest
from hivetrain.model.vector import little_endian
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.merkle import DIGEST_BYTES, MerkleTree, leaf_digests
from hivetrain.verification.receipt import NO_REMAINDER, Receipt

_CHUNK_BYTES = 4 * CHUNK_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class RemainderBytes:
    """What a miner opens beside its last snapshot, as it travels.

    Attributes:
        values: the remainder, float32, little-endian: 4 * P bytes.
        previous: the receipt that the base's manifest names.
        others: where that manifest leaves chunks out, the digest of every chunk's other version (carried for one that
            is in, rest for one that is not): 32 * C bytes. Else empty.
    """

    values: bytes
    previous: bytes
    others: bytes = b""


def remainder_bytes_limit(num_params: int) -> int:
    """The most that `RemainderBytes` holds beside the receipt, in bytes."""
    return 4 * num_params + DIGEST_BYTES * num_chunks(num_params)


def num_chunks(num_params: int) -> int:
    """C."""
    return -(-num_params // CHUNK_ELEMENTS)


def to_bytes(values: Tensor) -> bytes:
    """float32 values as they are hashed and opened."""
    return bytes(little_endian(values))


def chunk_leaves(raw: Bytes) -> list[bytes]:
    """Merkle leaf digests of the chunks of `to_bytes`."""
    view = memoryview(raw)
    return leaf_digests(view, _CHUNK_BYTES)


def root_of(leaves: Sequence[bytes]) -> str:
    """Hex root over them."""
    return MerkleTree(leaves).root.hex()


def follows(base: Manifest, sent: Receipt) -> bool:
    """Whether ``sent`` is of the round that made ``base``, its vector is in, and both are in the same coordinates."""
    return (
        base.receipts.get(sent.hotkey) == sent.sha256()
        and base.round == sent.round
        and base.parent == sent.base_manifest
        and base.base_epoch != base.epoch  # an epoch with a base of its own merged its adapter: other coordinates
    )


def left_out_mask(base: Manifest, hotkey: str, num_params: int) -> list[bool]:
    """Per chunk of the delta section, the payload's first, whether ``base``'s mean lacks that member."""
    mask = [False] * num_chunks(num_params)
    for start, stop in base.left_out.get(hotkey, ()):
        for chunk in range(start, min(stop, len(mask))):
            mask[chunk] = True
    return mask


def check_remainder(receipt: Receipt, base: Manifest, opened: RemainderBytes | None, num_params: int) -> Tensor | None:
    """The remainder that ``receipt`` commits to: float32 [P], or None where it is zero.

    Args:
        receipt: of the round that starts from ``base``.
        opened: what the miner shows.

    Raises:
        PeerFault: REFUSED where nothing is shown; NOT_COMMITTED where it is not what was committed, or not what
            follows from ``base``.
    """
    if receipt.remainder_root == NO_REMAINDER:
        return None
    if opened is None:
        raise PeerFault(Fault.REFUSED, "did not open its remainder")
    if len(opened.values) != 4 * num_params:
        detail = f"the remainder has {len(opened.values)} bytes, expected {4 * num_params}"
        raise PeerFault(Fault.NOT_COMMITTED, detail)
    leaves = chunk_leaves(opened.values)
    if root_of(leaves) != receipt.remainder_root:
        raise PeerFault(Fault.NOT_COMMITTED, f"the remainder does not open {receipt.remainder_root[:12]}")
    _check_continuity(receipt, base, opened, leaves)
    return torch.from_numpy(np.frombuffer(opened.values, dtype="<f4").astype(np.float32))


def _check_continuity(receipt: Receipt, base: Manifest, opened: RemainderBytes, leaves: Sequence[bytes]) -> None:
    try:
        sent = Receipt.model_validate_json(opened.previous)
    except ValidationError as exc:
        raise PeerFault(Fault.NOT_COMMITTED, "shows no receipt that its remainder follows from") from exc
    # No need of its signature: the manifest names its digest.
    if sent.hotkey != receipt.hotkey or not follows(base, sent):
        raise PeerFault(Fault.NOT_COMMITTED, "uses a remainder, and its base does not follow from the receipt it shows")
    mask = left_out_mask(base, sent.hotkey, len(opened.values) // 4)
    if not any(mask):
        rest, carried = root_of(leaves), sent.carried_root
    else:
        others = [opened.others[at : at + DIGEST_BYTES] for at in range(0, len(opened.others), DIGEST_BYTES)]
        if len(others) != len(leaves) or len(opened.others) % DIGEST_BYTES:
            raise PeerFault(Fault.NOT_COMMITTED, f"shows {len(others)} digests of chunks, expected {len(leaves)}")
        rest = root_of([other if out else leaf for out, leaf, other in zip(mask, leaves, others, strict=True)])
        carried = root_of([leaf if out else other for out, leaf, other in zip(mask, leaves, others, strict=True)])
    if (rest, carried) != (sent.rest_root, sent.carried_root):
        raise PeerFault(Fault.NOT_COMMITTED, "its remainder is not what the round before left")
