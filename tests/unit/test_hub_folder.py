"""A copy of the hub in a folder: what is mirrored is found again, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from hivetrain.errors import HubError, HubNotFound, IntegrityError
from hivetrain.hub.client import HubStore
from hivetrain.hub.folder import FolderStore, mirror
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import MANIFEST_NAME
from tests.hub_fixture import make_manifest

FILES = {"run.toml": b"name = 'x'\n", "base/weights.safetensors": b"\0" * 5000}


@pytest.fixture
def hub() -> MemoryStore:
    store = MemoryStore()
    store.publish(make_manifest(0, FILES), FILES)
    store.publish(make_manifest(1, {}), {})
    store.publish_artefacts("a/b", "checks", {"checks/round-000000/me.json": b"{}"})
    return store


@pytest.fixture
def copy(hub: MemoryStore, tmp_path: Path) -> FolderStore:
    # Memory and hub keep one contract (tests/contract/test_model_store.py).
    assert mirror(cast("HubStore", hub), "a/b", "checks", tmp_path) == 2
    return FolderStore(tmp_path)


def test_a_copy_holds_what_the_hub_holds(hub: MemoryStore, copy: FolderStore, tmp_path: Path) -> None:
    assert copy.epochs() == [0, 1]
    for epoch in (0, 1):
        ours, theirs = copy.resolve(epoch), hub.resolve(epoch)
        assert ours is not None
        assert theirs is not None
        assert (ours.manifest, ours.manifest_sha256) == (theirs.manifest, theirs.manifest_sha256)
    genesis = copy.resolve(0)
    assert genesis is not None
    assert {name: copy.read(genesis, name) for name in FILES} == FILES
    paths = copy.fetch(genesis, FILES, tmp_path / "out")
    assert {name: path.read_bytes() for name, path in paths.items()} == FILES
    assert copy.latest() == copy.resolve(1)
    assert copy.list_artefacts("", "checks", "checks/round-000000") == ["checks/round-000000/me.json"]
    assert copy.read_artefact("", "checks", "checks/round-000000/me.json") == b"{}"


def test_a_second_copy_brings_what_is_new(hub: MemoryStore, copy: FolderStore, tmp_path: Path) -> None:
    hub.publish(make_manifest(2, {}), {})
    hub.publish_artefacts("a/b", "checks", {"checks/round-000001/me.json": b"[]"})
    mirror(cast("HubStore", hub), "a/b", "checks", tmp_path)
    assert copy.epochs() == [0, 1, 2]
    assert copy.read_artefact("", "checks", "checks/round-000001/me.json") == b"[]"


def test_what_is_not_there_is_not_found(copy: FolderStore, tmp_path: Path) -> None:
    assert copy.resolve(7) is None
    assert copy.list_artefacts("", "checks", "checks/round-000009") == []
    with pytest.raises(HubNotFound):
        copy.read_artefact("", "checks", "checks/none.json")
    with pytest.raises(HubNotFound):
        copy.read_artefact("", "checks", "../outside.json")
    with pytest.raises(HubError):
        FolderStore(tmp_path / "nowhere").epochs()
    assert FolderStore(tmp_path / "nowhere").resolve(0) is None


def test_a_damaged_copy_is_refused(copy: FolderStore, tmp_path: Path) -> None:
    genesis = copy.resolve(0)
    assert genesis is not None
    (tmp_path / "epoch-000000" / "run.toml").write_bytes(b"name = 'y'\n")
    with pytest.raises(IntegrityError):
        copy.read(genesis, "run.toml")
    with pytest.raises(IntegrityError):
        copy.read_artefact("", "checks", "checks/round-000000/me.json", max_bytes=1)
    (tmp_path / "epoch-000000" / MANIFEST_NAME).write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        copy.resolve(0)


def test_a_copy_takes_nothing(copy: FolderStore) -> None:
    with pytest.raises(HubError, match="copy"):
        copy.publish(make_manifest(3, {}), {})
    assert copy.prune(1) == []
