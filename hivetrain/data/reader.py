"""The token windows of one round, read by range: a row group is fetched without the file around it.

A miner and the validator that replays it build the same `RoundData` from public values, so a window is named
by (k, window): the k-th assigned row group, and the window's place in it. Steps take windows in that order
and never wrap: where the data ends, the round has fewer steps.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hivetrain.data.assignment import assigned_row_groups, permute
from hivetrain.data.index import DatasetIndex, RowGroup
from hivetrain.errors import ConfigError, DataError, ServiceError
from hivetrain.run import Data

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerFast

    from hivetrain.hub.dataset import DatasetFiles

K = TypeVar("K")
V = TypeVar("V")

DECODE_ROWS = 256  # rows decoded at a time, so that the size limit is met while decoding and not after it


class SegmentReader:
    """Reads the text of single row groups. Keeps a few footers and row groups; not for several threads.

    Args:
        files: the data set.
        text_column: a column of strings.
        max_bytes: limit on what is read for one row group, and again on its text as it is decoded.
        num_cached: row groups kept, the least recently used leaves first.
        num_footers: footers kept; one of a large file can be megabytes.
    """

    def __init__(
        self,
        files: DatasetFiles,
        text_column: str,
        *,
        max_bytes: int = 256 * 2**20,
        num_cached: int = 8,
        num_footers: int = 16,
    ) -> None:
        self._files = files
        self._text_column = text_column
        self._max_bytes = max_bytes
        self._texts: _Lru[RowGroup, list[str]] = _Lru(num_cached)
        self._footers: _Lru[str, pq.FileMetaData] = _Lru(num_footers)

    def read(self, row_group: RowGroup) -> list[str]:
        """Texts of a row group, in order; an absent (null) text is "".

        Raises:
            DataError: the file is not parquet or ends early, or it has not the row group, the number of rows or the
                column of strings that the index and the recipe name, or too many bytes of it.
            HubError: the hub did not answer.
        """
        return self._texts.get(row_group, lambda: self._read(row_group))

    def _read(self, row_group: RowGroup) -> list[str]:
        try:
            with _Bounded(self._files.open(row_group.path), row_group, self._max_bytes) as stream:
                footer = self._footers.get(row_group.path, lambda: pq.read_metadata(stream))
                self._check(footer, row_group)
                with pq.ParquetFile(stream, metadata=footer) as file:
                    return self._decode(file, row_group)
        except ServiceError:
            raise
        except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
            raise DataError(
                f"{row_group.path}: expected a readable parquet file with row group {row_group.index}, got: {exc}"
            ) from exc

    def _check(self, footer: pq.FileMetaData, row_group: RowGroup) -> None:
        """Compare what the footer says with what the index and the recipe say."""
        path, place = row_group.path, row_group.index
        if place >= footer.num_row_groups:
            raise DataError(f"{path}: expected row group {place} as indexed, got {footer.num_row_groups} row groups")
        actual = footer.row_group(place)
        if actual.num_rows != row_group.num_rows:
            raise DataError(
                f"{path}: row group {place}: expected {row_group.num_rows} rows as indexed, got {actual.num_rows}"
            )
        schema = footer.schema.to_arrow_schema()
        if schema.names.count(self._text_column) != 1:
            raise DataError(
                f"{path}: expected one column {self._text_column!r} (data.text_column), got {', '.join(schema.names)}"
            )
        kind = schema.field(self._text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {self._text_column!r}: expected strings, got {kind}")

    def _decode(self, file: pq.ParquetFile, row_group: RowGroup) -> list[str]:
        texts: list[str] = []
        num_bytes = 0
        batches = file.iter_batches(
            DECODE_ROWS, row_groups=[row_group.index], columns=[self._text_column], use_threads=False
        )
        for batch in batches:
            num_bytes += batch.nbytes
            if num_bytes > self._max_bytes:
                raise DataError(
                    f"{row_group.path}: row group {row_group.index}: expected at most {self._max_bytes} bytes of text, "
                    f"got at least {num_bytes}"
                )
            texts.extend(text or "" for text in batch.column(0).to_pylist())
        if len(texts) != row_group.num_rows:
            raise DataError(
                f"{row_group.path}: row group {row_group.index}: expected {row_group.num_rows} rows, got {len(texts)}"
            )
        return texts


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, seq_len: int) -> Tensor:
    """Token windows of a list of documents, each document followed by the end-of-text token.

    Returns:
        int64 [num_windows, seq_len]. What is left over after the last whole window is dropped.

    Raises:
        ConfigError: the tokenizer has no end-of-text token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no eos token, which must part documents: use another one")
    tokens: list[int] = []
    if texts:
        encoded = tokenizer(
            list(texts), add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False
        )
        for ids in encoded["input_ids"]:
            tokens.extend(ids)
            tokens.append(eos)
    num_windows = len(tokens) // seq_len
    return torch.tensor(tokens[: num_windows * seq_len], dtype=torch.int64).view(num_windows, seq_len)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundData:
    """What one miner trains on in one round."""

    row_groups: tuple[RowGroup, ...]  # K, in the order of the assignment
    windows: tuple[Tensor, ...]  # one per row group: int64 [num_windows, seq_len]
    digests: tuple[str, ...]  # one per row group: sha256 over its windows as little-endian int32
    batch_size: int
    accumulation: int
    order_key: bytes  # names the permutation in which the windows are taken

    @property
    def digest(self) -> str:
        """Hex sha256 over all of the digests, in order."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

    def num_steps(self, max_steps: int) -> int:
        """Whole inner steps that the windows are enough for, at most `max_steps`."""
        return min(max_steps, sum(map(len, self.windows)) // self._windows_per_step)

    def samples(self, step: int) -> list[tuple[int, int]]:
        """(k, window) of each sample of a step, in order: accumulation * batch_size of them.

        Windows are taken in a keyed order: four neighbours of one document make a poor batch (held-out loss after
        150 steps of the embedded default: 5.95 to 6.08 in document order, 5.25 to 5.31 in this one).

        Raises:
            IndexError: the windows are not enough for this step.
        """
        num_steps = sum(map(len, self.windows)) // self._windows_per_step
        if not 0 <= step < num_steps:
            raise IndexError(f"expected a step in [0, {num_steps}), got {step}")
        starts = [0, *accumulate(len(windows) for windows in self.windows)]
        first = step * self._windows_per_step
        samples = []
        for turn in range(first, first + self._windows_per_step):
            place = permute(self.order_key, starts[-1], turn)
            k = next(k for k in range(len(self.windows)) if place < starts[k + 1])
            samples.append((k, place - starts[k]))
        return samples

    def batch(self, step: int) -> Tensor:
        """Tokens of a step: int64 [accumulation, batch_size, seq_len].

        Raises:
            IndexError: the windows are not enough for this step.
        """
        rows = torch.stack([self.windows[k][window] for k, window in self.samples(step)])
        return rows.view(self.accumulation, self.batch_size, -1)

    @property
    def _windows_per_step(self) -> int:
        return self.accumulation * self.batch_size


def load_round(
    reader: SegmentReader,
    index: DatasetIndex,
    tokenizer: PreTrainedTokenizerFast,
    *,
    run_id: str,
    round_number: int,
    rank: int,
    data: Data,
) -> RoundData:
    """Read and tokenize the row groups that the rule assigns to `rank` in a round.

    Raises:
        NoSlot: the round has no slot for this rank.
        DataError: the index is of another data set than the recipe's, or the data cannot be read as it says.
        HubError: the hub did not answer.
    """
    _require_same_dataset(index, data)
    places = assigned_row_groups(
        run_id=run_id, round_number=round_number, rank=rank, num_row_groups=len(index.train), data=data
    )
    row_groups = tuple(index.train[place] for place in places)
    windows = tuple(pack(reader.read(row_group), tokenizer, data.seq_len) for row_group in row_groups)
    return RoundData(
        row_groups=row_groups,
        windows=windows,
        digests=tuple(_digest(tokens) for tokens in windows),
        batch_size=data.batch_size,
        accumulation=data.accumulation,
        order_key=order_key(run_id, round_number, rank),
    )


def order_key(run_id: str, round_number: int, rank: int) -> bytes:
    """The key of the order in which one miner takes its windows in one round."""
    text = f"hivetrain-order/1\n{run_id}\n{round_number}\n{rank}"
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def load_heldout(reader: SegmentReader, index: DatasetIndex, tokenizer: PreTrainedTokenizerFast, data: Data) -> Tensor:
    """The held-out batches, the same for every node and round.

    Returns:
        int64 [num_batches, batch_size, seq_len]: `data.heldout_batches`, or as many as there are.

    Raises:
        DataError: the held-out row groups do not fill one batch, or cannot be read as the index says.
        HubError: the hub did not answer.
    """
    _require_same_dataset(index, data)
    wanted = data.heldout_batches * data.batch_size
    found: list[Tensor] = []
    for row_group in index.heldout:
        if sum(map(len, found)) < wanted:
            found.append(pack(reader.read(row_group), tokenizer, data.seq_len))
    windows = torch.cat(found)
    num_batches = min(data.heldout_batches, len(windows) // data.batch_size)
    if num_batches == 0:
        raise DataError(
            f"held-out row groups: expected at least {data.batch_size} windows of {data.seq_len} tokens, "
            f"got {len(windows)}: raise data.heldout_row_groups"
        )
    return windows[: num_batches * data.batch_size].view(num_batches, data.batch_size, data.seq_len)


def _require_same_dataset(index: DatasetIndex, data: Data) -> None:
    ours, theirs = (data.repo, data.config, data.revision), (index.repo, index.config, index.revision)
    if ours != theirs:
        raise DataError(
            f"the index is of another data set: expected repo, config and revision {ours} as in the recipe, "
            f"got {theirs}"
        )


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i4").tobytes()).hexdigest()


class _Bounded(io.RawIOBase):
    """A file of which at most `max_bytes` are read.

    The sizes in a footer are not asked: they may lie, and pyarrow 26 aborts the process over some damaged ones
    when `FileMetaData.row_group(i).column(j)` is looked at.
    """

    def __init__(self, stream: BinaryIO, row_group: RowGroup, max_bytes: int) -> None:
        super().__init__()
        self._stream = stream
        self._row_group = row_group
        self._max_bytes = max_bytes
        self._num_read = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        if size < 0 or self._num_read + size > self._max_bytes:
            raise DataError(
                f"{self._row_group.path}: row group {self._row_group.index}: expected at most {self._max_bytes} bytes "
                f"to read, got {self._num_read} and {size} more"
            )
        self._num_read += size
        return self._stream.read(size)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Lru(Generic[K, V]):
    """Keeps the `size` values that were used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        value = self._values[key] if key in self._values else make()
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value
