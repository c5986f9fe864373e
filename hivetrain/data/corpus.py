"""The embedded data set: Python's own documentation, in fineweb's columns, so that a run needs no network.

The text is what the installed Python carries: the language reference in `pydoc_data` and the docstrings of the
standard library, read by parsing the source files and never by importing them. Their text differs between
Python releases, so one node builds the corpus at genesis and publishes it; nobody rebuilds it.

Columns: https://huggingface.co/datasets/HuggingFaceFW/fineweb (`token_count` counts words here).
"""

from __future__ import annotations

import ast
import hashlib
import heapq
import logging
import os
import platform
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hivetrain.errors import DataError

logger = logging.getLogger(__name__)

MAX_ROW_CHARS = 3000
MIN_DOCUMENT_CHARS = 200
MAX_HELDOUT_CHARS = 12_000  # a longer document would be most of what is held out
MIN_TRAIN_ROW_GROUPS = 32  # one round of the default recipe: 16 miners with 2 each
SHINGLE_WORDS = 8
ROW_GROUPS_PER_FILE = 64
SEED = 20_240_229

# Tests, and what Linux distributions package apart from the standard library or not at all.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class _Document:
    path: str  # of the source file, within the standard library
    name: str  # topic or module
    text: str


@dataclass(frozen=True, slots=True)
class _Row:
    document: _Document
    part: int
    text: str


def build_corpus(
    dest: Path, *, rows_per_group: int = 10, heldout_row_groups: int = 2, stdlib: Path | None = None
) -> list[Path]:
    """Write the embedded data set into `dest` as parquet files with small row groups of nearly equal text size.

    Deterministic for one Python and one pyarrow. The last row groups are for holding out: their documents share
    no run of eight words with any other document.

    Args:
        dest: a folder, made if need be.
        rows_per_group: mean number of rows, of at most 3,000 characters each, in a row group.
        heldout_row_groups: how many of the last row groups are written from documents of their own.
        stdlib: folder of the standard library's sources; the running Python's own if None.

    Returns:
        The files, sorted by name.

    Raises:
        DataError: this Python carries too little source text.
    """
    if rows_per_group < 1 or heldout_row_groups < 1:
        raise ValueError(
            f"expected rows_per_group and heldout_row_groups >= 1, got {rows_per_group}, {heldout_row_groups}"
        )
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    documents = list(_documents(root))
    random.Random(SEED).shuffle(documents)
    num_rows = sum(len(_cut(document.text)) for document in documents)
    num_train = num_rows // rows_per_group - heldout_row_groups
    if num_train < MIN_TRAIN_ROW_GROUPS:
        raise DataError(
            f"{root} holds {len(documents)} documents in {num_rows} rows: {max(num_train, 0)} training row groups, "
            f"expected at least {MIN_TRAIN_ROW_GROUPS}. Install Python with its standard library's sources (*.py), "
            "or name a data set with data.repo"
        )
    total_chars = sum(len(document.text) for document in documents)
    heldout_chars = total_chars * heldout_row_groups // (num_train + heldout_row_groups)
    train, heldout = _hold_out(documents, heldout_chars)
    groups = _balance(train, num_train) + _balance(heldout, heldout_row_groups)
    paths = _write(dest, groups)
    logger.info("corpus: %d documents, %d rows, %d row groups in %s", len(documents), num_rows, len(groups), dest)
    return paths


def _documents(root: Path) -> Iterator[_Document]:
    """Topics and modules with documentation, in order of path; a docstring that occurs twice is taken once."""
    seen: set[str] = set()
    for path in _sources(root):
        relative = path.relative_to(root)
        tree = _parse(path)
        if tree is None:
            continue
        name = relative.as_posix()
        if name == "pydoc_data/topics.py":
            found = list(_topics(tree))
        else:
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found = [(module, "\n\n".join(_docstrings(tree, module, seen)))]
        for title, text in found:
            if len(text) >= MIN_DOCUMENT_CHARS:
                yield _Document(name, title, text)


def _sources(root: Path) -> list[Path]:
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths.extend(Path(folder, name) for name in names if name.endswith(".py"))
    return sorted(paths)


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates that only look like Python, or unreadable
            return None


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The entries of the one dictionary literal that `pydoc_data/topics.py` is."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and isinstance(value, ast.Constant)
                    and isinstance(key.value, str)
                    and isinstance(value.value, str)
                ):
                    yield key.value, value.value.strip()


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, seen: set[str]
) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and text not in seen:
        seen.add(text)
        if isinstance(node, ast.Module):
            yield text
        else:
            head = name
            if not isinstance(node, ast.ClassDef):
                head += f"({', '.join(argument.arg for argument in node.args.args)})"
            yield f"{head}\n\n{textwrap.indent(text, '    ')}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}", seen)


