"""`hivetrain doctor`: what on this machine could keep a neuron from running, and how to mend it."""

from __future__ import annotations

import email.utils
import enum
import http.client
import importlib.metadata
import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PACKAGES = [
    "hivetrain",
    "bittensor",
    "torch",
    "hivemind",
    "transformers",
    "peft",
    "huggingface_hub",
    "safetensors",
    "trackio",
    "wandb",
    "pydantic",
    "starlette",
]
MIN_DISK_GB = 5.0
MIN_MEMORY_GB = 4.0
MAX_CLOCK_SKEW_S = 10.0


class Verdict(enum.StrEnum):
    """How one check came out."""

    OK = "ok"
    WARN = "warn"  # works, but worse than it could, or only for some roles
    FAIL = "fail"  # a neuron cannot run


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check, and the fix if there is one to make."""

    name: str
    verdict: Verdict
    detail: str
    fix: str = ""


def examine(
    folder: Path, *, environ: Mapping[str, str], axon_port: int | None = None, hub_endpoint: str = ""
) -> list[Check]:
    """Run every check.

    Args:
        folder: where the state is kept; disk space is measured there.
        axon_port: the port that an axon would listen on; None: not asked.
        hub_endpoint: the hub whose clock ours is compared with; empty: not asked, so nothing leaves this machine.
    """
    checks = [check_python(), *check_torch(), check_disk(folder), check_memory(), check_packages()]
    checks.append(check_p2p())
    checks.append(check_loopback())
    if axon_port is not None:
        checks.append(check_port(axon_port))
    checks.extend(check_tokens(environ))
    if hub_endpoint:
        checks.append(check_clock(hub_endpoint))
    return checks


def check_python() -> Check:
    """Python is one that the project supports."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Check(name="python", verdict=Verdict.OK, detail=version)
    fix = "make the virtual environment with Python 3.11 or 3.12"
    return Check(name="python", verdict=Verdict.FAIL, detail=f"{version}, need 3.11 or 3.12", fix=fix)


def check_torch() -> list[Check]:
    """PyTorch computes, and on what."""
    try:
        import torch
    except (ImportError, OSError) as exc:
        return [Check(name="torch", verdict=Verdict.FAIL, detail=str(exc), fix="pip install torch")]
    total = float(torch.ones(8).sum())
    works = Verdict.OK if total == 8.0 else Verdict.FAIL
    checks = [Check(name="torch", verdict=works, detail=f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        checks.append(Check(name="device", verdict=Verdict.OK, detail=f"cuda: {names}"))
    else:
        fix = "for a GPU, install its driver and the CUDA build of torch"
        checks.append(Check(name="device", verdict=Verdict.WARN, detail="cpu only", fix=fix))
    return checks


def check_disk(folder: Path) -> Check:
    """There is room, and the folder can be written."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free_gb = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        return Check(name="disk", verdict=Verdict.FAIL, detail=f"{place} cannot be written", fix="choose another --dir")
    verdict = Verdict.OK if free_gb >= MIN_DISK_GB else Verdict.FAIL
    fix = "" if verdict is Verdict.OK else f"free some space: {MIN_DISK_GB:.0f} GB are needed"
    return Check(name="disk", verdict=verdict, detail=f"{free_gb:.1f} GB free at {place}", fix=fix)


def check_memory() -> Check:
    """There is memory for a small network."""
    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available, {os.cpu_count()} cores"
    if memory.available / 1e9 >= MIN_MEMORY_GB:
        return Check(name="memory", verdict=Verdict.OK, detail=detail)
    fix = f"`hivetrain up` with 3 miners needs about {MIN_MEMORY_GB:.0f} GB: start fewer, or close other programs"
    return Check(name="memory", verdict=Verdict.WARN, detail=detail, fix=fix)


def check_packages() -> Check:
    """Every package that matters is installed."""
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        fix = "run scripts/up again, or pip install -c constraints.txt -e ."
        return Check(name="packages", verdict=Verdict.FAIL, detail=f"missing: {', '.join(missing)}", fix=fix)
    return Check(name="packages", verdict=Verdict.OK, detail=", ".join(versions))


def check_p2p() -> Check:
    """The libp2p daemon that hivemind brings is there for this kind of machine."""
    try:
        files = importlib.metadata.files("hivemind") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "p2pd" and os.access(str(file.locate()), os.X_OK):
            return Check(name="p2p", verdict=Verdict.OK, detail="p2pd is bundled with hivemind")
    fix = "use Linux on x86_64, or build hivemind from source with its p2pd"
    return Check(name="p2p", verdict=Verdict.FAIL, detail="hivemind has no p2pd for this machine", fix=fix)


def check_loopback() -> Check:
    """Programs on this machine can reach each other."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2.0).close()
    except OSError as exc:
        fix = "allow connections to 127.0.0.1"
        return Check(name="loopback", verdict=Verdict.FAIL, detail=str(exc), fix=fix)
    return Check(name="loopback", verdict=Verdict.OK, detail="127.0.0.1 connects")


def check_port(port: int) -> Check:
    """The axon's port is free."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("0.0.0.0", port))
        except (OSError, OverflowError) as exc:
            fix = "stop what listens there, or choose another --axon.port"
            return Check(name="axon port", verdict=Verdict.FAIL, detail=f"{port}: {exc}", fix=fix)
    return Check(name="axon port", verdict=Verdict.OK, detail=f"{port} is free")


def check_tokens(environ: Mapping[str, str]) -> list[Check]:
    """Which tokens are set; never what they are."""
    wanted = {
        "hub token": (("HIVETRAIN_HUB_TOKEN", "HF_TOKEN"), "needed to publish on a hub; `hivetrain up` needs none"),
        "wandb key": (("WANDB_API_KEY",), "needed for --tracker.kind wandb online"),
    }
    checks = []
    for name, (variables, why) in wanted.items():
        present = [variable for variable in variables if environ.get(variable)]
        detail = f"set in {present[0]}" if present else f"not set ({why})"
        checks.append(Check(name=name, verdict=Verdict.OK if present else Verdict.WARN, detail=detail))
    return checks


def check_clock(endpoint: str) -> Check:
    """Our clock agrees with the hub's, within its answer's resolution of a second."""
    started = time.time()
    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=5.0) as response:
            header = response.headers.get("Date")
    except urllib.error.HTTPError as exc:  # an answer all the same, and it carries the date
        header = exc.headers.get("Date")
        exc.close()
    except (OSError, ValueError, http.client.HTTPException) as exc:
        fix = "check --hub.endpoint and the network"
        return Check(name="clock", verdict=Verdict.WARN, detail=f"cannot ask {endpoint}: {exc}", fix=fix)
    try:
        theirs = email.utils.parsedate_to_datetime(header or "").timestamp()
    except ValueError:
        return Check(name="clock", verdict=Verdict.WARN, detail=f"{endpoint} sends no Date")
    skew_s = (started + time.time()) / 2 - theirs
    if abs(skew_s) <= MAX_CLOCK_SKEW_S:
        return Check(name="clock", verdict=Verdict.OK, detail=f"within {abs(skew_s):.0f} s of {endpoint}")
    fix = "synchronise this machine's clock (NTP): signed messages carry the time"
    return Check(name="clock", verdict=Verdict.FAIL, detail=f"{skew_s:+.0f} s off {endpoint}", fix=fix)


def as_json(checks: list[Check]) -> dict[str, object]:
    """For `hivetrain doctor --json`."""
    return {"ok": all(check.verdict is not Verdict.FAIL for check in checks), "checks": [asdict(c) for c in checks]}
