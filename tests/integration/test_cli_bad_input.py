"""What a user gets wrong, through the real command: status 2, one line that says how to mend it, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurons.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], ["bogus", "hivetrain --help"]),
        (["up", "--minerz", "3"], ["--minerz", "--miners", "hivetrain up --help"]),
        (["up", "--miners", "many"], ["--miners", "integer"]),
        (["up", "--miners", "0"], ["--miners must be in 1..64, got 0"]),
        (["up", "--epochs", "0"], ["--epochs must be at least 1"]),
        (["up", "--tracker", "paper"], ["--tracker", "'paper'", "wandb"]),
        (["up", "--recipe", "/nowhere/run.toml"], ["--recipe", "/nowhere/run.toml", "No such file"]),
        (["up", "--json", "/nowhere/out.json"], ["--json", "/nowhere"]),
        (["up", "--port-base", "80"], ["--port-base", "1024"]),
        (["logs", "miner-9"], ["no log of miner-9"]),
        (["logs"], ["no logs in", "hivetrain up"]),
        (["down"], ["no `hivetrain up` runs in"]),
        (["config", "show", "--neuron.nmae", "x"], ["unknown flag --neuron.nmae", "--neuron.name"]),
        (["config", "show", "--axon.port", "0"], ["--axon.port", "'0'"]),
        (["config"], ["Missing command", "hivetrain config --help"]),
    ],
)
def test_a_mistake_is_one_line_with_status_2(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = = 3", ["run.toml", "not valid TOML"]),
        ("[inner]\nlr = -1.0", ["inner.lr must be > 0, got -1.0"]),
        ("[inner]\nlearning_rate = 1.0", ["unknown field inner.learning_rate"]),
        ("[model]\nhidden_size = 'big'", ["model.hidden_size must be int"]),
        ("[model]\nname = 'nobody/nothing'\nrevision = '1'", ['model.name must be "genesis" for a local run']),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_starts(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text(text)
    assert main(["up", "--recipe", str(recipe), "--dir", str(tmp_path / "net")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in [str(recipe), *words]:
        assert word in err
    assert not (tmp_path / "net").exists()


def test_binary_bytes_for_a_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_bytes(b"\xff\xfe\x00")
    assert main(["up", "--recipe", str(recipe)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    command = [sys.executable, "-m", "neurons.cli", "up", "--fresh", "--epochs", "1", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --dir: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "neurons.cli", "up", "--dir", str(tmp_path / "file" / "net")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --dir: cannot write ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["up", "--help"], ["config", "--help"]])
def test_help_is_shown_without_importing_anything_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from neurons.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'bittensor', 'hivemind', 'transformers', 'huggingface_hub', 'trackio', 'wandb'};"
        "print(sorted(heavy & set(sys.modules))); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: hivetrain" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_config_show_says_where_each_value_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {"BT_WALLET": "alice", "HF_TOKEN": "hf_secret"})
    assert main(["config", "show", "--netuid", "9"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["netuid"] == ["9", "--netuid"]
    assert rows["wallet.name"] == ["alice", "BT_WALLET"]
    assert rows["neuron.device"] == ["auto", "default"]
    assert "hf_secret" not in out
