from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hivetrain.data.corpus import MAX_ROW_CHARS, build_corpus
from hivetrain.data.index import build_index
from hivetrain.data.reader import SegmentReader, load_heldout, load_round, pack
from hivetrain.data.tokenizer import train_tokenizer
from hivetrain.errors import DataError
from hivetrain.hub.dataset import LocalDataset
from hivetrain.run import Data, Inner

FINEWEB_COLUMNS = {
    "text": "string",
    "id": "string",
    "dump": "string",
    "url": "string",
    "date": "string",
    "file_path": "string",
    "language": "string",
    "language_score": "double",
    "token_count": "int64",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder)
    return folder


def row_group_texts(folder: Path) -> list[list[str]]:
    files = [pq.ParquetFile(path) for path in sorted(folder.glob("*.parquet"))]
    return [
        file.read_row_group(place, columns=["text"]).column(0).to_pylist()
        for file in files
        for place in range(file.num_row_groups)
    ]


def test_corpus_has_finewebs_columns_and_short_rows(corpus: Path) -> None:
    paths = sorted(corpus.glob("*.parquet"))
    assert len(paths) >= 2
    for path in paths:
        schema = pq.read_schema(path)
        assert {name: str(schema.field(name).type) for name in schema.names} == FINEWEB_COLUMNS
    texts = [text for group in row_group_texts(corpus) for text in group]
    assert all(0 < len(text) <= MAX_ROW_CHARS for text in texts)
    assert 0.8e6 < sum(path.stat().st_size for path in paths) < 2e6


def test_row_groups_are_many_and_of_nearly_equal_text_size(corpus: Path) -> None:
    sizes = [sum(map(len, group)) for group in row_group_texts(corpus)]
    assert len(sizes) >= 98  # 96 to train on, 2 held out
    assert max(sizes) < 1.05 * min(sizes)


def test_two_row_groups_are_enough_for_one_round_of_the_default_recipe(corpus: Path) -> None:
    groups = row_group_texts(corpus)
    tokenizer = train_tokenizer((text for group in groups for text in group), 1024)
    data = Data()
    files = LocalDataset(corpus)
    index = build_index(files, data.repo, data.revision, data.config, data.heldout_row_groups)
    reader = SegmentReader(files, data.text_column)
    assert min(pack(group, tokenizer, 1).numel() for group in groups) >= 7000
    for rank in range(data.max_miners):
        got = load_round(reader, index, tokenizer, run_id="r", round_number=0, rank=rank, data=data)
        assert got.num_steps(Inner().max_steps) == Inner().max_steps
    assert load_heldout(reader, index, tokenizer, data).shape == (16, 4, 64)


def test_heldout_row_groups_share_no_long_line_or_row_with_the_training_rows(corpus: Path) -> None:
    groups = row_group_texts(corpus)

    def lines(part: list[list[str]]) -> set[str]:
        found = {" ".join(line.split()).lower() for group in part for text in group for line in text.splitlines()}
        return {line for line in found if len(line.split()) >= 8}

    train, heldout = lines(groups[:-2]), lines(groups[-2:])
    assert len(heldout) > 100
    assert not train & heldout


def test_heldout_rows_come_from_documents_of_their_own(corpus: Path) -> None:
    tables = [pq.read_table(path) for path in sorted(corpus.glob("*.parquet"))]
    urls = [url.rpartition("-")[0] for table in tables for url in table.column("url").to_pylist()]
    num_heldout = sum(len(group) for group in row_group_texts(corpus)[-2:])
    assert len(set(urls[-num_heldout:])) >= 4
    assert not set(urls[-num_heldout:]) & set(urls[:-num_heldout])


def stand_in(folder: Path, num_modules: int) -> Path:
    """A standard library of modules with docstrings; importing any of them fails."""
    package = folder / "package"
    package.mkdir(parents=True)
    for number in range(num_modules):
        words = " ".join(f"word{number}x{n}" for n in range(120))
        source = f'"""Module {number}.\n\n{words}\n"""\nraise SystemExit("imported")\n'
        (package / f"m{number}.py").write_text(f'{source}\n\ndef f(a, b):\n    """{words[:90]}"""\n')
    (package / "broken.py").write_text("def (:\n")
    (package / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    tests = folder / "test"
    tests.mkdir()
    (tests / "test_m.py").write_text(f'"""{"not for training " * 40}"""\n')
    return folder


def test_two_builds_from_the_same_sources_are_the_same_bytes(tmp_path: Path) -> None:
    library = stand_in(tmp_path / "lib", 80)
    first = build_corpus(tmp_path / "a", rows_per_group=2, stdlib=library)
    second = build_corpus(tmp_path / "b", rows_per_group=2, stdlib=library)
    assert [path.name for path in first] == [path.name for path in second] == ["000_00000.parquet"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_sources_are_parsed_but_never_imported_and_tests_are_left_out(tmp_path: Path) -> None:
    build_corpus(tmp_path / "out", rows_per_group=2, stdlib=stand_in(tmp_path / "lib", 80))
    text = "\n".join(text for group in row_group_texts(tmp_path / "out") for text in group)
    assert "package.m7.f(a, b)" in text
    assert "not for training" not in text


def test_topics_are_read_as_documents(tmp_path: Path) -> None:
    library = stand_in(tmp_path / "lib", 80)
    (library / "pydoc_data").mkdir()
    (library / "pydoc_data" / "topics.py").write_text(f"topics = {{'while': {'The while statement ' * 20!r}}}\n")
    build_corpus(tmp_path / "out", rows_per_group=2, stdlib=library)
    assert any("The while statement" in text for group in row_group_texts(tmp_path / "out") for text in group)


@pytest.mark.parametrize("num_modules", [0, 40])
def test_missing_sources_are_refused_with_the_fix(tmp_path: Path, num_modules: int) -> None:
    library = stand_in(tmp_path / "lib", num_modules)
    with pytest.raises(DataError, match=r"expected at least 32\. Install Python with its standard library's sources"):
        build_corpus(tmp_path / "out", rows_per_group=2, stdlib=library)


def test_sources_that_all_say_the_same_cannot_be_held_out(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    for number in range(80):
        (library / f"m{number}.py").write_text(
            f'"""Module {number}.\n\n{"the same words in every module " * 20}\n"""\n'
        )
    with pytest.raises(DataError, match="without text in common"):
        build_corpus(tmp_path / "out", rows_per_group=2, stdlib=library)


@pytest.mark.parametrize("bad", [{"rows_per_group": 0}, {"heldout_row_groups": 0}])
def test_row_groups_of_no_rows_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=">= 1"):
        build_corpus(tmp_path, **bad)


@pytest.mark.slow
def test_another_process_with_other_hashes_builds_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from hivetrain.data.corpus import build_corpus; build_corpus(pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, timeout=100)
    ours = {path.name: path.read_bytes() for path in corpus.glob("*.parquet")}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")} == ours
