"""One repository on a model hub, through the real `huggingface_hub`: the only module that imports it.

The same code talks to production and to the local server; only the endpoint differs. Here every exception of the
client becomes one of `hivetrain.errors`, and nothing is retried but by `retry`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import stamina

from hivetrain.errors import HivetrainError, HubError, HubNotFound, IntegrityError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]
T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
_RETRIED_STATUS = (408, 412, 429)


class HubTransient(HubError):
    """Worth another try: no answer, a 5xx, a rate limit, or a branch that moved."""


class HubExists(HubError):
    """What was to be created is there already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as the hub lists it. ``sha256`` is empty for a plain file; ``git_oid`` is then of its bytes."""

    path: str
    size_bytes: int
    sha256: str
    git_oid: str


class RemoteRepo:
    """The calls that we make, on one repository.

    Args:
        endpoint: such as ``https://huggingface.co`` or ``http://127.0.0.1:8800``.
        kind: "model" or "dataset".
        repo: ``OWNER/NAME``.
        token: a write token. With None none is sent, not even one that is cached on this machine.
        timeout_s: for each network operation.
    """

    def __init__(self, endpoint: str, kind: Kind, repo: str, token: str | None, timeout_s: float) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.kind = kind
        self.repo = repo
        self._token = token
        self._timeout_s = timeout_s
        self._api: HfApi | None = None

    def of(self, repo: str) -> RemoteRepo:
        """Another repository of the same kind, endpoint and token."""
        return RemoteRepo(self.endpoint, self.kind, repo, self._token, self._timeout_s)

    def retry(self, action: Callable[[], T]) -> T:
        """Run ``action``, which must be safe to repeat, until it succeeds, four times at most."""
        attempts = stamina.retry_context(
            on=HubTransient, attempts=4, timeout=120, wait_initial=0.3, wait_max=5, wait_jitter=0.2
        )
        for attempt in attempts:
            with attempt:
                return action()
        raise AssertionError("the last attempt raises")

    # References

    def create(self) -> None:
        """Make the repository unless it exists."""
        with self._mapped("create the repository"):
            self._client().create_repo(self.repo, repo_type=self.kind, exist_ok=True)

    def tags(self) -> dict[str, str]:
        """Name to commit."""
        with self._mapped("list tags"):
            refs = self._client().list_repo_refs(self.repo, repo_type=self.kind)
            return {tag.name: tag.target_commit for tag in refs.tags}

    def branches(self) -> list[str]:
        """Their names."""
        with self._mapped("list branches"):
            refs = self._client().list_repo_refs(self.repo, repo_type=self.kind)
            return [branch.name for branch in refs.branches]

    def create_tag(self, tag: str, commit: str) -> None:
        """Put a tag if it is absent.

        Raises:
            HubExists: it is there, here or elsewhere.
        """
        with self._mapped(f"create tag {tag}"):
            self._client().create_tag(self.repo, tag=tag, revision=commit, repo_type=self.kind)

    def delete_tag(self, tag: str) -> None:
        """Delete a tag."""
        with self._mapped(f"delete tag {tag}"):
            self._client().delete_tag(self.repo, tag=tag, repo_type=self.kind)

    def create_branch(self, branch: str, commit: str | None = None) -> None:
        """Start a branch at a commit, by default at the head of `main`, unless it exists."""
        with self._mapped(f"create branch {branch}"):
            self._client().create_branch(self.repo, branch=branch, revision=commit, repo_type=self.kind, exist_ok=True)

    def delete_branch(self, branch: str) -> None:
        """Delete a branch."""
        with self._mapped(f"delete branch {branch}"):
            self._client().delete_branch(self.repo, branch=branch, repo_type=self.kind)

    def first_commit(self) -> str:
        """The oldest commit of `main`."""
        with self._mapped("list commits"):
            return self._client().list_repo_commits(self.repo, repo_type=self.kind)[-1].commit_id

    def commit_of(self, revision: str) -> str:
        """The commit that a branch or tag points to."""
        with self._mapped(f"resolve {revision}"):
            sha = self._client().repo_info(self.repo, repo_type=self.kind, revision=revision).sha
            if not sha:
                raise HubError(f"{self.endpoint} does not say which commit {revision} of {self.repo} is")
            return sha

    # Files

    def commit(self, branch: str, files: Mapping[str, bytes | Path], message: str, parent: str | None = None) -> str:
        """One commit that adds or replaces ``files``; returns its sha. A failure may still have committed."""
        with self._mapped(f"commit to {branch}"):
            client = self._client()
            from huggingface_hub import CommitOperationAdd

            operations = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=data if isinstance(data, bytes) else str(data))
                for name, data in files.items()
            ]
            return client.create_commit(
                self.repo,
                operations,
                commit_message=message,
                repo_type=self.kind,
                revision=branch,
                parent_commit=parent,
            ).oid

    def files(self, revision: str, folder: str = "") -> list[RemoteFile]:
        """Every file below a folder."""
        with self._mapped(f"list {folder or 'files'} at {revision}"):
            client = self._client()
            from huggingface_hub.hf_api import RepoFile

            tree = client.list_repo_tree(
                self.repo, folder or None, recursive=True, revision=revision, repo_type=self.kind
            )
            return [
                RemoteFile(
                    path=item.path,
                    size_bytes=item.size,
                    sha256=item.lfs.sha256 if item.lfs else "",
                    git_oid=item.blob_id,
                )
                for item in tree
                if isinstance(item, RepoFile)
            ]

    def size_bytes(self, revision: str, path: str) -> int | None:
        """The size of one file, or None where there is none."""
        with self._mapped(f"look up {path}"):
            found = self._client().get_paths_info(self.repo, [path], revision=revision, repo_type=self.kind)
            size = getattr(found[0], "size", None) if found else None
            return size if isinstance(size, int) else None

    def stream(self, revision: str, path: str, span: tuple[int, int] | None = None) -> Iterator[bytes]:
        """The bytes of one file, or of its part ``[start, stop)``. Nothing is verified here."""
        with self._mapped(f"read {path} at {revision}"), self._open(revision, path, span) as response:
            from huggingface_hub import hf_raise_for_status

            hf_raise_for_status(response)
            if span is not None and response.status_code != 206:
                raise HubError(f"{self.endpoint} does not serve parts of files: {response.status_code} for {path}")
            yield from response.iter_bytes(_CHUNK_BYTES)

    def read(self, revision: str, path: str, max_bytes: int) -> bytes:
        """One small file, unverified.

        Raises:
            IntegrityError: longer than ``max_bytes``.
        """
        data = bytearray()
        for chunk in self.stream(revision, path):
            data += chunk
            if len(data) > max_bytes:
                raise IntegrityError(f"{path} of {self.repo} is longer than {max_bytes} bytes")
        return bytes(data)

    def collect(self) -> int | None:
        """Ask the hub to free what nothing reaches; returns the bytes freed, or None: it does so by itself."""
        with self._mapped("collect garbage"):
            self._client()
            from huggingface_hub import get_session

            response = get_session().post(f"{self.endpoint}/api/gc", headers=self._headers())
            if response.status_code >= 500:
                raise HubTransient(f"collect garbage: {self.endpoint} answers {response.status_code}")
            return int(response.json()["freed_bytes"]) if response.status_code == 200 else None

    # Underneath

    def _client(self) -> HfApi:
        if self._api is None:
            _quiet_import()
            from huggingface_hub import HfApi

            self._api = HfApi(endpoint=self.endpoint, token=self._token or False)
        from huggingface_hub import get_session

        # One session serves the whole process, and by default it waits for ever.
        get_session().timeout = self._timeout_s
        return self._api

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _open(
        self, revision: str, path: str, span: tuple[int, int] | None
    ) -> contextlib.AbstractContextManager[httpx2.Response]:
        self._client()
        from huggingface_hub import get_session, hf_hub_url

        url = hf_hub_url(self.repo, path, repo_type=self.kind, revision=revision, endpoint=self.endpoint)
        headers = self._headers() | {"Accept-Encoding": "identity"}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        return get_session().stream("GET", url, headers=headers)

    @contextlib.contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except HivetrainError:
            raise
        except _client_errors() as exc:
            raise _translated(f"{what} of {self.repo} on {self.endpoint}", exc) from exc


def _client_errors() -> tuple[type[Exception], ...]:
    # Transport errors, errors of the hub (OSError), wrapped ones (RuntimeError), and what the client raises over
    # an answer that it did not expect.
    import httpx2

    return (httpx2.HTTPError, OSError, RuntimeError, ValueError, LookupError, TypeError)


def _translated(what: str, exc: Exception) -> HubError:
    import httpx2
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    # An upload's failure is wrapped once more.
    cause = exc.__cause__ if type(exc) is RuntimeError and isinstance(exc.__cause__, Exception) else exc
    message = f"{what}: {' '.join(str(cause).split()) or type(cause).__name__}"
    if isinstance(cause, (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)):
        return HubNotFound(message)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status == 401:
        return HubError(f"{message}; the hub wants a valid write token: set HIVETRAIN_HUB_TOKEN")
    if status == 409:
        return HubExists(message)
    if status is None:
        no_answer = isinstance(cause, (httpx2.HTTPError, OSError))
        return HubTransient(message) if no_answer else HubError(message)
    return HubTransient(message) if status >= 500 or status in _RETRIED_STATUS else HubError(message)


def _quiet_import() -> None:
    """Import `huggingface_hub` with everything off that talks to anybody but the endpoint."""
    for switch in ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(f"HF_HUB_{switch}", "1")
    from huggingface_hub import constants

    # Another library may have imported it before the switches were set. With xet, a commit is cut into batches.
    constants.HF_HUB_DISABLE_XET = True
