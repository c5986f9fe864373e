"""What clients may say to the hub server: every request body and every name, bounded and checked.

The shapes are those that `huggingface_hub` 2.4 sends. Unknown fields are ignored, since the client sends some
that this server has no use for.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Literal, TypeVar
from urllib.parse import parse_qs, unquote

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request

from hivetrain.hub.records import Refused
from hivetrain.validation import first_problem

MAX_PATH_LENGTH = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=65_536)]


class CreateRepo(BaseModel):
    """`POST /api/repos/create`."""

    name: str
    organization: str | None = None
    type: Literal["model", "dataset"] | None = None


class PreuploadFile(BaseModel):
    """One file of which the client asks how to upload it."""

    path: str
    size: Size
    sample: Annotated[str, Field(max_length=4096)] = ""  # base64 of its first 512 bytes


class Preupload(BaseModel):
    """`POST /api/.../preupload/REV`."""

    files: Annotated[list[PreuploadFile], Field(max_length=1000)]


class LfsObject(BaseModel):
    """One object of a batch."""

    oid: Sha256
    size: Size


class LfsBatch(BaseModel):
    """`POST /OWNER/NAME.git/info/lfs/objects/batch`."""

    operation: Literal["upload"]
    objects: Annotated[list[LfsObject], Field(max_length=1000)]


class CreateBranch(BaseModel):
    """`POST /api/.../branch/NAME`."""

    startingPoint: str | None = None


class CreateTag(BaseModel):
    """`POST /api/.../tag/REV`."""

    tag: str


class SuperSquash(BaseModel):
    """`POST /api/.../super-squash/BRANCH`."""

    message: Text = ""


class CommitHeader(BaseModel):
    """The first line of a commit."""

    summary: Text
    description: Text = ""
    parentCommit: Annotated[str, Field(pattern=r"^[0-9a-f]{5,40}$")] | None = None


class CommitFile(BaseModel):
    """A `file` line: the bytes themselves."""

    path: str
    content: str
    encoding: Literal["base64", "utf-8"] = "base64"

    def data(self) -> bytes:
        """The file's bytes.

        Raises:
            Refused: 400, not base64.
        """
        if self.encoding == "utf-8":
            return self.content.encode()
        try:
            return base64.b64decode(self.content, validate=True)
        except binascii.Error as exc:
            raise Refused(400, f"{self.path}: content is not base64: {exc}") from exc


class CommitLfsFile(BaseModel):
    """An `lfsFile` line: bytes that were uploaded before."""

    path: str
    oid: Sha256
    size: Size
    algo: Literal["sha256"] = "sha256"


class CommitDeletion(BaseModel):
    """A `deletedFile` or `deletedFolder` line."""

    path: str


class CommitLine(BaseModel):
    """One line of the newline-delimited body."""

    key: Literal["header", "file", "lfsFile", "deletedFile", "deletedFolder"]
    value: dict[str, object]


Body = TypeVar("Body", bound=BaseModel)


def parse(model: type[Body], raw: object) -> Body:
    """Validate JSON bytes, or a value that was JSON, as ``model``.

    Raises:
        Refused: 400; says which field.
    """
    try:
        if isinstance(raw, bytes):
            return model.model_validate_json(raw)
        return model.model_validate(raw)
    except ValidationError as exc:
        first = first_problem(exc)
        raise Refused(400, f"malformed {model.__name__}: {first.where}: {first.message}") from exc


def parse_commit_lines(raw: bytes) -> list[CommitLine]:
    """Split a commit's body.

    Raises:
        Refused: 400, a line is not one of the known.
    """
    return [parse(CommitLine, line) for line in raw.splitlines() if line.strip()]


def parse_paths(raw: bytes) -> list[str]:
    """The `paths` of a form-encoded or JSON `paths-info` body.

    Raises:
        Refused: 400, neither.
    """
    try:
        if raw.lstrip().startswith(b"{"):
            paths = json.loads(raw).get("paths", [])
            return [file_path(path) for path in ([paths] if isinstance(paths, str) else paths)]
        return [file_path(path) for path in parse_qs(raw.decode(), max_num_fields=2000).get("paths", [])]
    except (ValueError, TypeError, RecursionError) as exc:
        raise Refused(400, "malformed paths-info body") from exc


def file_path(path: object) -> str:
    """A path inside a repository, checked.

    Raises:
        Refused: 400; absolute, climbing, empty, too long, or with characters that no file should have.
    """
    if not isinstance(path, str) or not 0 < len(path) <= MAX_PATH_LENGTH:
        raise Refused(400, f"a file's path must have 1 to {MAX_PATH_LENGTH} characters")
    parts = path.split("/")
    if any(part in ("", ".", "..", ".git") for part in parts) or "\\" in path or not path.isprintable():
        raise Refused(400, f"not a path inside a repository: {path!r}")
    return path


def repo_name(owner: str, name: str) -> str:
    """``OWNER/NAME``, checked.

    Raises:
        Refused: 400, not a name.
    """
    for part in (owner, name):
        if not _NAME.fullmatch(part) or ".." in part or part.endswith(".git"):
            raise Refused(400, f"not a repository name: {owner}/{name}")
    return f"{owner}/{name}"


def ref_name(name: str) -> str:
    """The name of a branch or a tag to be made, checked.

    Raises:
        Refused: 400; not a name, or one that could be mistaken for a commit sha.
    """
    if not _REF.fullmatch(name) or ".." in name or "//" in name or re.fullmatch(r"[0-9a-f]{40}", name):
        raise Refused(400, f"not a branch or tag name: {name!r}")
    return name


def quoted(request: Request, name: str) -> str:
    """A path parameter, unquoted; routes match the raw path, so that ``%2F`` in a name is no separator."""
    return unquote(str(request.path_params[name]))


async def bounded_chunks(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The request's body, chunk by chunk.

    Raises:
        Refused: 413, as soon as the announced or the real length passes ``max_bytes``.
    """
    refusal = Refused(413, f"the body may have {max_bytes} bytes at most")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > max_bytes:
        raise refusal
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise refusal
        yield chunk


async def bounded_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; `Refused` as in `bounded_chunks`."""
    return b"".join([chunk async for chunk in bounded_chunks(request, max_bytes)])


def wants_lfs(file: PreuploadFile) -> bool:
    """Whether a file is uploaded on its own: large or binary, as the production hub decides."""
    try:
        sample = base64.b64decode(file.sample, validate=True)
    except binascii.Error as exc:
        raise Refused(400, f"{file.path}: sample is not base64") from exc
    return file.size > 1 << 20 or b"\0" in sample or file.path.endswith((".safetensors", ".parquet"))
