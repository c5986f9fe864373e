"""Child processes that are restarted when they die, stopped in order, and never outlive us (Linux).

Three things together leave no orphan, whatever is killed:

- each child leads its own session, so that one SIGKILL reaches its whole process group, hivemind's p2pd and
  data workers included: when the child ends, however it ends, the rest of its group is killed before it is reaped
  (until then its number cannot be given to another process). SIGTERM goes to the child alone, which takes down its
  own helpers: a p2pd that died first would leave a neuron to wait for it until its time is up;
- the kernel kills each child when we die (``PR_SET_PDEATHSIG``), which covers the child, not its children;
- a *guardian* process holds the other end of a pipe and knows every group. Our death closes the pipe, however
  we die, and the guardian kills the groups.

PDEATHSIG fires when the *thread* that started the child ends: start children from the main thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hivetrain.errors import ConfigError, ServiceError

logger = logging.getLogger(__name__)

BAD_CONFIG_EXIT = 2
"""Exit status of a child whose configuration cannot work: starting it again cannot help."""

MAX_LOG_BYTES = 16 << 20
READY_POLL_S = 0.1

# Runs between fork and the real program: sets PDEATHSIG, dies if the parent was faster in dying, then execs.
# A separate interpreter, not preexec_fn: Python code between fork and exec can deadlock beside threads.
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as exc:
    print(f"cannot start {sys.argv[2]}: {exc.strerror}", file=sys.stderr)
    os._exit(2)
"""

