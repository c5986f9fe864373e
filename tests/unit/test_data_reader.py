from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hivetrain.data.assignment import NoSlot, assigned_row_groups, permute
from hivetrain.data.index import DatasetIndex, RowGroup, build_index
from hivetrain.data.reader import SegmentReader, load_heldout, load_round, pack
from hivetrain.data.tokenizer import train_tokenizer
from hivetrain.errors import ConfigError, DataError, HubError
from hivetrain.hub.dataset import LocalDataset
from hivetrain.run import Data

RUN = "ab" * 32


class CountingFiles:
    """Another data set's files, with the bytes that are read from them."""

    def __init__(self, files: LocalDataset) -> None:
        self._files = files
        self.num_bytes = 0
        self.num_opened = 0

    def list_parquet(self, config: str) -> list[tuple[str, int]]:
        return self._files.list_parquet(config)

    def open(self, path: str) -> BinaryIO:
        outer = self
        inner = self._files.open(path)
        self.num_opened += 1

        class Counting(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def seekable(self) -> bool:
                return True

            def seek(self, offset: int, whence: int = 0) -> int:
                return inner.seek(offset, whence)

            def tell(self) -> int:
                return inner.tell()

            def read(self, size: int = -1) -> bytes:
                data = inner.read(size)
                outer.num_bytes += len(data)
                return data

            def close(self) -> None:
                inner.close()
                super().close()

        return cast("BinaryIO", Counting())


def write(path: Path, groups: list[list[str]], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema([("id", pa.int64()), (column, pa.string())])) as writer:
        for texts in groups:
            writer.write_table(pa.table({"id": list(range(len(texts))), column: texts}))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog " * 5], 280)


@pytest.fixture
def data() -> Data:
    return Data(seq_len=8, batch_size=2, accumulation=2, row_groups_per_miner=2, max_miners=4, heldout_batches=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in range(2):
        groups = [[f"file {file} group {group} row {row} of a fox" for row in range(12)] for group in range(7)]
        write(tmp_path / f"{file}.parquet", groups)
    return tmp_path


@pytest.fixture
def index(folder: Path, data: Data) -> DatasetIndex:
    return build_index(LocalDataset(folder), data.repo, data.revision, data.config, data.heldout_row_groups)


def test_reader_returns_one_row_groups_texts_in_order(folder: Path) -> None:
    reader = SegmentReader(LocalDataset(folder), "text")
    texts = reader.read(RowGroup("1.parquet", 3, 12))
    assert texts == [f"file 1 group 3 row {row} of a fox" for row in range(12)]


def test_null_texts_read_as_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert SegmentReader(LocalDataset(tmp_path), "text").read(RowGroup("a.parquet", 0, 3)) == ["a", "", "b"]


def test_large_strings_are_strings_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.large_string())}), tmp_path / "a.parquet")
    assert SegmentReader(LocalDataset(tmp_path), "text").read(RowGroup("a.parquet", 0, 2)) == ["a", "b"]


