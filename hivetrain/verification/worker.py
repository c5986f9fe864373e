"""Replay in a process of its own, at low priority and on one thread: a neuron does not feel what its checks cost.

The process opens the run like any node, from the hub, and judges one answer at a time. Only plain bytes and our own
records cross the pipe. Whatever happens to it (it dies, it is slow, the hub does not answer) is our own failure: a
`ServiceError`, "not scored". It ends when its pipe does, so a killed parent leaves no orphan.

A program of its own instead of `multiprocessing`'s spawn, which would import the neuron's main module once more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hivetrain.errors import ServiceError
from hivetrain.manifest import Ref
from hivetrain.scoring.score import CheckResult
from hivetrain.verification.challenge import Draw
from hivetrain.verification.judge import Answer, Judge
from hivetrain.verification.receipt import Receipt

logger = logging.getLogger(__name__)

NICE = 10
POLL_S = 0.05
PIPE_TIMEOUT_S = 5
"""An answer that has begun and does not go on for so long never ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What the process opens: the run on the hub, and where it keeps what it downloads."""

    endpoint: str
    repo: str
    token: str | None
    run_id: str
    cache: Path
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One answer to judge; without a receipt: load the base's state, and say nothing. The reply names its number."""

    number: int
    base: Ref
    round_number: int
    receipt: Receipt | None = None
    drawn: Draw | None = None
    answer: Answer | None = None


class ReplayProcess:
    """The parent's end. Owned by one thread.

    Args:
        spec: what to open.
        on_wait: called now and then while a verdict is awaited.
    """

    def __init__(self, spec: WorkerSpec, on_wait: Callable[[], None] = lambda: None) -> None:
        self._spec = spec
        self._on_wait = on_wait
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._outbox: queue.SimpleQueue[WorkerSpec | _Task | None] = queue.SimpleQueue()
        self._sender = threading.Thread()
        self._base: Ref | None = None
        self._round = -1
        self._number = 0
        self._in_time: Callable[[], bool] = lambda: True

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process; it opens the run while we go on. A process that died is replaced."""
        if self.pid is not None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "hivetrain.verification.worker", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
                )
        except OSError as exc:
            ours.close()
            raise ServiceError(f"the replay process cannot be started: {exc}") from exc
        limit = struct.pack("ll", PIPE_TIMEOUT_S, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._pipe = Connection(ours.detach())
        self._outbox = queue.SimpleQueue()
        self._sender = threading.Thread(target=_write, args=(self._pipe, self._outbox), name="replay", daemon=True)
        self._sender.start()
        self._outbox.put(self._spec)

    def begin_round(self, base: Ref, round_number: int, in_time: Callable[[], bool]) -> None:
        """The checks that follow are of this round.

        Args:
            in_time: False once the round has no time for a check: a replay that is under way then is killed.

        Raises:
            ServiceError: the process cannot be started.
        """
        self._base, self._round, self._in_time = base, round_number, in_time
        self.start()
        self._outbox.put(_Task(number=self._number, base=base, round_number=round_number))

    def judge(self, receipt: Receipt, drawn: Draw, answer: Answer) -> CheckResult:
        """As `Judge.judge`.

        Raises:
            ServiceError: the process died, took too long, or could not read what it needs.
        """
        if self._base is None:
            raise ServiceError("no round has begun for the replay process")
        self.start()
        self._number += 1
        self._outbox.put(
            _Task(
                number=self._number,
                base=self._base,
                round_number=self._round,
                receipt=receipt,
                drawn=drawn,
                answer=answer,
            )
        )
        number, reply = self._receive()
        if number != self._number:  # the answer to a question that was given up: never one miner's for another's
            self.close()
            raise ServiceError(f"the replay process answered question {number}, asked was {self._number}")
        if isinstance(reply, CheckResult):
            known = {"steps": answer.steps}
            return dataclasses.replace(reply, evidence={kind: known[kind] for kind in reply.evidence if kind in known})
        raise ServiceError(f"the replay failed here: {reply}")

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._pipe is not None:
            self._outbox.put(None)
            self._sender.join()  # what it wrote into the dead process's pipe has failed
            self._pipe.close()
            self._pipe = None

    def _receive(self) -> tuple[int, Any]:
        assert self._pipe is not None
        try:
            while not self._pipe.poll(POLL_S):
                self._on_wait()
                if not self._in_time():
                    raise TimeoutError
            number, reply = self._pipe.recv()
            return int(number), reply
        except (OSError, EOFError) as exc:
            self.close()
            late = isinstance(exc, TimeoutError)
            raise ServiceError("the replay was not done in time" if late else "the replay process died") from exc


def _write(pipe: Connection, outbox: queue.SimpleQueue[WorkerSpec | _Task | None]) -> None:
    """Send what is in the outbox: a process that does not read yet, or any more, keeps nobody else waiting."""
    with contextlib.suppress(OSError):
        while (message := outbox.get()) is not None:
            pipe.send(message)


class _Child:
    """The process's end: one run, the state of one epoch."""

    def __init__(self, spec: WorkerSpec) -> None:
        # Heavy, and of no use to the parent.
        import torch

        from hivetrain.hub.client import HubDataset, HubStore
        from hivetrain.workbench import Workbench

        torch.set_num_threads(1)
        self._bench = Workbench(
            store=HubStore(endpoint=spec.endpoint, repo=spec.repo, token=spec.token),
            open_dataset=lambda repo, revision: HubDataset(spec.endpoint, repo, revision, spec.token),
            cache=spec.cache,
            device=torch.device(spec.device),
        )
        self._parts = self._bench.open(spec.run_id)
        self._held: tuple[str, Any] = ("", None)

    def judge(self, task: _Task) -> CheckResult | None:
        """The verdict on one task; None for one that only prepares."""
        digest = task.base.manifest_sha256
        if self._held[0] != digest:
            self._held = digest, self._parts.base.adopt_(self._bench.load_state(task.base, self._parts))
        if task.receipt is None or task.drawn is None or task.answer is None:
            return None
        judge = Judge(
            parts=self._parts,
            base=task.base,
            state=self._held[1],
            load_data=lambda rank: self._bench.round_data(self._parts, task.round_number, rank),
        )
        result = judge.judge(task.receipt, task.drawn, task.answer)
        return dataclasses.replace(result, evidence=dict.fromkeys(result.evidence, b""))  # the parent has the bytes


def _read(pipe: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """Take everything off the pipe at once, so that the parent never waits for us; end the process with the pipe."""
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _serve(pipe: Connection) -> None:
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, tasks), daemon=True).start()
    spec: WorkerSpec = tasks.get()
    child: _Child | None = None
    while True:
        task: _Task = tasks.get()
        started = time.process_time()
        try:
            child = child or _Child(spec)
            reply: CheckResult | str | None = child.judge(task)
        except Exception as exc:  # the boundary of this process: say so, and take the next task
            logger.warning("replay: %s: %s", type(exc).__name__, exc, exc_info=not isinstance(exc, ServiceError))
            reply = f"{type(exc).__name__}: {exc}"
        if task.receipt is not None:
            logger.debug("replay took %.2f CPU seconds", time.process_time() - started)
            pipe.send((task.number, reply))


def main() -> None:
    """Serve the pipe whose descriptor is the only argument, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    os.nice(NICE)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s replay: %(message)s")
    with contextlib.suppress(EOFError, ConnectionError), Connection(int(sys.argv[1])) as pipe:
        _serve(pipe)


if __name__ == "__main__":
    main()


__all__ = ["ReplayProcess", "WorkerSpec"]