def _cut(text: str) -> list[str]:
    """Parts of at most `MAX_ROW_CHARS`, about equally long, cut between lines where lines allow."""
    target = len(text) / -(-len(text) // MAX_ROW_CHARS)
    parts: list[str] = []
    current = ""
    num_cut = 0
    for line in text.splitlines(keepends=True):
        # Aim at multiples of the target, not at the target each time: what each part misses would add up.
        past_target = num_cut + len(current) + len(line) / 2 > target * (len(parts) + 1)
        if current and (past_target or len(current) + len(line) > MAX_ROW_CHARS):
            parts.append(current)
            num_cut += len(current)
            current = ""
        current += line
        while len(current) > MAX_ROW_CHARS:
            parts.append(current[:MAX_ROW_CHARS])
            num_cut += MAX_ROW_CHARS
            current = current[MAX_ROW_CHARS:]
    parts.append(current)
    return [part.strip("\n") for part in parts if part.strip()]


def _hold_out(documents: Sequence[_Document], num_chars: int) -> tuple[list[_Document], list[_Document]]:
    """Part the documents into (train, held out), the latter with `num_chars` within 2% that occur nowhere else."""
    owner: dict[str, int] = {}
    shared: set[int] = set()
    for number, document in enumerate(documents):
        for shingle in _shingles(document.text):
            first = owner.setdefault(shingle, number)
            if first != number:
                shared.update((first, number))
    chosen: set[int] = set()
    tolerance = num_chars // 50
    missing = num_chars
    for number, document in enumerate(documents):
        limit = min(MAX_HELDOUT_CHARS, missing + tolerance)
        if missing > tolerance and number not in shared and len(document.text) <= limit:
            chosen.add(number)
            missing -= len(document.text)
    if missing > tolerance:
        raise DataError(
            f"the corpus has too few documents without text in common to hold out {num_chars} characters: "
            f"{missing} are missing. Ask for fewer held-out row groups, or name a data set with data.repo"
        )
    train = [document for number, document in enumerate(documents) if number not in chosen]
    return train, [documents[number] for number in sorted(chosen)]


def _shingles(text: str) -> Iterator[str]:
    words = text.lower().split()
    for start in range(len(words) - SHINGLE_WORDS + 1):
        yield " ".join(words[start : start + SHINGLE_WORDS])


def _balance(documents: Sequence[_Document], num_groups: int) -> list[list[_Row]]:
    """Deal rows, longest first, each to the group with the least text so far; then shuffle within groups."""
    rows = [_Row(document, part, text) for document in documents for part, text in enumerate(_cut(document.text))]
    groups: list[list[_Row]] = [[] for _ in range(num_groups)]
    heap = [(0, number) for number in range(num_groups)]
    # The sort is stable: rows of one length stay in the order of the shuffled documents.
    for row in sorted(rows, key=lambda row: -len(row.text)):
        num_chars, number = heapq.heappop(heap)
        groups[number].append(row)
        heapq.heappush(heap, (num_chars + len(row.text), number))
    generator = random.Random(SEED)
    for group in groups:
        generator.shuffle(group)
    return groups


def _write(dest: Path, groups: Sequence[Sequence[_Row]]) -> list[Path]:
    dest.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for start in range(0, len(groups), ROW_GROUPS_PER_FILE):
        path = dest / f"000_{len(paths):05d}.parquet"
        # Statistics would be a third of so small a file.
        with pq.ParquetWriter(path, SCHEMA, compression="zstd", write_statistics=False) as writer:
            for group in groups[start : start + ROW_GROUPS_PER_FILE]:
                writer.write_table(pa.Table.from_pylist([_columns(row) for row in group], schema=SCHEMA))
        paths.append(path)
    return paths


def _columns(row: _Row) -> dict[str, str | float | int]:
    version = platform.python_version()
    return {
        "text": row.text,
        "id": hashlib.sha256(row.text.encode()).hexdigest()[:32],
        "dump": f"python-{version}",
        "url": f"https://docs.python.org/3/#{row.document.name}-{row.part}",
        "date": "1970-01-01T00:00:00Z",
        "file_path": row.document.path,
        "language": "en",
        "language_score": 1.0,
        "token_count": len(row.text.split()),
    }
