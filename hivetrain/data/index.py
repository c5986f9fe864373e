"""The row groups of a data set at a pinned revision: what an assignment's numbers mean.

Genesis reads the footer of every parquet file once and publishes the index, so that a neuron which needs one
row group neither lists the data set nor opens other files. Every node must have the same index: its sha256 is
over the canonical bytes. Row counts are kept per file, because a data set of 350 B tokens has about half a
million row groups and the index still has to be a few MB.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hivetrain.errors import ConfigError, DataError, ServiceError

if TYPE_CHECKING:
    from hivetrain.hub.dataset import DatasetFiles

MAX_INDEX_BYTES = 64 * 2**20
MAX_FILES = 100_000
FORMAT = "hivetrain-index/1"
_PATH = re.compile(r"(?!/)(?!.*(^|/)\.{1,2}(/|$))[^\\\x00-\x1f]{1,500}\.parquet")


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of one parquet file."""

    path: str  # in the data set's repository
    index: int  # place in the file, from 0
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetIndex:
    """Every non-empty row group of a data set, in order of path and place; the last ones are held out."""

    repo: str
    revision: str
    config: str
    train: tuple[RowGroup, ...]
    heldout: tuple[RowGroup, ...]

    def to_json(self) -> bytes:
        """The canonical bytes, which `parse_index` reads back."""
        files: dict[str, list[int]] = {}
        for group in self.train + self.heldout:
            counts = files.setdefault(group.path, [])
            counts.extend([0] * (group.index - len(counts)))  # empty row groups
            counts.append(group.num_rows)
        document = {
            "format": FORMAT,
            "repo": self.repo,
            "revision": self.revision,
            "config": self.config,
            "heldout_row_groups": len(self.heldout),
            "files": [{"path": path, "num_rows": counts} for path, counts in files.items()],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    def sha256(self) -> str:
        """Hex digest of the canonical bytes."""
        return hashlib.sha256(self.to_json()).hexdigest()


def config_folder(config: str) -> str:
    """Folder that holds a configuration's parquet files, with a trailing slash; "" is the whole data set.

    "sample-350BT" is "sample/350BT/" and "CC-MAIN-2024-10" is "data/CC-MAIN-2024-10/", as in
    https://huggingface.co/datasets/HuggingFaceFW/fineweb; any other name is itself a folder.

    Raises:
        ConfigError: an absolute path, or one that leaves the data set.
    """
    if not config:
        return ""
    if config.startswith("/") or "\\" in config or any(part in ("", ".", "..") for part in config.split("/")):
        raise ConfigError(f'data.config must be a folder inside the data set such as "sample-350BT", got {config!r}')
    if config.startswith("sample-"):
        return f"sample/{config.removeprefix('sample-')}/"
    if config.startswith("CC-MAIN-"):
        return f"data/{config}/"
    return f"{config}/"


def build_index(files: DatasetFiles, repo: str, revision: str, config: str, heldout_row_groups: int) -> DatasetIndex:
    """Index a data set by reading its parquet footers and nothing else.

    Raises:
        DataError: no parquet file, a file that is not parquet, or too few row groups to train on.
        HubError: the hub did not answer.
    """
    if heldout_row_groups < 1:
        raise ValueError(f"heldout_row_groups must be >= 1, got {heldout_row_groups}")
    folder = config_folder(config)
    listed = files.list_parquet(folder)
    if not listed:
        raise DataError(f"{repo}: no parquet file under {folder or 'its root'!r} at revision {revision!r}")
    groups: list[RowGroup] = []
    for path, _ in listed:
        groups.extend(
            RowGroup(path, place, num_rows)
            for place, num_rows in enumerate(_rows_per_group(files, path))
            if num_rows > 0
        )
    if len(groups) <= heldout_row_groups:
        raise DataError(
            f"{repo}: expected more than the {heldout_row_groups} row groups that data.heldout_row_groups holds out, "
            f"got {len(groups)}"
        )
    return _split(repo=repo, revision=revision, config=config, groups=groups, num_heldout=heldout_row_groups)


def _split(*, repo: str, revision: str, config: str, groups: list[RowGroup], num_heldout: int) -> DatasetIndex:
    return DatasetIndex(
        repo=repo,
        revision=revision,
        config=config,
        train=tuple(groups[:-num_heldout]),
        heldout=tuple(groups[-num_heldout:]),
    )


def _rows_per_group(files: DatasetFiles, path: str) -> list[int]:
    try:
        with files.open(path) as stream:
            footer = pq.read_metadata(stream)
    except ServiceError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: expected a parquet file with a readable footer, got: {exc}") from exc
    return [footer.row_group(place).num_rows for place in range(footer.num_row_groups)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    path: str = Field(max_length=512)
    num_rows: list[Annotated[int, Field(ge=0, le=10_000_000)]] = Field(max_length=1_000_000)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["hivetrain-index/1"]
    repo: str = Field(max_length=200, pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(max_length=200)
    config: str = Field(max_length=200)
    heldout_row_groups: int = Field(ge=1)
    files: list[_File] = Field(min_length=1, max_length=MAX_FILES)


def parse_index(blob: bytes) -> DatasetIndex:
    """Read an index from bytes of anybody.

    Raises:
        DataError: past `MAX_INDEX_BYTES`, not the document that `to_json` writes, an unsafe, repeated or
            unsorted path, or held-out row groups that leave nothing to train on.
    """
    if len(blob) > MAX_INDEX_BYTES:
        raise DataError(f"data set index: expected at most {MAX_INDEX_BYTES} bytes, got {len(blob)}")
    try:
        document = _Document.model_validate_json(blob)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise DataError(f"data set index: {place}: {first['msg']}") from exc
    paths = [file.path for file in document.files]
    for path in paths:
        if not _PATH.fullmatch(path):
            raise DataError(f"data set index: expected a relative path of a .parquet file, got {path!r}")
    if paths != sorted(set(paths)):
        raise DataError("data set index: expected each path once and in order")
    groups = [
        RowGroup(file.path, place, num_rows)
        for file in document.files
        for place, num_rows in enumerate(file.num_rows)
        if num_rows
    ]
    if len(groups) <= document.heldout_row_groups:
        raise DataError(
            f"data set index: expected more than the {document.heldout_row_groups} held-out row groups, "
            f"got {len(groups)}"
        )
    index = _split(
        repo=document.repo,
        revision=document.revision,
        config=document.config,
        groups=groups,
        num_heldout=document.heldout_row_groups,
    )
    if index.to_json() != blob:
        raise DataError("data set index: expected the canonical bytes, got another spelling of the same index")
    return index
