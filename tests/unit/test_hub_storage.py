"""The hub server's store: trees of a history, references, and what collection frees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.hub.blobs import BlobMismatch, IncomingBlob
from hivetrain.hub.records import Change, Refused, entry_of
from hivetrain.hub.storage import PENDING_GRACE_S, HubStorage


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(tmp_path: Path, clock: Clock) -> Iterator[HubStorage]:
    storage = HubStorage(tmp_path / "hub", clock)
    storage.start()
    storage.create_repo("model", "a/b")
    yield storage
    storage.close()


@pytest.fixture
def repo(storage: HubStorage) -> int:
    return storage.repo("model", "a/b")


def write(storage: HubStorage, repo: int, branch: str = "main", parent: str = "", **files: bytes | None) -> str:
    """Commit ``files``; None deletes."""
    changes = [
        Change(path=path, entry=None if data is None else storage.put_file(path, data)) for path, data in files.items()
    ]
    return storage.commit(repo, branch, changes, title="test", message="", parent=parent)


def upload(storage: HubStorage, data: bytes) -> str:
    sha256 = hashlib.sha256(data).hexdigest()
    storage.spare(sha256)
    with IncomingBlob(storage.blobs, len(data)) as blob:
        blob.write(data)
        blob.keep(sha256, len(data))
    return sha256


def test_a_new_repository_is_one_empty_commit(storage: HubStorage, repo: int) -> None:
    head = storage.resolve(repo, "main")
    assert storage.tree(repo, head) == {}
    assert [commit.sha for commit in storage.history(repo, head)] == [head]
    assert not storage.create_repo("model", "a/b")
    assert storage.create_repo("dataset", "a/b")


def test_git_names_of_files_are_gits() -> None:
    # `printf hello | git hash-object --stdin`, and the same over an LFS pointer.
    assert entry_of("x", "0" * 64, 5, data=b"hello").git_oid == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    sha256 = hashlib.sha256(b"hello").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 5\n".encode()
    plain = entry_of("x", "0" * 64, len(pointer), data=pointer)
    assert entry_of("x", sha256, 5, data=None).git_oid == plain.git_oid


def test_every_commit_keeps_its_own_tree(storage: HubStorage, repo: int) -> None:
    first = write(storage, repo, x=b"1", y=b"1")
    second = write(storage, repo, x=b"2")
    third = write(storage, repo, y=None, z=b"3")
    fourth = write(storage, repo, y=b"4")
    contents = [
        {path: storage.blobs.read(entry.blob) for path, entry in storage.tree(repo, sha).items()}
        for sha in (first, second, third, fourth)
    ]
    assert contents == [
        {"x": b"1", "y": b"1"},
        {"x": b"2", "y": b"1"},
        {"x": b"2", "z": b"3"},
        {"x": b"2", "y": b"4", "z": b"3"},
    ]
    assert [commit.sha for commit in storage.history(repo, fourth)][:4] == [fourth, third, second, first]
    with pytest.raises(Refused, match="no file 'y'"):
        storage.entry(repo, third, "y")


@settings(max_examples=15, deadline=None)
@given(
    history=st.lists(
        st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.binary(max_size=2)), min_size=1), max_size=6
    )
)
def test_the_tree_is_what_a_dict_would_be(
    tmp_path_factory: pytest.TempPathFactory, history: list[dict[str, bytes | None]]
) -> None:
    storage = HubStorage(tmp_path_factory.mktemp("hub"))
    storage.start()
    try:
        storage.create_repo("model", "a/b")
        repo = storage.repo("model", "a/b")
        expected: dict[str, bytes] = {}
        for files in history:
            if any(data is None and path not in expected for path, data in files.items()):
                with pytest.raises(Refused, match="doesn't exist"):
                    write(storage, repo, **files)
            else:
                write(storage, repo, **files)
                expected |= {path: data for path, data in files.items() if data is not None}
                expected = {path: data for path, data in expected.items() if files.get(path, b"") is not None}
        tree = storage.tree(repo, storage.resolve(repo, "main"))
        assert {path: storage.blobs.read(entry.blob) for path, entry in tree.items()} == expected
    finally:
        storage.close()


def test_a_stale_parent_is_refused_and_changes_nothing(storage: HubStorage, repo: int) -> None:
    first = write(storage, repo, x=b"1")
    second = write(storage, repo, parent=first, x=b"2")
    with pytest.raises(Refused) as refused:
        write(storage, repo, parent=first, x=b"3")
    assert refused.value.status == 412
    assert storage.resolve(repo, "main") == second


def test_a_commit_of_bytes_that_were_not_uploaded_is_refused(storage: HubStorage, repo: int) -> None:
    sha256 = upload(storage, b"four")
    for blob, size in (("f" * 64, 4), (sha256, 5)):
        change = Change(path="x", entry=entry_of("x", blob, size, data=None))
        with pytest.raises(Refused, match="not uploaded"):
            storage.commit(repo, "main", [change], title="", message="", parent="")
    assert storage.tree(repo, storage.resolve(repo, "main")) == {}


def test_a_tag_is_put_only_if_absent(storage: HubStorage, repo: int) -> None:
    first = storage.resolve(repo, "main")
    storage.create_ref(repo, "tag", "v1", "main")
    second = write(storage, repo, x=b"1")
    with pytest.raises(Refused) as refused:
        storage.create_ref(repo, "tag", "v1", second)
    assert refused.value.status == 409
    assert storage.resolve(repo, "v1") == first


@pytest.mark.parametrize(("kind", "name", "status"), [("branch", "main", 400), ("branch", "x", 404), ("tag", "x", 404)])
def test_references_that_cannot_be_deleted(storage: HubStorage, repo: int, kind: str, name: str, status: int) -> None:
    with pytest.raises(Refused) as refused:
        storage.delete_ref(repo, kind, name)
    assert refused.value.status == status


def test_revisions_of_another_repository_are_unknown(storage: HubStorage, repo: int) -> None:
    storage.create_repo("model", "c/d")
    foreign = write(storage, storage.repo("model", "c/d"), x=b"1")
    with pytest.raises(Refused, match="no revision"):
        storage.resolve(repo, foreign)
    assert storage.tree(repo, foreign) == {}


def test_collection_frees_what_only_a_dead_branch_held(storage: HubStorage, repo: int) -> None:
    shared, own = b"shared" * 100, b"own" * 100
    write(storage, repo, x=shared)
    storage.create_ref(repo, "branch", "side", "main")
    side = write(storage, repo, "side", y=own, z=shared)
    assert storage.collect() == (0, 0)
    storage.delete_ref(repo, "branch", "side")
    assert storage.collect() == (1, len(own))
    assert storage.blobs.read(hashlib.sha256(shared).hexdigest()) == shared
    with pytest.raises(Refused, match="no revision"):
        storage.resolve(repo, side)


def test_collection_keeps_overwritten_files_of_a_living_history(storage: HubStorage, repo: int) -> None:
    first = write(storage, repo, x=b"old")
    write(storage, repo, x=b"new")
    assert storage.collect() == (0, 0)
    assert storage.blobs.read(storage.entry(repo, first, "x").blob) == b"old"
    storage.squash(repo, "main", "squashed")
    assert storage.collect() == (1, 3)
    assert storage.blobs.read(storage.entry(repo, storage.resolve(repo, "main"), "x").blob) == b"new"


def test_collection_spares_an_upload_until_its_grace_is_over(storage: HubStorage, clock: Clock) -> None:
    sha256 = upload(storage, b"uploaded")
    clock.now += PENDING_GRACE_S - 1
    assert storage.collect() == (0, 0)
    assert storage.has_blob(sha256, 8)  # a client was told that it need not upload
    clock.now += PENDING_GRACE_S - 1
    assert storage.collect() == (0, 0)
    clock.now += 1
    assert storage.collect() == (1, 8)
    assert not storage.has_blob(sha256, 8)


def test_a_file_that_no_row_names_is_collected(storage: HubStorage) -> None:
    storage.blobs.put(b"left by a kill")
    assert storage.collect() == (1, 14)


def test_everything_is_there_after_a_restart(storage: HubStorage, repo: int, tmp_path: Path) -> None:
    sha = write(storage, repo, x=b"1")
    secret = storage.upload_secret()
    storage.close()
    again = HubStorage(tmp_path / "hub")
    again.start()
    try:
        assert again.resolve(again.repo("model", "a/b"), "main") == sha
        assert again.upload_secret() == secret
    finally:
        again.close()


def test_a_folder_has_one_owner(storage: HubStorage, tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError):
        HubStorage(tmp_path / "hub").start()


@pytest.mark.parametrize(
    ("data", "announced", "size_bytes"),
    [(b"wrong", b"right", 5), (b"righ", b"right", 5), (b"right", b"right", 4), (b"longer", b"right", 5)],
)
def test_wrong_uploads_leave_nothing(storage: HubStorage, data: bytes, announced: bytes, size_bytes: int) -> None:
    def receive() -> None:
        with IncomingBlob(storage.blobs, 5) as blob:
            blob.write(data)
            blob.keep(hashlib.sha256(announced).hexdigest(), size_bytes)

    with pytest.raises(BlobMismatch, match="announced"):
        receive()
    assert list(storage.blobs.names()) == []
    assert list(storage.blobs.temp_dir.iterdir()) == []
