"""The hub server as a process: kills, refusals, limits, and the real client against it."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hivetrain.errors import HubError, HubNotFound, IntegrityError
from hivetrain.hub.client import HubStore, snapshot
from hivetrain.hub.remote import RemoteRepo
from hivetrain.ports import free_port
from tests.hub_fixture import HubProcess, make_manifest, running_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "a-secret-of-the-test"
LFS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    """A hub for tests that neither stop it nor collect its garbage."""
    with running_hub(tmp_path_factory.mktemp("hub"), "--max-file-mb", "2", "--max-commit-mb", "1") as hub:
        yield hub


def weights(epoch: int, num_bytes: int = 2_000_000) -> dict[str, bytes]:
    return {"state.safetensors": hashlib.shake_128(b"%d" % epoch).digest(num_bytes)}


def post(hub: HubProcess, path: str, body: object, token: str = "") -> tuple[int, dict[str, object]]:
    headers = LFS | ({"Authorization": f"Bearer {token}"} if token else {})
    status, raw = hub.request("POST", path, json.dumps(body).encode(), headers)
    return status, json.loads(raw) if raw.startswith((b"{", b"[")) else {}


def commit_lines(*lines: dict[str, object]) -> bytes:
    header = {"key": "header", "value": {"summary": "test", "description": ""}}
    return b"".join(json.dumps(line).encode() + b"\n" for line in (header, *lines))


def file_line(path: str, data: bytes = b"x") -> dict[str, object]:
    return {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}}


def upload_address(hub: HubProcess, repo: str, data: bytes) -> str:
    """Asks for an address for ``data``; returns its path and query."""
    post(hub, "/api/repos/create", {"organization": repo.split("/")[0], "name": repo.split("/")[1]})
    batch = {"operation": "upload", "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]}
    status, answer = post(hub, f"/{repo}.git/info/lfs/objects/batch", batch)
    assert status == 200
    href = answer["objects"][0]["actions"]["upload"]["href"]  # type: ignore[index]
    return str(href).removeprefix(hub.url)


# Space


def test_prune_frees_the_space_of_exactly_the_pruned_epochs(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        store = HubStore(endpoint=hub.url, repo="run/model")
        for epoch in range(5):
            store.publish(make_manifest(epoch, weights(epoch)), weights(epoch))
        before = hub.blob_bytes()
        assert store.prune(2) == [1, 2]
        freed = before - hub.blob_bytes()
        assert 4_000_000 <= freed < 4_010_000
        for epoch in (0, 3, 4):
            ref = store.resolve(epoch)
            assert ref is not None
            assert store.read(ref, "state.safetensors") == weights(epoch)["state.safetensors"]


def test_bytes_that_a_kept_epoch_shares_with_a_pruned_one_stay(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        store = HubStore(endpoint=hub.url, repo="run/model")
        for epoch in range(3):
            store.publish(make_manifest(epoch, weights(7)), weights(7))
        assert store.prune(1) == [1]
        ref = store.latest()
        assert ref is not None
        assert store.read(ref, "state.safetensors") == weights(7)["state.safetensors"]


def test_prune_drops_the_branch_of_a_publisher_that_died(shared: HubProcess) -> None:
    from huggingface_hub import HfApi

    store = HubStore(endpoint=shared.url, repo="run/stale")
    store.publish(make_manifest(1, {}), {})
    api = HfApi(endpoint=shared.url, token=False)
    api.create_branch("run/stale", branch="staging-epoch-000001-abcdefabcdef")
    api.create_branch("run/stale", branch="staging-epoch-000002-abcdefabcdef")
    store.prune(5)
    assert [branch.name for branch in api.list_repo_refs("run/stale").branches] == [
        "main",
        "staging-epoch-000002-abcdefabcdef",  # may still become an epoch
    ]


# Kills


def test_kill_in_mid_upload_leaves_the_head_and_no_torn_epoch(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        store = HubStore(endpoint=hub.url, repo="run/model")
        head = store.publish(make_manifest(0, weights(0)), weights(0))
        data = weights(1)["state.safetensors"]
        address = upload_address(hub, "run/model", data)

        def half_then_kill() -> Iterator[bytes]:
            yield data[: len(data) // 2]
            incoming = tmp_path / "blobs" / "incoming"
            deadline = time.monotonic() + 10
            while not any(incoming.iterdir()):
                assert time.monotonic() < deadline
            hub.kill()
            yield data[len(data) // 2 :]

        with pytest.raises(OSError):  # noqa: PT011  which one depends on when the socket notices
            hub.request("PUT", address, half_then_kill())
        hub.start()
        assert list((tmp_path / "blobs" / "incoming").iterdir()) == []
        assert not hub.blob(data).exists()
        assert store.latest() == head
        ref = store.publish(make_manifest(1, weights(1)), weights(1))
        assert store.read(ref, "state.safetensors") == data


def test_a_published_epoch_survives_a_kill_right_after(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        store = HubStore(endpoint=hub.url, repo="run/model")
        ref = store.publish(make_manifest(0, weights(0)), weights(0))
        hub.kill()
        hub.start()
        assert store.latest() == ref
        assert store.read(ref, "state.safetensors") == weights(0)["state.safetensors"]


def test_publish_outlasts_a_restart_of_the_hub(tmp_path: Path) -> None:
    with running_hub(tmp_path) as hub:
        store = HubStore(endpoint=hub.url, repo="run/model")
        store.publish(make_manifest(0, weights(0)), weights(0))
        hub.kill()
        restart = threading.Thread(target=hub.start)
        restart.start()
        ref = store.publish(make_manifest(1, weights(1)), weights(1))
        restart.join()
        assert store.latest() == ref


def test_readers_never_see_a_torn_epoch_while_others_publish(shared: HubProcess) -> None:
    store = HubStore(endpoint=shared.url, repo="run/readers")
    store.publish(make_manifest(0, weights(0, 1000)), weights(0, 1000))
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        reader = HubStore(endpoint=shared.url, repo="run/readers")
        while not done.is_set():
            ref = reader.latest()
            assert ref is not None
            assert reader.read(ref, "state.safetensors") == weights(ref.epoch, 1000)["state.safetensors"]
            seen.append(ref.epoch)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for epoch in range(1, 8):
            store.publish(make_manifest(epoch, weights(epoch, 1000)), weights(epoch, 1000))
    finally:
        done.set()
        thread.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


# The process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with running_hub(tmp_path) as hub:
        assert hub.signal(number) == 0


def run_to_end(*options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "hivetrain.hub.server", *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ended.returncode, ended.stderr


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = run_to_end("--dir", str(tmp_path), "--port", port)
    assert status == 2
    assert said.count("\n") == 1
    assert port in said
    assert "--port" in said


def test_a_folder_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with running_hub(tmp_path):
        status, said = run_to_end("--dir", str(tmp_path), "--port", str(free_port()))
    assert status == 2
    assert said.count("\n") == 1
    assert "--dir" in said


@pytest.mark.parametrize("options", [("--port", "99999"), ("--port", "0", "--max-file-mb", "0")])
def test_an_impossible_option_is_one_clear_line(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, said = run_to_end("--dir", str(tmp_path), *options)
    assert (status, said.count("\n")) == (2, 1)


# Who may write


def test_writes_need_the_token_and_reads_do_not(tmp_path: Path) -> None:
    with running_hub(tmp_path, token=TOKEN) as hub:
        owner = HubStore(endpoint=hub.url, repo="run/model", token=TOKEN)
        ref = owner.publish(make_manifest(0, weights(0)), weights(0))
        stranger = HubStore(endpoint=hub.url, repo="run/model")
        assert stranger.latest() == ref
        assert stranger.read(ref, "state.safetensors") == weights(0)["state.safetensors"]
        for store in (stranger, HubStore(endpoint=hub.url, repo="run/model", token="wrong")):
            with pytest.raises(HubError, match=r"401.*token") as refused:
                store.publish(make_manifest(1, weights(1)), weights(1))
            assert "Bearer" not in str(refused.value)
            with pytest.raises(HubError, match="token"):
                store.publish_artefacts("other/repo", "main", {"a": b"a"})
        assert owner.epochs() == [0]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/repos/create"),
        ("POST", "/api/gc"),
        ("POST", "/api/models/run/model/commit/main"),
        ("POST", "/api/models/run/model/preupload/main"),
        ("POST", "/api/models/run/model/tag/main"),
        ("DELETE", "/api/models/run/model/tag/x"),
        ("POST", "/api/models/run/model/branch/x"),
        ("DELETE", "/api/models/run/model/branch/x"),
        ("POST", "/api/datasets/run/model/super-squash/main"),
        ("POST", "/run/model.git/info/lfs/objects/batch"),
        ("POST", "/datasets/run/model.git/info/lfs/objects/batch"),
    ],
)
def test_every_write_route_wants_the_token(guarded: HubProcess, method: str, path: str) -> None:
    assert guarded.request(method, path, b"{}")[0] == 401
    assert guarded.request(method, path, b"{}", {"Authorization": f"Bearer {TOKEN}"})[0] != 401


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with running_hub(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
        yield hub


@pytest.mark.parametrize("change", ["signature=0", "size=7", "expires=99999999999", "", "size=x"])
def test_a_forged_upload_address_is_refused(shared: HubProcess, change: str) -> None:
    address = upload_address(shared, "run/forged", b"forged")
    path, _, query = address.partition("?")
    fields = dict(part.split("=") for part in query.split("&"))
    if change:
        fields |= dict([change.split("=")])
    else:
        del fields["size"]
    forged = path + "?" + "&".join(f"{name}={value}" for name, value in fields.items())
    assert shared.request("PUT", forged, b"forged")[0] in (400, 403)
    assert not shared.blob(b"forged").exists()


def test_other_bytes_than_announced_are_refused(shared: HubProcess) -> None:
    for sent in (b"other ", b"announced, and more", b"announc"):
        address = upload_address(shared, "run/bytes", b"announced")
        assert shared.request("PUT", address, sent)[0] in (400, 413)
        assert not shared.blob(b"announced").exists()
        assert not shared.blob(sent).exists()
    address = upload_address(shared, "run/bytes", b"announced")
    assert shared.request("PUT", address, b"announced")[0] == 200
    assert shared.blob(b"announced").read_bytes() == b"announced"


# Limits and malformed requests


def test_a_file_past_the_limit_is_refused(shared: HubProcess) -> None:
    files = {"state.safetensors": bytes(2 * 1024 * 1024 + 1)}
    with pytest.raises(HubError, match="2097152 bytes at most"):
        HubStore(endpoint=shared.url, repo="run/large").publish(make_manifest(0, files), files)
    assert HubStore(endpoint=shared.url, repo="run/large").epochs() == []


@pytest.mark.parametrize("announced", [True, False])
def test_a_commit_past_the_limit_is_refused(shared: HubProcess, announced: bool) -> None:
    post(shared, "/api/repos/create", {"organization": "run", "name": "big-commit"})
    body = commit_lines(file_line("x", bytes(1_000_000)))
    sent = body if announced else iter([body[:1000], body[1000:]])
    try:
        status, _ = shared.request("POST", "/api/models/run/big-commit/commit/main", sent)
    except (BrokenPipeError, ConnectionResetError):
        status = 413  # it hung up before it had read everything
    assert status == 413
    assert shared.request("GET", "/run/big-commit/resolve/main/x")[0] == 404


BAD_PATHS = ["../x", "a/../../x", "/etc/x", "a//x", "./x", "a\\x", "a\0x", ".git/config", "", "x" * 600]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_no_commit_names_a_path_outside_the_repository(shared: HubProcess, path: str) -> None:
    post(shared, "/api/repos/create", {"organization": "run", "name": "paths"})
    large = {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": "0" * 64, "size": 1}}
    for line in (file_line(path), large, {"key": "deletedFile", "value": {"path": path}}):
        assert shared.request("POST", "/api/models/run/paths/commit/main", commit_lines(line))[0] == 400


@pytest.mark.parametrize(
    "path",
    [
        "/run/paths/resolve/main/../../../hub.sqlite",
        "/run/paths/resolve/main/%2e%2e/%2e%2e/hub.sqlite",
        "/run/paths/resolve/main/..%2f..%2fhub.sqlite",
        "/run/paths/resolve/..%2f..%2fhub.sqlite/x",
        "/run/..%2fpaths/resolve/main/x",
        "/%2e%2e/%2e%2e/resolve/main/x",
        "/api/models/run/paths/tree/main/..%2f..",
        "/api/models/run/..",
        "/api/models/..%2f..%2f/run",
        "/api/spaces/run/paths",
        "/lfs/..%2f..%2fhub.sqlite",
    ],
)
def test_no_request_climbs_out_of_the_repository(shared: HubProcess, path: str) -> None:
    post(shared, "/api/repos/create", {"organization": "run", "name": "paths"})
    status, body = shared.request("GET", path)
    assert 400 <= status < 500
    assert b"SQLite" not in body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/repos/create", b"not json"),
        ("/api/repos/create", b"[]"),
        ("/api/repos/create", b'{"name": "x"}'),
        ("/api/repos/create", b'{"organization": "a", "name": "../x"}'),
        ("/api/repos/create", b'{"organization": "a", "name": "x", "type": "space"}'),
        ("/api/repos/create", b"[" * 100_000),
        ("/api/models/run/bad/commit/main", b""),
        ("/api/models/run/bad/commit/main", b"{}\n"),
        ("/api/models/run/bad/commit/main", commit_lines({"key": "rm", "value": {}})),
        ("/api/models/run/bad/commit/main", commit_lines(*[{"key": "header", "value": {"summary": "twice"}}])),
        (
            "/api/models/run/bad/commit/main",
            commit_lines({"key": "file", "value": {"path": "x", "content": "?", "encoding": "base64"}}),
        ),
        (
            "/api/models/run/bad/commit/main",
            commit_lines({"key": "lfsFile", "value": {"path": "x", "algo": "sha256", "oid": "f" * 64, "size": 1}}),
        ),
        ("/api/models/run/bad/preupload/main", b'{"files": [{"path": "x", "size": -1}]}'),
        ("/api/models/run/bad/preupload/main", b'{"files": [{"path": "x", "size": 1, "sample": "?"}]}'),
        ("/api/models/run/bad/branch/a..b", b"{}"),
        ("/api/models/run/bad/tag/main", b'{"tag": "-x"}'),
        ("/api/models/run/bad/tag/main", b'{"tag": "0000000000000000000000000000000000000000"}'),
        ("/api/models/run/bad/paths-info/main", b'{"paths": 3}'),
        ("/api/models/run/bad/paths-info/main", b"\xff\xfe"),
        ("/run/bad.git/info/lfs/objects/batch", b'{"operation": "upload", "objects": [{"oid": "../x", "size": 1}]}'),
        ("/run/bad.git/info/lfs/objects/batch", b'{"operation": "download", "objects": []}'),
    ],
)
def test_a_malformed_request_is_answered_with_400(shared: HubProcess, path: str, body: bytes) -> None:
    post(shared, "/api/repos/create", {"organization": "run", "name": "bad"})
    assert shared.request("POST", path, body)[0] == 400
    assert shared.request("GET", "/health")[0] == 200


def test_ranges_are_served_and_bad_ones_refused(shared: HubProcess) -> None:
    data = bytes(range(100))
    HubStore(endpoint=shared.url, repo="run/ranges").publish_artefacts("run/ranges", "main", {"f": data})
    path = "/run/ranges/resolve/main/f"
    assert shared.request("GET", path, headers={"Range": "bytes=10-19"}) == (206, data[10:20])
    assert shared.request("GET", path, headers={"Range": "bytes=-5"}) == (206, data[-5:])
    assert shared.request("GET", path, headers={"Range": "bytes=200-"})[0] == 416
    assert shared.request("GET", path, headers={"Range": "lines=1-2"})[0] == 400


# The real client, beyond what the store uses


def test_the_real_client_finds_every_route_that_it_calls(shared: HubProcess) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import (
        BadRequestError,
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi(endpoint=shared.url, token=False)
    repo = "owner/every.route"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo)
    assert api.create_repo(repo).repo_id == repo
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    first = api.list_repo_commits(repo)[0].commit_id
    added = [CommitOperationAdd(path, b"\0" + path.encode()) for path in ("a/b/one.bin", "a/two.bin", "README.md")]
    second = api.create_commit(repo, added, commit_message="three files", parent_commit=first).oid
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, [CommitOperationAdd("x", b"x")], commit_message="late", parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(repo, [CommitOperationAdd("x", b"x")], commit_message="nowhere", revision="nowhere")
    api.create_branch(repo, branch="side/branch", revision=first)
    assert list(api.list_repo_tree(repo, revision="side/branch")) == []
    assert {item.path for item in api.list_repo_tree(repo)} == {"a", "README.md"}
    assert {item.path for item in api.list_repo_tree(repo, "a", recursive=True)} == {"a/b", "a/b/one.bin", "a/two.bin"}
    assert [info.path for info in api.get_paths_info(repo, ["a", "a/two.bin", "none"])] == ["a", "a/two.bin"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(repo, "none"))
    api.create_tag(repo, tag="v1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1", revision=first)
    gone = [CommitOperationDelete("a/", is_folder=True), CommitOperationAdd("a/new.bin", b"\0new")]
    api.create_commit(repo, gone, commit_message="a folder less")
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit(repo, [CommitOperationDelete("none")], commit_message="no such file")
    assert api.list_repo_files(repo) == ["README.md", "a/new.bin"]
    assert api.list_repo_files(repo, revision="v1") == ["README.md", "a/b/one.bin", "a/two.bin"]
    api.super_squash_history(repo)
    assert len(api.list_repo_commits(repo)) == 1
    assert api.list_repo_files(repo) == ["README.md", "a/new.bin"]
    assert api.model_info(repo, revision="v1").sha == second
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="side/branch")
    with pytest.raises(BadRequestError):
        api.delete_branch(repo, branch="main")
    assert [branch.name for branch in api.list_repo_refs(repo).branches] == ["main"]


def test_snapshot_takes_weights_and_text_and_never_code(shared: HubProcess, tmp_path: Path) -> None:
    wanted = {"config.json": b"{}", "model.safetensors": b"\0w", "merges.txt": b"a b", "sub/x.json": b"[]"}
    unwanted = {"modeling.py": b"import os", "pytorch_model.bin": b"\x80", "weights.pt": b"\x80", "notes.md": b"-"}
    store = HubStore(endpoint=shared.url, repo="some/model")
    commit = store.publish_artefacts("some/model", "main", wanted | unwanted)
    dest = snapshot(shared.url, "some/model", commit, tmp_path / "model", patterns=("*.json", "*.safetensors", "*.*t"))
    found = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    assert found == set(wanted)
    assert all((dest / name).read_bytes() == data for name, data in wanted.items())
    with pytest.raises(HubNotFound, match="no file like"):
        snapshot(shared.url, "some/model", commit, tmp_path / "none", patterns=("*.onnx",))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_snapshot_refuses_bytes_that_the_hub_does_not_list(shared: HubProcess, tmp_path: Path, name: str) -> None:
    data = f"\0 {name} of this test".encode()
    HubStore(endpoint=shared.url, repo="bad/disk").publish_artefacts("bad/disk", "main", {name: data})
    shared.blob(data).write_bytes(data[::-1])
    with pytest.raises(IntegrityError, match=r"config|model"):
        snapshot(shared.url, "bad/disk", "main", tmp_path)
    assert list(tmp_path.iterdir()) == []


# No hub, or no hub at all


def test_a_hub_that_does_not_answer_is_a_hub_error() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(HubError, match=url):
        HubStore(endpoint=url, repo="run/model").latest()


def test_an_answer_that_is_no_hubs_is_a_hub_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n<html>hi</html>")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HubError, match="list tags of run/model"):
            HubStore(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}", repo="run/model").latest()
        thread.join()


def test_a_hub_that_hangs_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(HubError, match="list tags"):
            HubStore(endpoint=url, repo="run/model", timeout_s=0.1).latest()


@pytest.mark.parametrize("status", [404, 503])
def test_a_hub_without_collection_is_tolerated_and_a_broken_one_is_not(status: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(status)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = RemoteRepo(f"http://127.0.0.1:{server.server_port}", "model", "a/b", None, timeout_s=5)
        if status == 404:
            assert remote.collect() is None
        else:
            with pytest.raises(HubError, match="503"):
                remote.collect()
        server.shutdown()


def test_no_token_is_sent_that_was_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_machine")
    sent: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent.append(self.headers.get("Authorization"))
            self.send_error(400)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for token in (None, "ours"):
            with pytest.raises(HubError):
                HubStore(endpoint=url, repo="a/b", token=token).latest()
            with pytest.raises(HubError):
                HubStore(endpoint=url, repo="a/b", token=token).read_artefact("a/b", "main", "x")
        server.shutdown()
    assert sent == [None, None, "Bearer ours", "Bearer ours"]