# Reads "+PGID" and "-PGID" lines until our end of the pipe closes, then kills what is left.
_GUARD = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
groups = set()
for line in sys.stdin.buffer:
    (groups.add if line[:1] == b"+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
"""


class ChildState(enum.Enum):
    """What one child is doing."""

    RUNNING = "running"
    BACKOFF = "backoff"  # died; waits to be started again
    STOPPED = "stopped"  # we stopped it
    EXITED = "exited"  # ended by itself and is not to be restarted
    FAILED = "failed"  # died too often, or says that its configuration cannot work


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process to run.

    Attributes:
        env: added to our own environment.
        log_path: standard output and error go there, appended.
        restart: start it again when it ends by itself.
        ready: whether it serves; asked in a worker thread, must not raise.
    """

    name: str
    argv: Sequence[str]
    log_path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    restart: bool = True
    ready: Callable[[], bool] | None = None
    stop_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits of ``first_s``, doubled up to ``max_s``; ``max_failures`` in a row without a healthy spell give up."""

    first_s: float = 1.0
    max_s: float = 30.0
    healthy_s: float = 60.0
    max_failures: int = 5

    def delay_s(self, num_failures: int) -> float:
        """Seconds to wait after the ``num_failures``-th failure in a row (counted from 1)."""
        return min(self.first_s * 2.0 ** (num_failures - 1), self.max_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEvent:
    """Something that happened to a child, in words; ``is_problem`` for a death."""

    name: str
    text: str
    is_problem: bool = False


@dataclass(slots=True)
class Child:
    """One child as it stands; written by the supervisor only."""

    spec: ProcessSpec
    state: ChildState = ChildState.RUNNING
    pid: int = 0
    exit_code: int | None = None  # of the last process; negative: killed by that signal
    num_restarts: int = 0
    _num_failures: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _task: asyncio.Task[None] | None = None
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Starts children, restarts them with exponential back-off, and stops them.

    Args:
        on_event: told of every start, death and restart; called on the event loop.
    """

    def __init__(self, *, backoff: Backoff | None = None, on_event: Callable[[ChildEvent], None] | None = None) -> None:
        self._backoff = backoff or Backoff()
        self._on_event = on_event or (lambda event: None)
        self._guardian: subprocess.Popen[bytes] | None = None
        self.children: dict[str, Child] = {}

    async def __aenter__(self) -> Supervisor:
        self._guardian = _start_guardian()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self, spec: ProcessSpec) -> Child:
        """Start one child, from the main thread.

        Raises:
            ConfigError: its program or log file cannot be opened.
        """
        old = self.children.get(spec.name)
        if old is not None and old.state in (ChildState.RUNNING, ChildState.BACKOFF):
            raise ValueError(f"{spec.name} is already running")
        child = Child(spec)
        self._spawn(child)
        self.children[spec.name] = child
        child._task = asyncio.create_task(self._watch(child), name=f"watch {spec.name}")
        return child

    async def wait_ready(self, name: str, timeout_s: float) -> None:
        """Wait until the child serves.

        Raises:
            ServiceError: it gave up, ended, or did not become ready in time; holds its last log lines.
        """
        child = self.children[name]
        deadline = time.monotonic() + timeout_s
        while child.spec.ready is not None and not await asyncio.to_thread(child.spec.ready):
            if child.state in (ChildState.FAILED, ChildState.EXITED, ChildState.STOPPED):
                raise ServiceError(self._obituary(child, f"{name} ended before it was ready"))
            if time.monotonic() > deadline:
                raise ServiceError(self._obituary(child, f"{name} was not ready within {timeout_s:.0f} s"))
            await asyncio.sleep(READY_POLL_S)

    async def run_once(self, spec: ProcessSpec) -> None:
        """Run a child to its end.

        Raises:
            ServiceError: it ended with another status than 0; holds its last log lines.
        """
        child = self.start(spec)
        assert child._task is not None
        await asyncio.shield(child._task)  # whoever gives up waiting must still find the watcher at work
        if child.exit_code != 0 and child.state is not ChildState.STOPPED:
            raise ServiceError(self._obituary(child, f"{spec.name} failed with {_status(child.exit_code)}"))

    async def stop(self, names: Iterable[str]) -> None:
        """Stop children at the same time: SIGTERM to each, SIGKILL to its group after its ``stop_timeout_s``."""
        await asyncio.gather(*(self._stop(self.children[name]) for name in names if name in self.children))

    async def close(self) -> None:
        """Stop every child, then the guardian."""
        await self.stop(list(self.children))
        guardian, self._guardian = self._guardian, None
        if guardian is not None and guardian.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                guardian.stdin.close()
            await asyncio.to_thread(guardian.wait)

    def kill_all(self) -> None:
        """SIGKILL every group at once, for an impatient user; `close` still has to follow."""
        for child in self.children.values():
            child._stopping.set()
            if child._process is not None:
                _signal_group(child.pid, signal.SIGKILL)

    def _spawn(self, child: Child) -> None:
        spec = child.spec
        argv = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *spec.argv]
        try:
            with _open_log(spec.log_path) as log:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                log.write(f"--- {stamp} starting {spec.name}\n".encode())
                log.flush()
                child._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **spec.env},
                    start_new_session=True,
                )
        except OSError as exc:
            raise ConfigError(f"cannot start {spec.name}: {exc.filename or spec.argv[0]}: {exc.strerror}") from exc
        child.pid = child._process.pid
        child.state = ChildState.RUNNING
        self._tell_guardian(f"+{child.pid}\n")
        self._on_event(ChildEvent(name=spec.name, text=f"started, pid {child.pid}"))

    async def _watch(self, child: Child) -> None:
        while True:
            started = time.monotonic()
            child.exit_code = await self._reap(child)
            if child._stopping.is_set():
                child.state = ChildState.STOPPED
                return
            if not child.spec.restart:
                child.state = ChildState.EXITED
                return
            healthy = time.monotonic() - started >= self._backoff.healthy_s
            child._num_failures = 1 if healthy else child._num_failures + 1
            status = _status(child.exit_code)
            if child.exit_code == BAD_CONFIG_EXIT or child._num_failures >= self._backoff.max_failures:
                child.state = ChildState.FAILED
                why = f"ended with {status}, {child._num_failures} times in a row; not started again"
                if child.exit_code == BAD_CONFIG_EXIT:
                    why = f"ended with {status}: its settings cannot work; not started again"
                self._on_event(ChildEvent(name=child.spec.name, text=self._obituary(child, why), is_problem=True))
                return
            delay_s = self._backoff.delay_s(child._num_failures)
            child.state = ChildState.BACKOFF
            text = f"ended with {status}, restarted in {delay_s:.0f} s, see {child.spec.log_path}"
            self._on_event(ChildEvent(name=child.spec.name, text=text, is_problem=True))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child._stopping.wait(), delay_s)
            if child._stopping.is_set():
                child.state = ChildState.STOPPED
                return
            child.num_restarts += 1
            try:
                self._spawn(child)
            except ConfigError as exc:
                child.state = ChildState.FAILED
                self._on_event(ChildEvent(name=child.spec.name, text=str(exc), is_problem=True))
                return

    async def _reap(self, child: Child) -> int:
        assert child._process is not None
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        descriptor = os.pidfd_open(child.pid)
        try:
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        _signal_group(child.pid, signal.SIGKILL)  # before wait(): see the module's docstring
        self._tell_guardian(f"-{child.pid}\n")
        status = child._process.wait()
        child._process = None
        return status

    async def _stop(self, child: Child) -> None:
        child._stopping.set()
        if child._task is None or child._task.done():
            return
        if child._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
        await asyncio.wait([child._task], timeout=child.spec.stop_timeout_s)
        if not child._task.done() and child._process is not None:
            logger.warning("%s did not stop within %.0f s: killed", child.spec.name, child.spec.stop_timeout_s)
            _signal_group(child.pid, signal.SIGKILL)
        await asyncio.shield(child._task)

    def _tell_guardian(self, line: str) -> None:
        if self._guardian is None or self._guardian.stdin is None:
            raise RuntimeError("the supervisor is not started: use it in `async with`")
        try:
            self._guardian.stdin.write(line.encode())
            self._guardian.stdin.flush()
        except BrokenPipeError:
            logger.warning("the guardian process is gone: kill -9 may now leave children of children behind")

    def _obituary(self, child: Child, text: str) -> str:
        lines = log_tail(child.spec.log_path)
        return "\n".join([f"{text}; the end of {child.spec.log_path}:", *(f"    {line}" for line in lines)])


def _start_guardian() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def log_tail(path: Path, num_lines: int = 12) -> list[str]:
    """The last lines of a log file; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 32_768))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-num_lines:]


def _open_log(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(path.suffix + ".1"))
    return path.open("ab")


def _signal_group(pgid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)


def _status(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"status {exit_code}"
