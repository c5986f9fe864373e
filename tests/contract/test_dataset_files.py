"""One suite over both data sets: in a folder, and on a hub server in a process of its own."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import SHUT_WR, create_server, socket
from socket import create_connection as connect

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hivetrain.errors import DataError, ServiceError
from hivetrain.hub.client import HubDataset, publish_dataset
from hivetrain.hub.dataset import DatasetFiles, LocalDataset
from tests.hub_fixture import HubProcess, running_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROWS_PER_GROUP = 200
NUM_GROUPS = 20


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub")) as process:
        yield process


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    rows = [f"{row} " * 200 for row in range(ROWS_PER_GROUP * NUM_GROUPS)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), sink, row_group_size=ROWS_PER_GROUP, compression="none")
    small = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), small)
    return {
        "sample/b.parquet": sink.getvalue(),
        "sample/a.parquet": small.getvalue(),
        "other/c.parquet": small.getvalue(),
        "README.md": b"---\nlicense: mit\n---\n",
    }


@pytest.fixture(params=["folder", "hub"])
def dataset(request: pytest.FixtureRequest, hub: HubProcess, files: dict[str, bytes], tmp_path: Path) -> DatasetFiles:
    if request.param == "hub":
        return HubDataset(hub.url, "owner/corpus", publish_dataset(hub.url, "owner/corpus", files))
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return LocalDataset(tmp_path)


def test_parquet_files_are_listed_in_order_with_their_sizes(dataset: DatasetFiles, files: dict[str, bytes]) -> None:
    expected = [(name, len(files[name])) for name in ("sample/a.parquet", "sample/b.parquet")]
    assert dataset.list_parquet("sample") == expected
    assert dataset.list_parquet("") == [("other/c.parquet", len(files["other/c.parquet"])), *expected]
    assert dataset.list_parquet("nowhere") == []


def test_an_opened_file_reads_and_seeks_like_any_other(dataset: DatasetFiles, files: dict[str, bytes]) -> None:
    data = files["sample/a.parquet"]
    with dataset.open("sample/a.parquet") as file:
        assert file.read(4) == b"PAR1"
        assert file.seek(-4, io.SEEK_END) == len(data) - 4
        assert file.read() == b"PAR1"
        assert file.read(10) == b""
        file.seek(2)
        file.seek(1, io.SEEK_CUR)
        assert (file.tell(), file.read(5)) == (3, data[3:8])


def test_row_groups_read_right(dataset: DatasetFiles) -> None:
    with dataset.open("sample/b.parquet") as file:
        parquet = pq.ParquetFile(file)
        assert parquet.num_row_groups == NUM_GROUPS
        for group in (0, 13, NUM_GROUPS - 1):
            first = parquet.read_row_group(group).column("text")[0].as_py()
            assert first == f"{group * ROWS_PER_GROUP} " * 200


def test_a_missing_file_is_a_data_error(dataset: DatasetFiles) -> None:
    with pytest.raises(DataError, match="missing"):
        dataset.open("sample/missing.parquet")


def test_a_path_outside_the_data_set_is_refused(dataset: DatasetFiles) -> None:
    with pytest.raises(ServiceError, match="outside"):
        dataset.open("../outside.parquet")


def test_a_revision_pins_the_bytes(hub: HubProcess, files: dict[str, bytes]) -> None:
    old = publish_dataset(hub.url, "owner/moving", {"a.parquet": files["sample/a.parquet"]})
    assert publish_dataset(hub.url, "owner/moving", {"a.parquet": files["sample/a.parquet"]}) == old
    new = publish_dataset(hub.url, "owner/moving", {"a.parquet": files["sample/b.parquet"]})
    assert HubDataset(hub.url, "owner/moving", "").resolve_revision() == new
    assert HubDataset(hub.url, "owner/moving", old).list_parquet("") == [("a.parquet", len(files["sample/a.parquet"]))]
    assert HubDataset(hub.url, "owner/moving", new).list_parquet("") == [("a.parquet", len(files["sample/b.parquet"]))]


class CountingRelay:
    """Passes TCP on to a port and counts the bytes that come back."""

    def __init__(self, port: int) -> None:
        self.num_bytes = 0
        self._port = port
        self._listener = create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = connect(("127.0.0.1", self._port))
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket, sink: socket, count: bool) -> None:
        with source:
            try:
                while data := source.recv(65536):
                    self.num_bytes += len(data) if count else 0
                    sink.sendall(data)
                sink.shutdown(SHUT_WR)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()


def test_one_row_group_moves_little_more_than_its_own_bytes(hub: HubProcess, files: dict[str, bytes]) -> None:
    commit = publish_dataset(hub.url, "owner/corpus", files)
    relay = CountingRelay(hub.port)
    try:
        with HubDataset(relay.url, "owner/corpus", commit).open("sample/b.parquet") as file:
            parquet = pq.ParquetFile(file)
            group_bytes = parquet.metadata.row_group(7).total_byte_size
            assert len(parquet.read_row_group(7)) == ROWS_PER_GROUP
        whole = len(files["sample/b.parquet"])
        footer_and_headers = 80_000  # the reader takes 64 KiB of the end at once
        assert group_bytes < relay.num_bytes < group_bytes + footer_and_headers < whole / 4
    finally:
        relay.close()
