"""One suite over every model store: in memory, and on a hub server in a process of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivetrain.errors import HubConflict, HubNotFound, IntegrityError
from hivetrain.hub.client import LOOK_AGAIN_S, HubStore
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import MANIFEST_NAME, Ref
from tests.hub_fixture import HubProcess, make_manifest, running_hub

# huggingface_hub 2.4 passes an upload to httpx2 in a way that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Store = MemoryStore | HubStore

FILES = {"state.safetensors": b"\0state" * 1000, "run.toml": b"name = 'x'\n", "sub/notes.txt": b""}
_numbers = itertools.count()


@dataclass
class Backend:
    store: Store
    corrupt: Callable[[Ref, str], None]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub")) as process:
        yield process


@pytest.fixture(params=["memory", "hub"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "memory":
        memory = MemoryStore()
        return Backend(memory, memory.corrupt)
    hub: HubProcess = request.getfixturevalue("hub")
    store = HubStore(endpoint=hub.url, repo=f"run/model-{next(_numbers)}")

    def corrupt(ref: Ref, name: str) -> None:
        blob = hub.blob(FILES[name])
        data = bytearray(blob.read_bytes())
        data[0] ^= 1
        blob.write_bytes(bytes(data))

    return Backend(store, corrupt)


@pytest.fixture
def store(backend: Backend) -> Store:
    return backend.store


def test_empty_store_has_no_epoch(store: Store) -> None:
    assert store.latest() is None
    assert store.resolve(0) is None
    assert store.epochs() == []


def test_published_epoch_is_the_latest_and_fetches_whole(store: Store, tmp_path: Path) -> None:
    store.publish(make_manifest(0, {}), {})
    manifest = make_manifest(1, FILES)
    ref = store.publish(manifest, FILES)
    assert ref.manifest == manifest
    assert ref.manifest_sha256 == manifest.sha256()
    assert store.latest() == ref == store.resolve(1)
    assert store.epochs() == [0, 1]
    paths = store.fetch(ref, FILES, tmp_path / "new")
    assert {name: path.read_bytes() for name, path in paths.items()} == FILES
    assert store.read(ref, "run.toml") == FILES["run.toml"]
    assert store.read(ref, MANIFEST_NAME) == manifest.to_bytes()


def test_files_may_come_from_disk(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"w" * 3_000_000)
    ref = store.publish(make_manifest(7, {"w.safetensors": source.read_bytes()}), {"w.safetensors": source})
    assert store.fetch(ref, ["w.safetensors"], tmp_path / "out")["w.safetensors"].read_bytes() == source.read_bytes()


def test_publishing_again_with_the_same_nonce_is_the_same_publish(store: Store) -> None:
    manifest = make_manifest(3, FILES)
    first = store.publish(manifest, FILES)
    assert store.publish(manifest, FILES) == first
    assert store.epochs() == [3]


def test_second_publisher_of_an_epoch_loses(store: Store) -> None:
    first = store.publish(make_manifest(3, FILES), FILES)
    with pytest.raises(HubConflict, match="epoch 3"):
        store.publish(make_manifest(3, FILES), FILES)
    assert store.latest() == first


def test_whoever_runs_out_of_time_while_it_uploads_tags_nothing_and_may_publish_later(store: Store) -> None:
    manifest = make_manifest(3, FILES)

    def too_late() -> None:
        raise TimeoutError("the round is over")

    with pytest.raises(TimeoutError):
        store.publish(manifest, FILES, too_late)
    assert (store.resolve(3), store.epochs()) == (None, [])
    assert store.publish(manifest, FILES).manifest == manifest


def test_of_racing_publishers_exactly_one_wins(store: Store) -> None:
    num_racers = 4
    store.publish(make_manifest(0, {}), {})
    start = threading.Barrier(num_racers)
    won: list[Ref] = []
    lost: list[HubConflict] = []

    def race(number: int) -> None:
        files = {"state.safetensors": bytes([number]) * 2_000_000}
        manifest = make_manifest(1, files)
        start.wait()
        try:
            won.append(store.publish(manifest, files))
        except HubConflict as conflict:
            lost.append(conflict)

    racers = [threading.Thread(target=race, args=(number,)) for number in range(num_racers)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert (len(won), len(lost)) == (1, num_racers - 1)
    assert store.latest() == won[0]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {**FILES, "extra.txt": b"x"},
        {**FILES, "run.toml": b"name = 'y'\n"},
        {**FILES, "run.toml": b"longer than the manifest says"},
    ],
)
def test_files_that_are_not_the_manifests_are_not_published(store: Store, files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="manifest"):
        store.publish(make_manifest(1, FILES), files)
    assert store.epochs() == []


@pytest.mark.parametrize(
    "name", ["../up", "/etc/passwd", "a//b", ".hidden", "a/../b", "a\\b", "", MANIFEST_NAME, "a\n"]
)
def test_unsafe_names_are_not_published(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="published file"):
        store.publish(make_manifest(1, {name: b"x"}), {name: b"x"})


@pytest.mark.parametrize("name", ["nowhere.txt", "../run.toml"])
def test_a_name_outside_the_manifest_is_not_fetched(store: Store, tmp_path: Path, name: str) -> None:
    ref = store.publish(make_manifest(1, FILES), FILES)
    with pytest.raises(IntegrityError, match="names no file"):
        store.fetch(ref, [name], tmp_path)
    with pytest.raises(IntegrityError, match="names no file"):
        store.read(ref, name)


def test_corrupt_bytes_are_refused_and_leave_nothing(backend: Backend, tmp_path: Path) -> None:
    store = backend.store
    ref = store.publish(make_manifest(1, FILES), FILES)
    backend.corrupt(ref, "state.safetensors")
    try:
        with pytest.raises(IntegrityError, match="state"):
            store.fetch(ref, ["state.safetensors"], tmp_path)
        with pytest.raises(IntegrityError, match="state"):
            store.read(ref, "state.safetensors")
        assert list(tmp_path.iterdir()) == []
    finally:
        backend.corrupt(ref, "state.safetensors")  # the blob is shared with other tests


def test_a_file_that_is_there_is_kept_when_right_and_replaced_when_wrong(store: Store, tmp_path: Path) -> None:
    ref = store.publish(make_manifest(1, FILES), FILES)
    path = store.fetch(ref, ["run.toml"], tmp_path)["run.toml"]
    inode = path.stat().st_ino
    assert store.fetch(ref, ["run.toml"], tmp_path)["run.toml"].stat().st_ino == inode
    path.write_bytes(b"torn")
    assert store.fetch(ref, ["run.toml"], tmp_path)["run.toml"].read_bytes() == FILES["run.toml"]


def test_a_ref_with_another_manifest_digest_is_refused(store: Store) -> None:
    ref = store.publish(make_manifest(1, FILES), FILES)
    wrong = Ref(epoch=1, commit=ref.commit, manifest=ref.manifest, manifest_sha256="f" * 64)
    with pytest.raises(IntegrityError, match="manifest of epoch 1"):
        store.read(wrong, MANIFEST_NAME)


def test_prune_keeps_epoch_0_and_the_newest(store: Store, tmp_path: Path) -> None:
    refs = [
        store.publish(make_manifest(epoch, {"f.txt": b"%d" % epoch}), {"f.txt": b"%d" % epoch}) for epoch in range(5)
    ]
    assert store.prune(2) == [1, 2]
    assert store.epochs() == [0, 3, 4]
    assert store.prune(2) == []
    assert store.resolve(1) is None
    assert store.read(refs[0], "f.txt") == b"0"
    assert store.read(refs[3], "f.txt") == b"3"
    with pytest.raises(HubNotFound):
        store.read(refs[1], "f.txt")
    with pytest.raises(HubNotFound):
        store.fetch(refs[1], ["f.txt"], tmp_path)


def test_prune_keeps_the_bases_of_what_it_keeps(store: Store) -> None:
    for epoch in range(8):
        store.publish(make_manifest(epoch, {"f.txt": b"%d" % epoch}), {"f.txt": b"%d" % epoch})
    assert store.prune(2, lambda epoch: epoch - epoch % 4) == [1, 2, 3, 5]
    assert store.epochs() == [0, 4, 6, 7]


def test_prune_does_not_take_tags_past_the_newest_epoch_for_epochs(store: Store) -> None:
    for epoch in (0, 1, 2, 3, 900):
        store.publish(make_manifest(epoch, {}), {})
    assert store.prune(2, newest=3) == [1]
    assert store.epochs() == [0, 2, 3, 900]


def test_a_tag_that_is_no_epoch_is_cleared_and_its_place_is_free(store: Store) -> None:
    false, true = make_manifest(4, FILES, nonce="f" * 16), make_manifest(4, {}, nonce="e" * 16)
    store.publish(false, FILES)
    assert store.clear(4, lambda manifest: None) is None
    assert store.resolve(4) is not None
    assert store.clear(4, lambda manifest: f"nonce {manifest.nonce}") == "nonce " + "f" * 16
    assert store.resolve(4) is None
    assert store.clear(4, lambda manifest: "not there") is None
    assert store.publish(true, {}).manifest == true == store.resolve(4).manifest  # type: ignore[union-attr]


def test_a_tag_without_a_manifest_is_cleared_unasked(hub: HubProcess) -> None:
    store = HubStore(endpoint=hub.url, repo=f"run/model-{next(_numbers)}")
    ref = store.publish(make_manifest(0, {}), {})
    store._remote.create_tag("epoch-000001", store._remote.first_commit())
    store._remote.create_tag("epoch-000002", ref.commit)  # another epoch's manifest
    for epoch, words in ((1, "manifest.json"), (2, "holds the manifest of epoch 0")):
        assert words in (store.clear(epoch, lambda manifest: None) or "")
    assert store.epochs() == [0]


class Patience:
    """A clock that only waiting moves on; what is due happens meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        self.meanwhile()


