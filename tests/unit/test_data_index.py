from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hivetrain.data.index import (
    MAX_INDEX_BYTES,
    DatasetIndex,
    RowGroup,
    build_index,
    config_folder,
    parse_index,
)
from hivetrain.errors import ConfigError, DataError
from hivetrain.hub.dataset import LocalDataset


def write(path: Path, rows: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for count in rows:
            writer.write_table(pa.table({"text": [f"row {n}" for n in range(count)]}, schema=schema))


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    write(tmp_path / "b.parquet", [5, 6])
    write(tmp_path / "a.parquet", [3, 4])
    (tmp_path / "readme.md").write_text("not data")
    return build_index(LocalDataset(tmp_path), "o/n", "rev", "", 1)


def test_index_lists_row_groups_by_path_and_holds_the_last_out(index: DatasetIndex) -> None:
    assert index.train == (RowGroup("a.parquet", 0, 3), RowGroup("a.parquet", 1, 4), RowGroup("b.parquet", 0, 5))
    assert index.heldout == (RowGroup("b.parquet", 1, 6),)


def test_index_survives_its_json_and_the_hash_is_of_those_bytes(index: DatasetIndex) -> None:
    blob = index.to_json()
    assert parse_index(blob) == index
    assert index.sha256() == hashlib.sha256(blob).hexdigest()
    assert json.loads(blob)["files"] == [
        {"path": "a.parquet", "num_rows": [3, 4]},
        {"path": "b.parquet", "num_rows": [5, 6]},
    ]


def test_empty_row_groups_and_files_are_left_out_but_keep_their_places(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    with pq.ParquetWriter(tmp_path / "a.parquet", empty.schema) as writer:
        writer.write_table(pa.table({"text": ["x"]}))
        writer.write_table(empty)
        writer.write_table(pa.table({"text": ["y", "z"]}))
    write(tmp_path / "b.parquet", [])
    places = pq.read_metadata(tmp_path / "a.parquet")
    filled = [n for n in range(places.num_row_groups) if places.row_group(n).num_rows]
    index = build_index(LocalDataset(tmp_path), "o/n", "rev", "", 1)
    assert [group.index for group in index.train + index.heldout] == filled
    assert parse_index(index.to_json()) == index


def test_config_names_the_folder_that_is_indexed(tmp_path: Path) -> None:
    write(tmp_path / "sample/350BT/000_00000.parquet", [2, 2])
    write(tmp_path / "sample/10BT/000_00000.parquet", [9])
    write(tmp_path / "data/CC-MAIN-2024-10/000_00000.parquet", [7])
    index = build_index(LocalDataset(tmp_path), "HuggingFaceFW/fineweb", "rev", "sample-350BT", 1)
    assert [group.path for group in index.train] == ["sample/350BT/000_00000.parquet"]
    assert index.config == "sample-350BT"


@pytest.mark.parametrize(
    ("config", "folder"),
    [
        ("", ""),
        ("sample-350BT", "sample/350BT/"),
        ("CC-MAIN-2024-10", "data/CC-MAIN-2024-10/"),
        ("data", "data/"),
        ("a/b", "a/b/"),
    ],
)
def test_config_folder(config: str, folder: str) -> None:
    assert config_folder(config) == folder


@pytest.mark.parametrize("config", ["/etc", "../up", "a/../b", "a//b", "a/", "a\\b", "."])
def test_config_that_leaves_the_data_set_is_refused(config: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.config"):
        config_folder(config)


def test_data_set_without_parquet_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no parquet file under 'sample/350BT/'"):
        build_index(LocalDataset(tmp_path), "o/n", "rev", "sample-350BT", 1)


def test_file_that_is_not_parquet_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 is not enough" * 10)
    with pytest.raises(DataError, match=r"bad\.parquet: expected a parquet file"):
        build_index(LocalDataset(tmp_path), "o/n", "rev", "", 1)


def test_data_set_that_would_be_held_out_whole_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [1, 1])
    with pytest.raises(DataError, match=r"more than the 2 row groups .* got 2"):
        build_index(LocalDataset(tmp_path), "o/n", "rev", "", 2)


def test_index_without_heldout_row_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heldout_row_groups"):
        build_index(LocalDataset(tmp_path), "o/n", "rev", "", 0)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("files"), "files"),
        (lambda d: d.update(files=[]), "files"),
        (lambda d: d.update(repo="no-owner"), "repo"),
        (lambda d: d.update(repo="../../x"), "repo"),
        (lambda d: d.update(revision="r" * 201), "revision"),
        (lambda d: d.update(heldout_row_groups=0), "heldout_row_groups"),
        (lambda d: d.update(heldout_row_groups=4), "more than the 4 held-out row groups, got 4"),
        (lambda d: d["files"][0].update(num_rows=[-1, 4]), "num_rows"),
        (lambda d: d["files"][0].update(num_rows=["3", 4]), "num_rows"),
        (lambda d: d["files"][0].update(num_rows=[10**9, 4]), "num_rows"),
        (lambda d: d["files"][0].update(path="/etc/a.parquet"), "relative path"),
        (lambda d: d["files"][0].update(path="../a.parquet"), "relative path"),
        (lambda d: d["files"][0].update(path="a/./a.parquet"), "relative path"),
        (lambda d: d["files"][0].update(path="a\\a.parquet"), "relative path"),
        (lambda d: d["files"][0].update(path="a\n.parquet"), "relative path"),
        (lambda d: d["files"][0].update(path="a.txt"), "relative path"),
        (lambda d: d["files"][0].update(path="b.parquet"), "each path once and in order"),
        (lambda d: d["files"].reverse(), "each path once and in order"),
        (lambda d: d["files"][0]["num_rows"].append(0), "canonical"),
    ],
)
def test_altered_index_is_refused(index: DatasetIndex, change: Change, message: str) -> None:
    document = json.loads(index.to_json())
    change(document)
    with pytest.raises(DataError, match=message):
        parse_index(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())


def test_index_in_another_spelling_is_refused(index: DatasetIndex) -> None:
    with pytest.raises(DataError, match="canonical"):
        parse_index(json.dumps(json.loads(index.to_json()), indent=1).encode())


@pytest.mark.parametrize("blob", [b"", b"[]", b"\xff\xfe", b'{"format":', b"null"])
def test_bytes_that_are_no_index_are_refused(blob: bytes) -> None:
    with pytest.raises(DataError, match="data set index"):
        parse_index(blob)


def test_oversize_index_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(DataError, match="at most"):
        parse_index(b" " * (MAX_INDEX_BYTES + 1))
