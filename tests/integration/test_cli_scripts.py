"""The shell scripts, with a stand-in for Python that records what it is asked to install and to run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# `python -m venv DIR` puts itself there; pip and pytest only leave a line in calls.txt.
PYTHON = r"""#!/usr/bin/env bash
here="$ROOT_OF_TEST"
echo "python $*" >>"$here/calls.txt"
case "$*" in
    *"-m venv"*)
        mkdir -p "$here/checkout/.venv/bin"
        cp "$0" "$here/checkout/.venv/bin/python"
        tool="$here/checkout/.venv/bin/hivetrain"
        printf '#!/usr/bin/env bash\necho "hivetrain $*" >>"%s/calls.txt"\n' "$here" >"$tool"
        chmod +x "$tool" ;;
    *"pip"*torch*) [ -z "${FAIL_TORCH:-}" ] || { echo "no space left on device"; exit 1; } ;;
    *miner.py*) exit "${MINER_STATUS:-0}" ;;
esac
exit 0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, root / name)
    python = tmp_path / "bin" / "python3.12"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    return root


def run(checkout: Path, script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{checkout.parent / 'bin'}:/usr/bin:/bin", "ROOT_OF_TEST": str(checkout.parent), **environ}
    command = [str(checkout / "scripts" / script), *arguments]
    return subprocess.run(
        command, env=env, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def calls(checkout: Path) -> list[str]:
    path = checkout.parent / "calls.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_the_first_up_installs_torch_first_and_the_second_installs_nothing(checkout: Path) -> None:
    done = run(checkout, "up", "--epochs", "3", "--json", "a file.json")
    assert done.returncode == 0, done.stderr
    installs = [call for call in calls(checkout) if " install " in call]
    assert len(installs) == 2
    assert "torch==2.13.0" in installs[0]
    assert "-e" in installs[1]
    assert all(f"-c {checkout}/constraints.txt" in call for call in installs)
    assert calls(checkout)[-1] == "hivetrain up --epochs 3 --json a file.json"
    assert [line[:5] for line in done.stderr.splitlines()] == ["[1/3]", "[2/3]", "[3/3]"]
    again = run(checkout, "up")
    assert again.returncode == 0
    assert again.stderr == ""
    assert [call for call in calls(checkout) if " install " in call] == installs
    assert calls(checkout)[-1] == "hivetrain up"


def test_changed_constraints_are_installed(checkout: Path) -> None:
    run(checkout, "up")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("extra==1\n")
    run(checkout, "up")
    assert len([call for call in calls(checkout) if " install " in call]) == 4


def test_a_failed_install_says_why_and_is_tried_again(checkout: Path) -> None:
    done = run(checkout, "up", FAIL_TORCH="1")
    assert done.returncode == 1
    assert "no space left on device" in done.stderr
    assert "error: PyTorch could not be installed" in done.stderr
    assert not any(call.startswith("hivetrain") for call in calls(checkout))
    assert run(checkout, "up").returncode == 0


def test_no_suitable_python_is_a_clear_error(checkout: Path) -> None:
    python = checkout.parent / "bin" / "python3.12"
    python.write_text("#!/bin/sh\nexit 1\n")
    for name in ("python3.11", "python3"):
        shutil.copy(python, python.with_name(name))
    done = run(checkout, "up")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Hivetrain needs Python 3.11 or 3.12")


@pytest.mark.parametrize("status", ["0", "2"])
def test_the_restart_loop_ends_when_the_miner_was_stopped_or_cannot_work(checkout: Path, status: str) -> None:
    done = run(checkout, "run_miner.sh", "--netuid", "1", MINER_STATUS=status)
    assert done.returncode == int(status)
    assert [call for call in calls(checkout) if "miner.py" in call] == [
        f"python {checkout}/neurons/miner.py --netuid 1"
    ]


def test_the_restart_loop_starts_a_dead_miner_again_and_ends_with_sigterm(checkout: Path) -> None:
    env = {
        "PATH": f"{checkout.parent / 'bin'}:/usr/bin:/bin",
        "ROOT_OF_TEST": str(checkout.parent),
        "MINER_STATUS": "9",
    }
    loop = subprocess.Popen([str(checkout / "scripts" / "run_miner.sh")], env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while len([call for call in calls(checkout) if "miner.py" in call]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(loop.pid, signal.SIGTERM)
        _, err = loop.communicate(timeout=30)
    finally:
        loop.kill()
        loop.communicate()
    assert loop.returncode == 0
    assert "ended with status 9, started again in 1 s" in err


@pytest.mark.parametrize("name", ["up", "test", "check", "env.sh", "run_miner.sh", "run_validator.sh"])
def test_the_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / "scripts" / name)], check=True, timeout=30)


def test_the_pm2_file_parses() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    subprocess.run([node, "--check", str(REPOSITORY / "deploy" / "ecosystem.config.js")], check=True, timeout=30)
