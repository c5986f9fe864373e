"""A round's data through the real hub server and the real hub client."""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hivetrain.data.index import DatasetIndex, RowGroup, build_index, parse_index
from hivetrain.data.reader import SegmentReader, load_heldout, load_round
from hivetrain.data.tokenizer import train_tokenizer
from hivetrain.errors import DataError, HubError
from hivetrain.hub.client import HubDataset, publish_dataset
from hivetrain.hub.dataset import LocalDataset
from hivetrain.run import Data

# huggingface_hub sends commits through a spelling that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPO = "hivetrain/corpus"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [
        sys.executable,
        "-m",
        "hivetrain.hub.server",
        "--dir",
        str(tmp_path_factory.mktemp("hub")),
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        lines: queue.Queue[str] = queue.Queue()
        assert server.stderr is not None
        drain = threading.Thread(target=lambda stream: [lines.put(line) for line in stream], args=(server.stderr,))
        drain.start()
        try:
            while not (found := re.search(r"model hub on (http://\S+)", line := lines.get(timeout=60))):
                assert line
            yield found[1]
        finally:
            server.terminate()
            server.wait(timeout=30)
            drain.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for file in range(2):
        path = folder / f"sample/350BT/000_{file:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, pa.schema([("text", pa.string()), ("id", pa.string())])) as writer:
            for group in range(10):
                texts = [f"the text of row {row} in row group {group} of file {file}" for row in range(40)]
                writer.write_table(pa.table({"text": texts, "id": [f"{file}-{group}-{row}" for row in range(40)]}))
    return folder


@pytest.fixture(scope="module")
def revision(endpoint: str, folder: Path) -> str:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.parquet"))}
    return publish_dataset(endpoint, REPO, files)


def recipe(revision: str) -> Data:
    return Data(
        repo=REPO, config="sample-350BT", revision=revision, seq_len=16, max_miners=3, heldout_batches=2, accumulation=2
    )


def test_miner_on_local_files_and_validator_on_the_hub_read_the_very_same_tokens(
    endpoint: str, folder: Path, revision: str
) -> None:
    data = recipe(revision)
    local = LocalDataset(folder)
    hub = HubDataset(endpoint=endpoint, repo=REPO, revision=revision)
    tokenizer = train_tokenizer(["the text of row in row group of file " * 9], 280)

    def index(files: LocalDataset | HubDataset) -> DatasetIndex:
        return build_index(files, data.repo, data.revision, data.config, data.heldout_row_groups)

    assert index(local).sha256() == index(hub).sha256()
    published = parse_index(index(local).to_json())

    def load(files: LocalDataset | HubDataset) -> tuple[Any, torch.Tensor]:
        reader = SegmentReader(files, data.text_column)
        got = load_round(reader, published, tokenizer, run_id="ab" * 32, round_number=1, rank=2, data=data)
        return got, load_heldout(reader, published, tokenizer, data)

    (miner, heldout), (validator, heldout_too) = load(local), load(hub)
    assert miner.digests == validator.digests
    assert miner.num_steps(50) == validator.num_steps(50) > 2
    assert all(torch.equal(miner.batch(step), validator.batch(step)) for step in range(miner.num_steps(50)))
    assert torch.equal(heldout, heldout_too)
    assert heldout.shape == (2, 4, 16)


def test_file_that_the_hub_lacks_is_a_data_error(endpoint: str, revision: str) -> None:
    reader = SegmentReader(HubDataset(endpoint=endpoint, repo=REPO, revision=revision), "text")
    with pytest.raises(DataError, match=r"000_00009\.parquet"):
        reader.read(RowGroup("sample/350BT/000_00009.parquet", 0, 40))


def test_data_set_that_the_hub_lacks_is_a_service_error(endpoint: str) -> None:
    with pytest.raises(HubError):
        build_index(HubDataset(endpoint=endpoint, repo="nobody/nothing", revision="main"), REPO, "", "", 1)


def test_folder_that_the_data_set_lacks_is_a_data_error(endpoint: str, revision: str) -> None:
    files = HubDataset(endpoint=endpoint, repo=REPO, revision=revision)
    with pytest.raises(DataError, match="no parquet file under 'sample/10BT/'"):
        build_index(files, REPO, revision, "sample-10BT", 1)
