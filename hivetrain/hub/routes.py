"""The routes that `huggingface_hub` 2.4 calls, for models and data sets.

Uploads follow git-lfs: the client asks which files are large (`preupload`), gets an address for each (`batch`),
puts the bytes there, and sends one commit that names them. Addresses are signed, because the client sends no
token with the bytes. Tags are put-if-absent (409), and a commit with a stale parent is refused (412).
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hivetrain.hub import answers, wire
from hivetrain.hub.blobs import BlobMismatch, IncomingBlob
from hivetrain.hub.records import Change, Refused, entry_of
from hivetrain.hub.storage import HubStorage

UPLOAD_LIFETIME_S = 3600

Handler = Callable[[Request], Awaitable[Response]]

_KINDS = {"models": "model", "datasets": "dataset"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large a request may be, in bytes."""

    max_file_bytes: int = 8 << 30
    max_commit_bytes: int = 64 << 20
    max_json_bytes: int = 2 << 20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"limits.{name} must be > 0, got {getattr(self, name)}")


class HubRoutes:
    """The handlers over one store.

    Args:
        storage: started by the caller.
        token: when set, every write needs it as its bearer.
    """

    def __init__(self, storage: HubStorage, limits: Limits, token: str | None) -> None:
        self._storage = storage
        self._limits = limits
        self._token = token
        self._secret = b""

    def start(self) -> None:
        """Read the key that signs upload addresses."""
        self._secret = self._storage.upload_secret()

    def table(self) -> list[Route]:
        """Every route."""
        api = "/api/{kind:str}/{owner}/{name}"
        routes = [
            Route("/health", self.health),
            self._write("/api/gc", self.collect),
            self._write("/api/repos/create", self.create_repo),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route(api, self.repo_info),
            Route(f"{api}/revision/{{rev}}", self.repo_info),
            Route(f"{api}/refs", self.refs),
            Route(f"{api}/commits/{{rev}}", self.commits),
            Route(f"{api}/tree/{{rev}}", self.tree),
            Route(f"{api}/tree/{{rev}}/{{path:path}}", self.tree),
            Route(f"{api}/paths-info/{{rev}}", self.paths_info, methods=["POST"]),
            self._write(f"{api}/preupload/{{rev}}", self.preupload),
            self._write(f"{api}/commit/{{rev}}", self.commit),
            self._write(f"{api}/tag/{{rev}}", self.create_tag),
            self._write(f"{api}/tag/{{rev}}", self.delete_tag, "DELETE"),
            self._write(f"{api}/branch/{{rev}}", self.create_branch),
            self._write(f"{api}/branch/{{rev}}", self.delete_branch, "DELETE"),
            self._write(f"{api}/super-squash/{{rev}}", self.super_squash),
            Route("/lfs/{oid}", self.upload, methods=["PUT"]),  # the signature stands for the token
        ]
        for prefix in ("", "/datasets"):
            routes.append(self._write(f"{prefix}/{{owner}}/{{name}}.git/info/lfs/objects/batch", self.lfs_batch))
            routes.append(Route(f"{prefix}/{{owner}}/{{name}}/resolve/{{rev}}/{{path:path}}", self.download))
        return routes

    def _write(self, path: str, handler: Handler, method: str = "POST") -> Route:
        async def authorised(request: Request) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self._token is not None and not hmac.compare_digest(given.encode(), self._token.encode()):
                # By this very message the client tells a bad token from a missing repository.
                raise Refused(401, "Invalid credentials in Authorization header")
            return await handler(request)

        return Route(path, authorised, methods=[method])

    # Repositories and references

    async def health(self, request: Request) -> Response:
        """200 when the server takes requests."""
        return PlainTextResponse("ok")

    async def collect(self, request: Request) -> Response:
        """Free what no branch or tag reaches. Only this server has this route."""
        num_blobs, freed = await run_in_threadpool(self._storage.collect)
        return JSONResponse({"removed_blobs": num_blobs, "freed_bytes": freed})

    async def create_repo(self, request: Request) -> Response:
        """Make a repository; 409 when it exists."""
        body = wire.parse(wire.CreateRepo, await self._json(request))
        name = wire.repo_name(body.organization or "", body.name)
        kind = body.type or "model"
        created = await run_in_threadpool(self._storage.create_repo, kind, name)
        prefix = "datasets/" if kind == "dataset" else ""
        # The client reads `url` from the 409 as well.
        answer = {"url": f"{request.base_url}{prefix}{name}", "name": name}
        if created:
            return JSONResponse(answer)
        return JSONResponse(answer | {"error": "You already created this repo"}, 409)

    async def validate_yaml(self, request: Request) -> Response:
        """The front matter of a README: anything goes."""
        await self._json(request)
        return JSONResponse({"errors": [], "warnings": []})

    async def repo_info(self, request: Request) -> Response:
        """What a repository is at a revision."""
        repo, name = await self._repo(request)
        sha = await self._commit_of(request, repo)
        tree = await run_in_threadpool(self._storage.tree, repo, sha)
        return JSONResponse(answers.repo(name, sha, tree.values()))

    async def refs(self, request: Request) -> Response:
        """Every branch and tag."""
        repo, _ = await self._repo(request)
        branches = await run_in_threadpool(self._storage.refs, repo, "branch")
        tags = await run_in_threadpool(self._storage.refs, repo, "tag")
        return JSONResponse(answers.refs(branches, tags))

    async def create_tag(self, request: Request) -> Response:
        """Tag a revision; 409 when the tag exists."""
        repo, _ = await self._repo(request)
        tag = wire.ref_name(wire.parse(wire.CreateTag, await self._json(request)).tag)
        await run_in_threadpool(self._storage.create_ref, repo, "tag", tag, wire.quoted(request, "rev"))
        return JSONResponse({}, 201)

    async def delete_tag(self, request: Request) -> Response:
        """Delete a tag."""
        repo, _ = await self._repo(request)
        await run_in_threadpool(self._storage.delete_ref, repo, "tag", wire.quoted(request, "rev"))
        return Response(status_code=204)

    async def create_branch(self, request: Request) -> Response:
        """Start a branch at a revision, by default at `main`; 409 when it exists."""
        repo, _ = await self._repo(request)
        start = wire.parse(wire.CreateBranch, await self._json(request)).startingPoint or "main"
        branch = wire.ref_name(wire.quoted(request, "rev"))
        await run_in_threadpool(self._storage.create_ref, repo, "branch", branch, start)
        return JSONResponse({}, 201)

    async def delete_branch(self, request: Request) -> Response:
        """Delete a branch."""
        repo, _ = await self._repo(request)
        await run_in_threadpool(self._storage.delete_ref, repo, "branch", wire.quoted(request, "rev"))
        return Response(status_code=204)

    async def super_squash(self, request: Request) -> Response:
        """Make one commit of a branch's history."""
        repo, _ = await self._repo(request)
        title = wire.parse(wire.SuperSquash, await self._json(request)).message
        await run_in_threadpool(self._storage.squash, repo, wire.quoted(request, "rev"), title)
        return JSONResponse({})

    async def commits(self, request: Request) -> Response:
        """The history of a revision, newest first."""
        repo, _ = await self._repo(request)
        history = await run_in_threadpool(self._storage.history, repo, await self._commit_of(request, repo))
        return JSONResponse([answers.commit(commit) for commit in history])

    # Upload

    async def preupload(self, request: Request) -> Response:
        """For each file: plain or LFS, and what lies at its path now."""
        repo, _ = await self._repo(request)
        files = wire.parse(wire.Preupload, await self._json(request)).files
        tree = await run_in_threadpool(self._storage.tree, repo, await self._commit_of(request, repo))
        answer = []
        for file in files:
            old = tree.get(wire.file_path(file.path))
            oid = None if old is None else old.blob if old.lfs else old.git_oid
            mode = "lfs" if wire.wants_lfs(file) else "regular"
            answer.append({"path": file.path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answer})

    async def lfs_batch(self, request: Request) -> Response:
        """A signed address for every object that is not here yet."""
        await self._repo(request, "datasets" if request.url.path.startswith("/datasets/") else "models")
        batch = wire.parse(wire.LfsBatch, await self._json(request))
        objects: list[dict[str, object]] = []
        for item in batch.objects:
            answer: dict[str, object] = {"oid": item.oid, "size": item.size}
            if item.size > self._limits.max_file_bytes:
                message = f"a file may have {self._limits.max_file_bytes} bytes at most, got {item.size}"
                answer["error"] = {"code": 413, "message": message}
            elif not await run_in_threadpool(self._storage.has_blob, item.oid, item.size):
                expires = int(time.time()) + UPLOAD_LIFETIME_S
                signature = self._sign(item.oid, item.size, expires)
                query = f"size={item.size}&expires={expires}&signature={signature}"
                answer["actions"] = {"upload": {"href": f"{request.base_url}lfs/{item.oid}?{query}", "header": {}}}
            objects.append(answer)
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _sign(self, oid: str, size_bytes: int, expires: int) -> str:
        return hmac.new(self._secret, f"{oid}/{size_bytes}/{expires}".encode(), hashlib.sha256).hexdigest()

    async def upload(self, request: Request) -> Response:
        """Take the bytes of one blob; nothing is kept unless they are the announced ones."""
        oid = wire.parse(wire.LfsObject, {"oid": request.path_params["oid"], "size": 0}).oid
        try:
            size = int(request.query_params["size"])
            expires = int(request.query_params["expires"])
        except (KeyError, ValueError) as exc:
            raise Refused(400, "an upload address has size, expires and signature") from exc
        given = request.query_params.get("signature", "")
        if not hmac.compare_digest(given.encode(), self._sign(oid, size, expires).encode()) or expires < time.time():
            raise Refused(403, "this upload address is forged or too old: ask for a new one")
        await run_in_threadpool(self._storage.spare, oid)
        try:
            with IncomingBlob(self._storage.blobs, size) as blob:
                async for chunk in wire.bounded_chunks(request, size):
                    blob.write(chunk)
                await run_in_threadpool(blob.keep, oid, size)
        except BlobMismatch as exc:
            raise Refused(400, str(exc)) from exc
        return Response(status_code=200)

    async def commit(self, request: Request) -> Response:
        """One commit on a branch: all of it or nothing."""
        repo, name = await self._repo(request)
        lines = wire.parse_commit_lines(await wire.bounded_body(request, self._limits.max_commit_bytes))
        if not lines or lines[0].key != "header":
            raise Refused(400, "a commit starts with its header")
        header = wire.parse(wire.CommitHeader, lines[0].value)
        changes = [await run_in_threadpool(self._change, line) for line in lines[1:]]

        def write() -> str:
            return self._storage.commit(
                repo,
                wire.quoted(request, "rev"),
                changes,
                title=header.summary,
                message=header.description,
                parent=header.parentCommit or "",
            )

        sha = await run_in_threadpool(write)
        return JSONResponse({"commitUrl": f"{request.base_url}{name}/commit/{sha}", "commitOid": sha})

    def _change(self, line: wire.CommitLine) -> Change:
        if line.key == "file":
            file = wire.parse(wire.CommitFile, line.value)
            path = wire.file_path(file.path)
            return Change(path=path, entry=self._storage.put_file(path, file.data()))
        if line.key == "lfsFile":
            large = wire.parse(wire.CommitLfsFile, line.value)
            path = wire.file_path(large.path)
            return Change(path=path, entry=entry_of(path, large.oid, large.size, data=None))
        if line.key == "header":
            raise Refused(400, "a commit has one header")
        gone = wire.parse(wire.CommitDeletion, line.value)
        path = wire.file_path(gone.path.rstrip("/"))
        return Change(path=path, folder=line.key == "deletedFolder")

    # Download

    async def tree(self, request: Request) -> Response:
        """Files and folders at a path."""
        repo, _ = await self._repo(request)
        sha = await self._commit_of(request, repo)
        tree = await run_in_threadpool(self._storage.tree, repo, sha)
        folder = wire.file_path(wire.quoted(request, "path").rstrip("/")) if "path" in request.path_params else ""
        recursive = request.query_params.get("recursive", "false").lower() in ("true", "1")
        listing = answers.tree(sha, tree, folder, recursive)
        if folder and not listing:
            raise Refused(404, f"no folder {folder!r} at {sha}", "EntryNotFound")
        return JSONResponse(listing)

    async def paths_info(self, request: Request) -> Response:
        """What lies at the given paths; paths where nothing lies are left out."""
        repo, _ = await self._repo(request)
        paths = wire.parse_paths(await self._json(request))
        sha = await self._commit_of(request, repo)
        tree = await run_in_threadpool(self._storage.tree, repo, sha)
        answer = []
        for path in paths:
            if path in tree:
                answer.append(answers.file(tree[path]))
            elif any(name.startswith(path + "/") for name in tree):
                answer.append(answers.folder(sha, path))
        return JSONResponse(answer)

    async def download(self, request: Request) -> Response:
        """One file's bytes, or a range of them."""
        repo, _ = await self._repo(request, "datasets" if request.url.path.startswith("/datasets/") else "models")
        sha = await self._commit_of(request, repo)
        entry = await run_in_threadpool(self._storage.entry, repo, sha, wire.file_path(wire.quoted(request, "path")))
        blob = self._storage.blobs.path(entry.blob)
        if not blob.exists():
            raise Refused(404, f"the bytes of {entry.path!r} at {sha} are gone", "EntryNotFound")
        headers = {
            "ETag": f'"{entry.blob if entry.lfs else entry.git_oid}"',
            "X-Repo-Commit": sha,
            "X-Content-Type-Options": "nosniff",
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(entry.path.rsplit('/', 1)[-1])}",
        }
        if entry.lfs:
            headers |= {"X-Linked-Size": str(entry.size_bytes), "X-Linked-ETag": f'"{entry.blob}"'}
        return FileResponse(blob, headers=headers, media_type="application/octet-stream")

    # Shared

    async def _json(self, request: Request) -> bytes:
        return await wire.bounded_body(request, self._limits.max_json_bytes)

    async def _repo(self, request: Request, kind: str = "") -> tuple[int, str]:
        kind = kind or wire.quoted(request, "kind")
        if kind not in _KINDS:
            raise Refused(404, f"no such kind of repository: {kind}", "RepoNotFound")
        name = wire.repo_name(wire.quoted(request, "owner"), wire.quoted(request, "name"))
        return await run_in_threadpool(self._storage.repo, _KINDS[kind], name), name

    async def _commit_of(self, request: Request, repo: int) -> str:
        revision = wire.quoted(request, "rev") if "rev" in request.path_params else "main"
        return await run_in_threadpool(self._storage.resolve, repo, revision)


def refusal(request: Request, error: Exception) -> Response:
    """The answer to a `Refused` request, in the form that the client maps to its own exceptions."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if not isinstance(error, Refused):
        raise error
    text = error.message.encode("ascii", "replace").decode().replace("\n", " ").replace("\r", " ")
    headers = {"X-Error-Message": text}
    if error.code:
        headers["X-Error-Code"] = error.code
    if error.status == 413:
        headers["Connection"] = "close"  # the rest of the body was not read
    return JSONResponse({"error": error.message}, error.status, headers)
