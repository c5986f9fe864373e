"""The examples as a reader would start them: two terminals, no account, no network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def example(name: str, output: Path, environ: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    log = output.with_suffix(".log").open("wb")
    with log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / name), "--run_id", "t", "--output_dir", str(output), *arguments],
            stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environ},
        )  # fmt: skip


def printed_command(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := re.search(r"or start the same script with: PEERS=(\S+) python", log.read_text()):
            return found.group(1)
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def test_the_dora_example_trains_with_a_friend_who_copies_the_printed_line(tmp_path: Path) -> None:
    first = example("dora.py", tmp_path / "a", {}, "--max_steps", "2000")
    second = None
    try:
        peers = printed_command(tmp_path / "a.log", first)
        second = example("dora.py", tmp_path / "b", {"PEERS": peers}, "--max_steps", "8")
        # The friend leaves after its own steps, with what the two have trained so far.
        assert second.wait(90) == 0, (tmp_path / "b.log").read_text()
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(10)
    text = (tmp_path / "b.log").read_text()
    assert "loaded from the swarm" in text
    assert "Traceback" not in text
    assert (tmp_path / "b" / "adapter_model.safetensors").exists()


def test_the_causal_lm_example_and_the_notebook_train_alone(tmp_path: Path) -> None:
    process = example("causal_lm.py", tmp_path / "a", {}, "--max_steps", "24")
    cells = json.loads((ROOT / "examples" / "train_with_friends.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = (
        f"import sys\nsys.path.insert(0, {str(ROOT / 'examples')!r})\n{code}\nprint('ROUNDS', len(trainer.rounds))\n"
    )
    notebook = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.wait(90) == 0, (tmp_path / "a.log").read_text()
    assert "swarm: epoch=3 " in (tmp_path / "a.log").read_text()
    assert (tmp_path / "a" / "model.safetensors").exists()
    assert notebook.returncode == 0, notebook.stderr
    assert "ROUNDS 6" in notebook.stdout