def test_one_row_group_of_a_file_laid_out_like_fineweb_moves_few_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "sample/350BT/000_00000.parquet"
    path.parent.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    columns = ("id", "dump", "url", "date", "file_path", "language")
    schema = pa.schema(
        [("text", pa.string())]
        + [(name, pa.string()) for name in columns]
        + [("language_score", pa.float64()), ("token_count", pa.int64())]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in range(30):
            noise = torch.randint(0, 2**62, (1000, 20), generator=generator).tolist()
            table = {name: [f"{name} {group} {row}" for row in range(1000)] for name in columns}
            table |= {"text": [" ".join(f"{word:x}" for word in row) for row in noise]}
            table |= {"language_score": [0.9] * 1000, "token_count": [20] * 1000}
            writer.write_table(pa.table(table, schema=schema))
    index = build_index(LocalDataset(tmp_path), "HuggingFaceFW/fineweb", "rev", "sample-350BT", 2)
    assert {group.num_rows for group in index.train} == {1000}

    files = CountingFiles(LocalDataset(tmp_path))
    reader = SegmentReader(files, "text")
    assert len(reader.read(index.train[17])) == 1000
    size_bytes = path.stat().st_size
    assert files.num_bytes < size_bytes / 12, f"{files.num_bytes} of {size_bytes}"

    footer_read = files.num_bytes
    reader.read(index.train[18])
    assert files.num_bytes - footer_read < size_bytes / 30  # the footer is kept, and only the text column is read


def test_row_group_that_was_just_read_is_not_read_again(folder: Path) -> None:
    files = CountingFiles(LocalDataset(folder))
    reader = SegmentReader(files, "text", num_cached=2)
    groups = [RowGroup("0.parquet", place, 12) for place in range(3)]
    for place in (0, 1, 0, 1):
        reader.read(groups[place])
    assert files.num_opened == 2
    reader.read(groups[2])  # drops 0, the least recently used
    reader.read(groups[1])
    assert files.num_opened == 3
    reader.read(groups[0])
    assert files.num_opened == 4


def read(folder: Path, row_group: RowGroup, column: str = "text", max_bytes: int = 2**20) -> list[str]:
    return SegmentReader(LocalDataset(folder), column, max_bytes=max_bytes).read(row_group)


def test_missing_column_names_the_ones_there_are(folder: Path) -> None:
    with pytest.raises(DataError, match=r"one column 'body' \(data\.text_column\), got id, text"):
        read(folder, RowGroup("0.parquet", 0, 12), column="body")


def test_column_that_is_not_text_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="column 'id': expected strings, got int64"):
        read(folder, RowGroup("0.parquet", 0, 12), column="id")


def test_row_group_past_the_files_last_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="expected row group 7 as indexed, got 7 row groups"):
        read(folder, RowGroup("0.parquet", 7, 12))


def test_other_number_of_rows_than_indexed_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="expected 13 rows as indexed, got 12"):
        read(folder, RowGroup("0.parquet", 0, 13))


