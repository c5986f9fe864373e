"""Error feedback: what a codec did not carry of one round's pseudo-gradient goes into the next round's.

    carried = start - final + remainder        what a miner owes
    payload = encode(carried)                  what it sends
    rest    = carried - decode(payload)        what it still owes where the mean included it

The next remainder is ``rest``, chunk by chunk, and ``carried`` where the mean left the chunk out; which of them, the
base's manifest says, and nothing else (`hivetrain.verification.remainder`). So over rounds the sum of what was sent and
the remainder is the sum of what was trained, and even signs alone converge.

A miner keeps ``carried`` and the receipt of its last rounds in its state folder; `rest` is recomputed from them, since
rounding is seeded. A file that is not what its receipt commits to counts as lost: the remainder is then zero.

Sources: https://arxiv.org/abs/1901.09847 (error feedback), https://arxiv.org/abs/1809.07599 (with top-k).
Shapes: P = elements of the delta section.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from hivetrain.averaging.codecs import Bytes
from hivetrain.averaging.layout import PayloadLayout
from hivetrain.manifest import Manifest
from hivetrain.run import CHUNK_ELEMENTS
from hivetrain.verification.receipt import MAX_RECEIPT_BYTES, Receipt
from hivetrain.verification.remainder import (
    RemainderBytes,
    chunk_leaves,
    follows,
    left_out_mask,
    root_of,
    to_bytes,
)

logger = logging.getLogger(__name__)

MAX_PENDING = 2
"""Rounds kept beside the one that the base follows from: an epoch may be anchored one round late."""
_KEY, _TENSOR = "hivetrain", "carried"


def codec_seed(run_id: str, round_number: int, hotkey: str) -> int:
    """The seed of a codec's rounding, so that its bytes can be recomputed by anyone."""
    digest = hashlib.sha256(f"hivetrain-codec/1\n{run_id}\n{round_number}\n{hotkey}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Remainder:
    """What a miner adds to its pseudo-gradient, and what shows that it may.

    Attributes:
        values: float32 [P].
        opening: what a challenge is answered with.
        root: hex, over the chunks of ``values``.
    """

    values: Tensor
    opening: RemainderBytes
    root: str


def rest_of(layout: PayloadLayout, carried: Tensor, payload: Bytes) -> Tensor:
    """What ``payload``, or the delta section at its beginning, did not carry: float32 [P]."""
    chunks = -(-carried.numel() // CHUNK_ELEMENTS)
    sent = layout.decode_chunks(memoryview(payload)[: layout.byte_offset(chunks)], 0, chunks)
    return carried - sent


class Feedback:
    """What one miner sent lately, and the remainder that follows from it. Not thread-safe.

    Args:
        folder: where it survives a restart.
        layout: the run's; its first section is the pseudo-gradient.
        run_id, hotkey: whose receipts count; others' files are ignored.
    """

    def __init__(self, folder: Path, layout: PayloadLayout, *, run_id: str, hotkey: str) -> None:
        self._folder = folder
        self._layout = layout
        self._num_params = layout.sections[0].num_elements
        self._run_id = run_id
        self._hotkey = hotkey
        self._sent: dict[int, tuple[Receipt, Tensor]] = {}  # by round
        self._settled = -1  # the round that the current base follows from

    def load(self) -> None:
        """Read what an earlier process kept."""
        for path in sorted(self._folder.glob("sent-*.safetensors")):
            try:
                receipt, carried = self._read(path)
            except (OSError, ValueError) as exc:
                logger.warning("cannot use the remainder in %s, going on without: %s", path, exc)
                continue
            self._sent[receipt.round] = (receipt, carried)

    def keep(self, receipt: Receipt, carried: Tensor) -> None:
        """Remember a round before its receipt is shown to anybody."""
        self._sent[receipt.round] = (receipt, carried)
        pending = sorted(round_number for round_number in self._sent if round_number != self._settled)
        for round_number in pending[:-MAX_PENDING]:
            self._forget(round_number)
        try:
            self._write(receipt, carried)
        except OSError as exc:  # the round goes on: only a restart would miss the file
            logger.warning("cannot keep the remainder in %s, a restart would lose it: %s", self._folder, exc)

    def remainder(self, base: Manifest) -> Remainder | None:
        """What is owed to whoever starts from ``base``; None where that is zero.

        A round that makes no epoch changes nothing here: the next one asks with the same base.
        """
        found = next((one for one in self._sent.values() if follows(base, one[0])), None)
        if found is None:
            return None
        receipt, carried = found
        self._settled = receipt.round
        for round_number in [number for number in self._sent if number < receipt.round]:
            self._forget(round_number)
        return self._put_together(base, receipt, carried)

    def _put_together(self, base: Manifest, receipt: Receipt, carried: Tensor) -> Remainder:
        seed = codec_seed(receipt.run_id, receipt.round, receipt.hotkey)
        chunks = -(-self._num_params // CHUNK_ELEMENTS)
        rest = rest_of(self._layout, carried, self._layout.encode_chunks(carried, 0, chunks, seed))
        mask = left_out_mask(base, self._hotkey, self._num_params)
        if not any(mask):
            values, others = rest, b""
        else:
            out = torch.tensor(mask).repeat_interleave(CHUNK_ELEMENTS)[: self._num_params]
            values = torch.where(out, carried, rest)
            others = b"".join(chunk_leaves(to_bytes(torch.where(out, rest, carried))))
        raw = to_bytes(values)
        opening = RemainderBytes(values=raw, previous=receipt.to_bytes(), others=others)
        return Remainder(values=values, opening=opening, root=root_of(chunk_leaves(raw)))

    # -- files --------------------------------------------------------------------------------------------

    def _path(self, round_number: int) -> Path:
        return self._folder / f"sent-{round_number:09d}.safetensors"

    def _forget(self, round_number: int) -> None:
        del self._sent[round_number]
        with contextlib.suppress(OSError):  # a file too many is read again, and then its round is too old
            self._path(round_number).unlink(missing_ok=True)

    def _write(self, receipt: Receipt, carried: Tensor) -> None:
        from safetensors.torch import save

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(receipt.round)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(save({_TENSOR: carried.contiguous()}, {_KEY: receipt.to_bytes().decode()}))
        os.replace(temporary, path)

    def _read(self, path: Path) -> tuple[Receipt, Tensor]:
        """One round from a file.

        Raises:
            ValueError: it is not what its receipt commits to, or another miner's, run's or layout's.
        """
        from safetensors import SafetensorError, safe_open

        limit = 4 * self._num_params + 4 * MAX_RECEIPT_BYTES
        if path.stat().st_size > limit:
            raise ValueError(f"{path.stat().st_size} bytes, the limit is {limit}")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                carried: Tensor = file.get_tensor(_TENSOR).clone()
                receipt = Receipt.model_validate_json((file.metadata() or {}).get(_KEY, ""))
        except (SafetensorError, ValidationError) as exc:
            raise ValueError(f"not a round that was sent: {str(exc)[:200]}") from exc
        theirs = (receipt.run_id, receipt.hotkey, receipt.layout_hash)
        if theirs != (self._run_id, self._hotkey, self._layout.layout_hash):
            raise ValueError("it belongs to another run, hotkey or layout")
        if carried.dtype is not torch.float32 or carried.shape != (self._num_params,):
            raise ValueError(f"it holds {carried.dtype} {list(carried.shape)}, expected float32 [{self._num_params}]")
        if root_of(chunk_leaves(to_bytes(carried))) != receipt.carried_root:
            raise ValueError("its bytes are not those that the receipt commits to")
        return receipt, carried
