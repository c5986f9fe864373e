from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hivetrain.data.tokenizer import (
    MAX_FILE_BYTES,
    load_tokenizer,
    save_tokenizer,
    tokenizer_sha256,
    train_tokenizer,
)
from hivetrain.errors import ConfigError

TEXTS = ["the bees bring what the hive shares, and the hive shares it again", "naïve café: 🐝 → honey\n\n\tdone"] * 20


def test_training_twice_gives_identical_bytes(tmp_path: Path) -> None:
    first = save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "a")
    second = save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "b")
    assert first == second
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "b")


def test_training_in_another_process_gives_identical_bytes(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "a")
    code = (
        "import sys, json, pathlib; from hivetrain.data.tokenizer import save_tokenizer, train_tokenizer; "
        "save_tokenizer(train_tokenizer(json.loads(sys.argv[2]), 300), pathlib.Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "777", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b"), json.dumps(TEXTS)], check=True, env=environment, timeout=100
    )
    assert tokenizer_sha256(tmp_path / "a") == tokenizer_sha256(tmp_path / "b")


def test_every_byte_survives_and_end_of_text_parts_documents() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    text = "never seen: \x00\x7f ñ 中文 🚀 \r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.eos_token == "<|endoftext|>"


def test_loaded_tokenizer_gives_the_same_ids_without_any_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train_tokenizer(TEXTS, 300)
    save_tokenizer(trained, tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = load_tokenizer(tmp_path)
    assert loaded(TEXTS)["input_ids"] == trained(TEXTS)["input_ids"]
    assert loaded.eos_token_id == 0


def test_code_that_a_tokenizer_folder_names_is_not_run(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')\n")
    assert load_tokenizer(tmp_path)("hive")["input_ids"]


def test_sha256_covers_the_tokenizers_files_and_nothing_else(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path)
    before = tokenizer_sha256(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert tokenizer_sha256(tmp_path) == before
    (tmp_path / "special_tokens_map.json").write_text("{}")
    assert tokenizer_sha256(tmp_path) != before


def test_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        tokenizer_sha256(tmp_path)


def test_tokenizer_that_does_not_parse_is_refused(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_an_end_of_text_token_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.eos_token = None
    save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="no eos token"):
        load_tokenizer(tmp_path)


def test_oversize_tokenizer_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match="expected at most"):
        tokenizer_sha256(tmp_path)


def test_vocabulary_without_room_for_every_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer(TEXTS, 256)
