"""Targets under libFuzzer, each in a process of its own.

This process imports everything once, instrumented, and forks a child per target: libFuzzer ends the process that it
runs in, and a crash, a leak or a hang of one target is no other's. What was imported before `load` is not instrumented.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import logging
import os
import re
import resource
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

RSS_LIMIT_MB = 1024
SPARE_ADDRESS_BYTES = 4 << 30
INPUT_TIMEOUT_S = 10
"""Wall time after which libFuzzer calls one input a hang; `guard` measures CPU time and is stricter."""
CORPUS = Path(__file__).resolve().parents[2] / "tests" / "golden" / "fuzz"

_EXECUTED = re.compile(rb"stat::number_of_executed_units:\s*(\d+)")
_PEAK = re.compile(rb"stat::peak_rss_mb:\s*(\d+)")
_COVERED = re.compile(rb"cov: (\d+)")
_WRITTEN = re.compile(rb"Test unit written to (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one target.

    Attributes:
        status: the child's exit status; not 0: an input broke it, or the child itself.
        executions: inputs run; ``covered``: places in the code that they reached; ``peak_rss_mb`` of its process.
        reproducer: the input that broke it, where libFuzzer names one.
        tail: the last lines of its output.
    """

    target: str
    status: int
    executions: int
    covered: int
    peak_rss_mb: int
    reproducer: Path | None
    tail: str


def is_available() -> bool:
    """Whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


def load() -> None:
    """Import all targets, instrumented."""
    import atheris

    prefixes = ["hivetrain", "template", "bench.fuzzing"]
    quiet = contextlib.redirect_stderr(io.StringIO())  # it names every module
    with quiet, atheris.instrument_imports(include=prefixes, enable_loader_override=False):
        importlib.import_module("bench.fuzzing.targets")


def fuzz(shares: Mapping[str, float], keep: Path, runs: int = 0) -> list[Outcome]:
    """Fuzz one target after another.

    Args:
        shares: seconds, by target.
        keep: new inputs go to ``keep/NAME``, those that break something to ``keep/broken``, what a child says to
            ``keep/NAME.log``.
        runs: stop a target after so many inputs; 0: only by time.
    """
    return [_one(name, seconds, keep, runs) for name, seconds in shares.items()]


def _one(name: str, seconds: float, keep: Path, runs: int) -> Outcome:
    corpus, broken, log = keep / name, keep / "broken", keep / f"{name}.log"
    corpus.mkdir(parents=True, exist_ok=True)
    broken.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _child(name, seconds, corpus, broken, log, runs)
    _, waited = os.waitpid(child, 0)
    said = log.read_bytes()
    written = _WRITTEN.findall(said)
    return Outcome(
        target=name,
        status=os.waitstatus_to_exitcode(waited),
        executions=_last(_EXECUTED, said),
        covered=_last(_COVERED, said),
        peak_rss_mb=_last(_PEAK, said),
        reproducer=Path(os.fsdecode(written[-1])) if written else None,
        tail=said[-4000:].decode(errors="replace"),
    )


def _child(name: str, seconds: float, corpus: Path, broken: Path, log: Path, runs: int) -> NoReturn:
    """Fuzz, and exit: never back into the code of the parent, whose folders this process would remove."""
    with log.open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    status = 99
    try:
        _run(name, seconds, corpus, broken, runs)
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else status
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(status)  # the C library's: libFuzzer writes what it was running down as that calls it
    os._exit(status)


def _run(name: str, seconds: float, corpus: Path, broken: Path, runs: int) -> None:
    import atheris

    from bench.fuzzing.guard import exercise
    from bench.fuzzing.targets import find_target, warm_up

    logging.disable(logging.CRITICAL)  # refusals by the thousand
    target = find_target(name)
    warm_up(target)
    _bound_memory()
    options = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={target.max_len}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-timeout={INPUT_TIMEOUT_S}",
        f"-artifact_prefix={broken}/{name}-",
        "-print_final_stats=1",
        "-seed=1",
        "-use_value_profile=1",
    ]
    options += [f"-runs={runs}"] if runs else []
    seeds = CORPUS / name
    folders = [str(corpus)] + ([str(seeds)] if seeds.is_dir() else [])
    atheris.Setup(["bench.fuzz", *options, *folders], lambda data: exercise(target, data))
    atheris.Fuzz()


def _bound_memory() -> None:
    """What is asked for at once and never touched counts too: an address space that ends not far from here."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _last(pattern: re.Pattern[bytes], said: bytes) -> int:
    found = pattern.findall(said)
    return int(found[-1]) if found else 0
