"""The fuzzer that is guided by coverage: a minute over all targets, and a planted bug that it has to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fuzzing.campaign import RSS_LIMIT_MB, is_available
from bench.fuzzing.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
NUM_CLAIMS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(700),
    pytest.mark.skipif(
        not is_available(), reason="needs atheris, which has wheels for CPython 3.11 to 3.13 on x86-64 Linux only"
    ),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_minute_of_guided_inputs_breaks_nothing(tmp_path: Path) -> None:
    keep, claims_file = tmp_path / "kept", tmp_path / "claims.json"
    done = run("--quick", "--keep", str(keep), "--json", str(claims_file))
    assert done.returncode == 0, done.stdout + done.stderr
    claims = {claim["name"]: claim for claim in json.loads(claims_file.read_text())["claims"]}
    assert len(claims) == NUM_CLAIMS
    assert claims["targets that an input broke"]["value"] == 0
    assert claims["inputs run by the target that ran fewest"]["value"] > 0
    assert claims["peak memory of a target, MB"]["value"] <= RSS_LIMIT_MB
    assert not list((keep / "broken").iterdir())
    for name in TARGETS:
        assert list((keep / name).iterdir()), f"{name} found no new input: is its code instrumented?"


def test_a_planted_bug_is_found_and_its_input_is_kept(tmp_path: Path) -> None:
    done = run("--minutes", "2", "--target", "planted", "--keep", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the planted bug is found" in done.stderr
    (found,) = (tmp_path / "broken").iterdir()
    assert found.read_bytes().startswith(b"Hive")
    again = run("--target", "planted", "--reproduce", str(found))
    assert again.returncode != 0
    assert "the planted bug is found" in again.stderr
