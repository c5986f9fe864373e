"""What both stores share, and the file that reads by range."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hivetrain.errors import HubError, IntegrityError
from hivetrain.hub.dataset import RangeFile
from hivetrain.hub.memory import MemoryStore
from hivetrain.hub.store import (
    check_name,
    checked,
    epochs_to_drop,
    fetch_verified,
    make_ref,
    parse_epoch_tag,
    write_atomically,
)
from hivetrain.manifest import epoch_tag
from tests.hub_fixture import make_manifest

DATA = bytes(range(256)) * 4


@given(
    epochs=st.sets(st.integers(0, 30)),
    keep=st.integers(1, 40),
)
def test_what_is_kept_is_epoch_0_and_the_newest(epochs: set[int], keep: int) -> None:
    dropped = epochs_to_drop(epochs, keep)
    kept = epochs - set(dropped)
    assert dropped == sorted(dropped)
    assert set(sorted(epochs)[-keep:]) <= kept
    assert kept - set(sorted(epochs)[-keep:]) == ({0} & epochs) - set(sorted(epochs)[-keep:])


@pytest.mark.parametrize("epoch", [0, 42, 999_999, 1_000_000])
def test_epoch_tags_parse_back(epoch: int) -> None:
    assert parse_epoch_tag(epoch_tag(epoch)) == epoch


@pytest.mark.parametrize(
    "tag", ["epoch-1", "epoch-0000001x", "v1", "epoch-", "epoch-0000001", "xepoch-000001", "epoch-00000１"]
)
def test_other_tags_are_no_epochs(tag: str) -> None:
    assert parse_epoch_tag(tag) is None


def test_a_manifest_under_another_epochs_tag_is_refused() -> None:
    with pytest.raises(IntegrityError, match="epoch 2 holds the manifest of epoch 1"):
        make_ref(2, "0" * 40, make_manifest(1, {}).to_bytes())
    with pytest.raises(IntegrityError, match="not a manifest"):
        make_ref(1, "0" * 40, b"{}")


def test_an_endless_download_is_abandoned_at_the_published_size(tmp_path: Path) -> None:
    store = MemoryStore()
    ref = store.publish(make_manifest(1, {"f": DATA}), {"f": DATA})
    drawn = []

    def endless() -> Iterator[bytes]:
        while True:
            drawn.append(1)
            yield DATA

    with pytest.raises(IntegrityError, match="longer than the 1024 bytes"):
        fetch_verified(ref, "f", tmp_path, endless)
    assert len(drawn) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_short_download_is_refused() -> None:
    with pytest.raises(IntegrityError, match="has 3 bytes"):
        list(checked("f", [b"abc"], size_bytes=4))


def test_a_folder_that_cannot_be_written_is_a_hub_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HubError, match="cannot write"):
        write_atomically(tmp_path / "file" / "below", [b"x"])


def test_plain_names_pass() -> None:
    for name in ("a", "a/b.c", "a-b_c.safetensors", "a..b"):
        check_name(name)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(-1, 2000), st.just(0)),
            st.tuples(st.just("seek"), st.integers(0, 1500), st.sampled_from([io.SEEK_SET, io.SEEK_CUR])),
            st.tuples(st.just("seek"), st.integers(-1024, 0), st.just(io.SEEK_END)),
        ),
        max_size=10,
    )
)
def test_a_range_file_behaves_like_a_file_and_reads_no_byte_more(steps: list[tuple[str, int, int]]) -> None:
    asked = 0

    def read_range(start: int, stop: int) -> bytes:
        nonlocal asked
        assert 0 <= start < stop <= len(DATA)
        asked += stop - start
        return DATA[start:stop]

    ours, model, delivered = RangeFile(len(DATA), read_range), io.BytesIO(DATA), 0
    for kind, value, whence in steps:
        if kind == "seek":
            assert ours.seek(value, whence) == model.seek(value, whence)
        else:
            data = ours.read(value)
            delivered += len(data)
            assert data == model.read(value)
        assert ours.tell() == model.tell()
    assert asked == delivered


def test_a_range_file_fills_buffers() -> None:
    file = RangeFile(len(DATA), lambda start, stop: DATA[start:stop])
    buffer = bytearray(10)
    file.seek(-4, io.SEEK_END)
    assert file.readinto(buffer) == 4
    assert bytes(buffer[:4]) == DATA[-4:]
    with pytest.raises(ValueError, match="cannot seek"):
        file.seek(-1)