def test_a_tag_whose_manifest_the_hub_does_not_show_yet_is_looked_at_twice(
    hub: HubProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of them wait at once: many false tags hold nobody up for long."""
    patience = Patience()
    repo = f"run/model-{next(_numbers)}"
    store = HubStore(endpoint=hub.url, repo=repo, clock=lambda: patience.now, sleep=patience.sleep)
    late = store.publish(make_manifest(1, {}), {})
    hidden = {late.commit}
    read = store._remote.read

    def lagging(revision: str, path: str, max_bytes: int) -> bytes:
        if revision in hidden:
            raise HubNotFound(f"no {path} at {revision}")
        return read(revision, path, max_bytes)

    monkeypatch.setattr(store._remote, "read", lagging)
    patience.meanwhile = hidden.clear
    assert store.clear(1, lambda manifest: None) is None
    assert (store.epochs(), patience.waits) == ([1], [LOOK_AGAIN_S])
    patience.waits.clear()
    false = [store.publish(make_manifest(epoch, {}), {}).commit for epoch in (2, 3, 4)]
    hidden.update(false)
    patience.meanwhile = lambda: None
    assert all("manifest.json" in (store.clear(epoch, lambda manifest: None) or "") for epoch in (2, 3, 4))
    assert (store.epochs(), patience.waits) == ([1], [LOOK_AGAIN_S])


class Meanwhile(dict[int, str]):
    """Tags; what is due happens while they are looked through."""

    def __init__(self, tags: dict[int, str], due: Callable[[], object]) -> None:
        super().__init__(tags)
        self._due = due

    def get(self, key: int, default: str | None = None) -> str | None:  # type: ignore[override]
        self._due()
        return super().get(key, default)


def test_tags_are_cleared_by_several_threads_at_once(hub: HubProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    store = HubStore(endpoint=hub.url, repo=f"run/model-{next(_numbers)}")
    store.publish(make_manifest(1, {}), {})
    seen = store._tags()

    def clear_when_there_is_none() -> None:
        monkeypatch.setattr(store, "_tags", dict)
        assert store.clear(1, lambda manifest: None) is None

    monkeypatch.setattr(store, "_tags", lambda: Meanwhile(seen, clear_when_there_is_none))
    assert store.clear(1, lambda manifest: "nobody may follow it") == "nobody may follow it"


def test_prune_of_everything_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="keep"):
        store.prune(0)


def test_artefacts_add_up_on_a_branch(store: Store) -> None:
    repo = f"validator/{next(_numbers)}"
    store.publish_artefacts(repo, "scores", {"round-1.json": b"1", "latest.json": b"1"})
    store.publish_artefacts(repo, "scores", {"round-2.json": b"2", "latest.json": b"2"})
    store.publish_artefacts(repo, "scores", {"latest.json": b"2"})
    assert store.read_artefact(repo, "scores", "round-1.json") == b"1"
    assert store.read_artefact(repo, "scores", "latest.json") == b"2"


def test_missing_artefacts_are_not_found(store: Store) -> None:
    repo = f"validator/{next(_numbers)}"
    with pytest.raises(HubNotFound):
        store.read_artefact(repo, "main", "x")
    store.publish_artefacts(repo, "main", {"y": b"y"})
    with pytest.raises(HubNotFound):
        store.read_artefact(repo, "main", "x")
    with pytest.raises(HubNotFound):
        store.read_artefact(repo, "other", "y")


def test_an_artefact_past_the_limit_is_refused(store: Store) -> None:
    repo = f"validator/{next(_numbers)}"
    store.publish_artefacts(repo, "main", {"big": b"x" * 100})
    assert len(store.read_artefact(repo, "main", "big", max_bytes=100)) == 100
    with pytest.raises(IntegrityError, match="99"):
        store.read_artefact(repo, "main", "big", max_bytes=99)


def test_artefacts_are_listed_by_folder_and_of_no_folder_there_are_none(store: Store) -> None:
    repo = f"validator/{next(_numbers)}"
    assert store.list_artefacts(repo, "checks", "checks/round-1") == []
    files = {"checks/round-1/b.json": b"b", "checks/round-1/more/c.bin": b"c", "checks/round-10/a.json": b"a"}
    store.publish_artefacts(repo, "checks", files)
    store.publish_artefacts(repo, "checks", {"checks/round-1/a.json": b"a"})
    assert store.list_artefacts(repo, "checks", "checks/round-1") == [
        "checks/round-1/a.json", "checks/round-1/b.json", "checks/round-1/more/c.bin"
    ]  # fmt: skip
    assert store.list_artefacts(repo, "checks", "checks/round-2") == []
    assert store.list_artefacts(repo, "other", "checks") == []


def test_artefacts_of_several_who_write_at_once_all_lie_there(store: Store) -> None:
    repo = f"validator/{next(_numbers)}"
    names = [f"checks/round-1/{number}.json" for number in range(4)]
    threads = [
        threading.Thread(target=store.publish_artefacts, args=(repo, "checks", {name: name.encode()})) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.list_artefacts(repo, "checks", "checks/round-1") == names


def _outcome(store: Store, step: tuple[str, int, int]) -> object:
    kind, number, nonce = step
    if kind == "prune":
        return store.prune(number + 1)
    files = {"f.txt": b"%d/%d" % (number, nonce)}
    try:
        return store.publish(make_manifest(number, files, nonce=f"{nonce:016d}"), files).manifest
    except HubConflict:
        return "conflict"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(0, 4), st.integers(0, 1)),
        st.tuples(st.just("prune"), st.integers(0, 2), st.just(0)),
    ),
    max_size=8,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_both_stores_agree_on_any_history(hub: HubProcess, steps: list[tuple[str, int, int]]) -> None:
    stores: list[Store] = [MemoryStore(), HubStore(endpoint=hub.url, repo=f"run/agree-{next(_numbers)}")]
    for step in steps:
        outcomes = [_outcome(store, step) for store in stores]
        assert outcomes[0] == outcomes[1]
    assert stores[0].epochs() == stores[1].epochs()
    ours, theirs = (store.latest() for store in stores)
    assert (ours and ours.manifest_sha256) == (theirs and theirs.manifest_sha256)