def test_missing_file_is_a_data_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"9\.parquet"):
        read(folder, RowGroup("9.parquet", 0, 12))


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: blob[: len(blob) // 2],
        lambda blob: blob[:-1],
        lambda blob: b"",
        lambda blob: b"this is not parquet at all",
        lambda blob: blob[:4] + bytes(len(blob) // 2) + blob[4 + len(blob) // 2 :],
        lambda blob: blob[:-8] + struct.pack("<I", 2**31) + b"PAR1",
    ],
    ids=["half", "last byte", "empty", "text", "zeroed pages", "lying footer length"],
)
def test_damaged_file_is_a_data_error(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / "0.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"0\.parquet: expected a readable parquet file"):
        read(folder, RowGroup("0.parquet", 0, 12))


def test_text_that_is_not_utf8_is_a_data_error(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.Table.from_arrays([bad], schema=schema), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet"):
        read(tmp_path, RowGroup("a.parquet", 0, 1))


def test_row_group_with_too_many_compressed_bytes_is_refused_before_it_is_read(folder: Path) -> None:
    with pytest.raises(DataError, match=r"at most 10 bytes to read, got 0 and \d+ more"):
        read(folder, RowGroup("0.parquet", 0, 12), max_bytes=10)


def test_row_group_that_unpacks_to_too_many_bytes_is_refused_while_it_is_decoded(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 10_000] * 5000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**15
    with pytest.raises(DataError, match="at most 4194304 bytes of text, got at least"):
        read(tmp_path, RowGroup("a.parquet", 0, 5000), max_bytes=2**22)


def test_hub_that_fails_in_mid_read_stays_a_hub_error(folder: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise HubError("503")

    class FailingFiles:
        def list_parquet(self, config: str) -> list[tuple[str, int]]:
            return []

        def open(self, path: str) -> BinaryIO:
            return Failing((folder / path).read_bytes())

    with pytest.raises(HubError, match="503"):
        SegmentReader(FailingFiles(), "text").read(RowGroup("0.parquet", 0, 12))


def test_pack_joins_documents_by_end_of_text_and_drops_the_tail(tokenizer: Any) -> None:
    texts = ["the fox", "", "dog"]
    stream = [*tokenizer("the fox")["input_ids"], 0, 0, *tokenizer("dog")["input_ids"], 0]
    seq_len = 3
    assert len(stream) % seq_len != 0
    num_windows = len(stream) // seq_len
    windows = pack(texts, tokenizer, seq_len)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [stream[n * seq_len : (n + 1) * seq_len] for n in range(num_windows)]


def test_pack_of_too_little_text_has_no_window(tokenizer: Any) -> None:
    assert pack([], tokenizer, 8).shape == (0, 8)
    assert pack(["a"], tokenizer, 8).shape == (0, 8)


def test_pack_needs_an_end_of_text_token() -> None:
    tokenizer = train_tokenizer(["abc"], 257)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        pack(["abc"], tokenizer, 2)


def load(folder: Path, index: DatasetIndex, tokenizer: Any, data: Data, *, round_number: int = 3, rank: int = 1) -> Any:
    reader = SegmentReader(LocalDataset(folder), data.text_column)
    return load_round(reader, index, tokenizer, run_id=RUN, round_number=round_number, rank=rank, data=data)


def test_round_holds_the_assigned_row_groups_in_order(
    folder: Path, index: DatasetIndex, tokenizer: Any, data: Data
) -> None:
    got = load(folder, index, tokenizer, data)
    places = assigned_row_groups(run_id=RUN, round_number=3, rank=1, num_row_groups=12, data=data)
    assert got.row_groups == tuple(index.train[place] for place in places)
    for row_group, windows, digest in zip(got.row_groups, got.windows, got.digests, strict=True):
        file, place = row_group.path[0], row_group.index
        texts = [f"file {file} group {place} row {row} of a fox" for row in range(12)]
        assert torch.equal(windows, pack(texts, tokenizer, 8))
        tokens = [token for window in windows.tolist() for token in window]
        assert digest == hashlib.sha256(struct.pack(f"<{len(tokens)}i", *tokens)).hexdigest()


def test_steps_take_each_window_once_in_the_keyed_order(
    folder: Path, index: DatasetIndex, tokenizer: Any, data: Data
) -> None:
    got = load(folder, index, tokenizer, data)
    everything = torch.cat(got.windows)
    num_steps = got.num_steps(10**9)
    assert num_steps == len(everything) // 4 > 3
    assert got.num_steps(3) == 3
    order = [permute(got.order_key, len(everything), turn) for turn in range(num_steps * 4)]
    assert order != sorted(order)
    batches = torch.cat([got.batch(step).view(4, 8) for step in range(num_steps)])
    assert torch.equal(batches, everything[order])
    assert got.batch(0).shape == (2, 2, 8)
    samples = [sample for step in range(num_steps) for sample in got.samples(step)]
    every = [(k, window) for k, windows in enumerate(got.windows) for window in range(len(windows))]
    assert samples == [every[place] for place in order]
    assert len(set(samples)) == len(samples)
    assert torch.equal(
        torch.stack([got.windows[k][window] for k, window in got.samples(2)]).view(2, 2, 8), got.batch(2)
    )


@pytest.mark.parametrize("past", [0, 1])
def test_step_without_data_is_refused(folder: Path, index: DatasetIndex, tokenizer: Any, data: Data, past: int) -> None:
    got = load(folder, index, tokenizer, data)
    with pytest.raises(IndexError, match="expected a step in"):
        got.batch(got.num_steps(10**9) + past)
    with pytest.raises(IndexError, match="expected a step in"):
        got.samples(-1)


def test_a_row_group_too_short_for_a_window_is_passed_over(tmp_path: Path, tokenizer: Any, data: Data) -> None:
    write(tmp_path / "a.parquet", [["a"], ["the quick brown fox " * 40], ["held"], ["out"]])
    one = replace(data, max_miners=1, batch_size=1, accumulation=1)
    index = build_index(LocalDataset(tmp_path), data.repo, data.revision, data.config, 2)
    got = load(tmp_path, index, tokenizer, one, rank=0)
    long = got.row_groups.index(RowGroup("a.parquet", 1, 1))
    assert got.num_steps(10**9) > 0
    assert {k for step in range(got.num_steps(10**9)) for k, _ in got.samples(step)} == {long}


def test_validator_builds_the_very_same_round(folder: Path, index: DatasetIndex, tokenizer: Any, data: Data) -> None:
    miner, validator = load(folder, index, tokenizer, data), load(folder, index, tokenizer, data)
    assert miner.digests == validator.digests
    assert miner.digest == validator.digest
    assert all(torch.equal(miner.batch(step), validator.batch(step)) for step in range(miner.num_steps(50)))


def test_another_rank_or_round_has_other_tokens(folder: Path, index: DatasetIndex, tokenizer: Any, data: Data) -> None:
    here = load(folder, index, tokenizer, data)
    assert not set(here.digests) & set(load(folder, index, tokenizer, data, rank=2).digests)
    assert here.digest != load(folder, index, tokenizer, data, round_number=4).digest


def test_rank_without_a_slot_reads_nothing(folder: Path, index: DatasetIndex, tokenizer: Any, data: Data) -> None:
    with pytest.raises(NoSlot):
        load(folder, index, tokenizer, data, rank=4)


@pytest.mark.parametrize("change", [{"repo": "o/other"}, {"revision": "abc"}, {"config": "sample-10BT"}])
def test_index_of_another_data_set_is_refused(
    folder: Path, index: DatasetIndex, tokenizer: Any, data: Data, change: dict[str, str]
) -> None:
    other = replace(index, **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="index is of another data set"):
        load(folder, other, tokenizer, data)
    with pytest.raises(DataError, match="index is of another data set"):
        load_heldout(SegmentReader(LocalDataset(folder), "text"), other, tokenizer, data)


def test_heldout_batches_are_the_last_row_groups_and_never_assigned(
    folder: Path, index: DatasetIndex, tokenizer: Any, data: Data
) -> None:
    heldout = load_heldout(SegmentReader(LocalDataset(folder), "text"), index, tokenizer, data)
    texts = [f"file 1 group 5 row {row} of a fox" for row in range(12)]
    assert torch.equal(heldout, pack(texts, tokenizer, 8)[:6].view(3, 2, 8))
    assert not set(index.heldout) & set(index.train)


def test_heldout_batches_are_as_many_as_there_are(
    folder: Path, index: DatasetIndex, tokenizer: Any, data: Data
) -> None:
    many = replace(data, heldout_batches=10**6)
    heldout = load_heldout(SegmentReader(LocalDataset(folder), "text"), index, tokenizer, many)
    windows = [
        pack([f"file 1 group {group} row {row} of a fox" for row in range(12)], tokenizer, 8) for group in (5, 6)
    ]
    num_batches = sum(map(len, windows)) // 2
    assert torch.equal(heldout, torch.cat(windows)[: num_batches * 2].view(num_batches, 2, 8))


def test_heldout_text_too_short_for_a_batch_is_refused(tmp_path: Path, tokenizer: Any, data: Data) -> None:
    write(tmp_path / "a.parquet", [["train"], ["a"], ["b"]])
    index = build_index(LocalDataset(tmp_path), data.repo, data.revision, data.config, 2)
    with pytest.raises(DataError, match="at least 2 windows of 8 tokens, got 0"):
        load_heldout(SegmentReader(LocalDataset(tmp_path), "text"), index, tokenizer, data)
