"""`hivetrain up`: a whole network on this machine, from nothing to a falling loss, and a verdict at the end.

Start order: hub, genesis (once), dashboard, neurons, and last, when every neuron is ready, the block producer:
blocks advance only while it runs, so no neuron misses round 0 and a resumed run goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from hivetrain.errors import ServiceError
from hivetrain.supervisor import ChildEvent, ChildState, Supervisor, log_tail
from hivetrain.tracking.events import EventReader
from hivetrain.tracking.status import NeuronStatus, read_statuses
from neurons.plan import DirLock, Plan, UpOptions, child_env, choose_ports, make_plan, prepare_dir
from neurons.report import Genesis, Member, Report, Results, failed_report, make_report, with_scores
from neurons.screen import Narrator, View, event_line, render
from template.leader import MAX_SITTING

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 300.0
REDRAW_S = 0.5
HUB_POLL_S = 1.5
GRACE_S = 60.0
"""After the last epoch: how long weights and state records may still take, or two epochs' time if that is more."""

INTERRUPTED = "interrupted"
INTERRUPTED_EXIT = 130


class Stopped(Exception):
    """The user, or the deadline, asked for the end. The message says which."""


class Network:
    """One network from start to stop.

    Args:
        make: the processes, once the ports are known; injected by tests.
    """

    def __init__(
        self, options: UpOptions, console: Console, *, make: Callable[[UpOptions, dict[str, int]], Plan] = make_plan
    ) -> None:
        self._options = options
        self._console = console
        self._make = make
        self._supervisor = Supervisor(on_event=self._on_child)
        self._started_at = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._stop_reason = ""
        self._stop = asyncio.Event()
        self._stage = "starting"
        self._losses: list[tuple[int, float]] = []
        self._base_epoch: int | None = None
        self._urls: dict[str, str] = {}
        self._events: deque[str] = deque(maxlen=50)
        self._unsaid: list[str] = []
        self._event_log = EventReader(options.dir / "events.jsonl")
        self._needed: set[str] = set()

    def ask_to_stop(self, reason: str) -> None:
        """Stop cleanly; asked a second time, at once."""
        if self._stop.is_set():
            self._supervisor.kill_all()
        self._stop_reason = self._stop_reason or reason
        self._stop.set()

    async def run(self) -> Report | None:
        """Start, watch, judge and stop. None: no `--epochs`, so there is nothing to judge.

        Raises:
            ConfigError: folder, ports or options cannot work.
            ServiceError: something did not start.
            Stopped: asked to stop before the verdict.
        """
        options = self._options
        lock = DirLock(options.dir)
        lock.acquire()
        log_file: logging.Handler | None = None
        try:
            prepare_dir(options.dir, options.fresh)
            log_file = _log_to(options.dir / "logs" / "up.log")
            self._event_log.read_new()  # what an earlier run said is not news
            ports = choose_ports(options.dir, ["hub", "dashboard", *options.neuron_names], options.port_base)
            plan = self._make(options, ports)
            self._urls = dict(plan.urls)
            async with self._supervisor, self._drawn():
                return await self._unless_stopped(self._life(plan))
        finally:
            if log_file is not None:
                logging.getLogger().removeHandler(log_file)
                log_file.close()
            lock.release()

    async def _life(self, plan: Plan) -> Report | None:
        try:
            genesis, results = await self._start(plan)
            return await self._watch(results, genesis)
        finally:
            self._stage = "stopping"
            await self._shut_down(plan)

    async def _start(self, plan: Plan) -> tuple[Genesis, Results]:
        supervisor = self._supervisor
        for spec in plan.services:
            self._stage = f"starting the {spec.name}"
            self._needed.add(spec.name)
            supervisor.start(spec)
            await supervisor.wait_ready(spec.name, READY_TIMEOUT_S)
        if plan.genesis is not None:
            self._stage = "genesis: corpus, tokenizer, wallets, chain, first state"
            started = time.monotonic()
            await supervisor.run_once(plan.genesis)
            self._seconds["genesis"] = time.monotonic() - started
        genesis = plan.read_genesis()
        results = plan.results(genesis)
        epochs = await asyncio.to_thread(results.epochs)
        if not epochs:
            raise ServiceError("the hub holds no epoch: genesis did not finish; start with --fresh")
        self._base_epoch = epochs[-1]
        self._losses = [(self._base_epoch, (await asyncio.to_thread(results.manifest, self._base_epoch)).val_loss)]
        for spec in plan.extras:
            supervisor.start(spec)
        neurons = plan.neurons(genesis)
        started = time.monotonic()
        for spec in neurons:
            supervisor.start(spec)
        self._needed.update(spec.name for spec in neurons)
        for number, spec in enumerate(neurons):
            self._stage = f"neurons are starting: {number}/{len(neurons)} ready"
            await supervisor.wait_ready(spec.name, READY_TIMEOUT_S)
        self._seconds["neurons_ready"] = time.monotonic() - started
        producer = plan.producer(genesis)
        self._needed.add(producer.name)
        supervisor.start(producer)
        self._stage = ""
        return genesis, results

    async def _watch(self, results: Results, genesis: Genesis) -> Report | None:
        options, started = self._options, time.monotonic()
        names = set(options.neuron_names)
        started_ones = [member for member in genesis.wallets if member.name in names]
        complete_at: float | None = None
        grace_s = GRACE_S
        while True:
            await asyncio.sleep(HUB_POLL_S)
            self._raise_if_given_up()
            try:
                await asyncio.to_thread(self._read_losses, results)
                if options.num_epochs is None or len(self._losses) - 1 < options.num_epochs:
                    continue
                if complete_at is None:
                    complete_at = time.monotonic()
                    self._seconds["epochs"] = complete_at - started
                    grace_s = max(GRACE_S, 2 * self._seconds["epochs"] / options.num_epochs)
                report = await asyncio.to_thread(self._judge, results, started_ones)
            except ServiceError as exc:
                if complete_at is not None and time.monotonic() - complete_at > grace_s:
                    raise
                self._say(f"{time.strftime('%H:%M:%S')} up: {exc}")
                continue
            if report.ok or report.settled or time.monotonic() - complete_at > grace_s:
                return report

    def _read_losses(self, results: Results) -> None:
        newest = self._losses[-1][0]
        for epoch in results.epochs():
            if epoch > newest:
                self._losses.append((epoch, results.manifest(epoch).val_loss))

    def _judge(self, results: Results, members: list[Member]) -> Report:
        assert self._base_epoch is not None
        assert self._options.num_epochs is not None
        self._seconds["total"] = time.monotonic() - self._started_at
        validators = [member for member in members if member.role == "validator"]
        return make_report(
            results,
            [member for member in members if member.role == "miner" and member.name != self._options.cheat_name],
            # Of more validators than sit in one all-reduce, some may not have measured anybody yet.
            validators=validators if len(validators) <= MAX_SITTING else (),
            base_epoch=self._base_epoch,
            num_epochs=self._options.num_epochs,
            min_loss_drop=self._options.min_loss_drop,
            seconds=self._seconds,
            attack=self._options.attack,
            cheat=next((member for member in members if member.name == self._options.cheat_name), None),
        )

    def _raise_if_given_up(self) -> None:
        for name, child in self._supervisor.children.items():
            # Without --epochs a person watches: one neuron that cannot run is shown, and the others go on.
            fatal = self._options.num_epochs is not None or name in ("hub", "chain")
            if child.state is ChildState.FAILED and name in self._needed and fatal:
                raise ServiceError(f"{name} does not run any more; see {child.spec.log_path}")

    async def _shut_down(self, plan: Plan) -> None:
        children = list(self._supervisor.children)
        services = [spec.name for spec in plan.services]
        neurons = [name for name in children if name not in ("chain", *services)]
        for wave in (["chain"], neurons, services):  # no block moves on while neurons close; the hub hears them out
            await self._supervisor.stop(wave)

    async def _unless_stopped(self, life: Coroutine[Any, Any, Report | None]) -> Report | None:
        task, stop = asyncio.create_task(life), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, timeout=self._options.deadline_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if not stop.done():
                self.ask_to_stop(f"not done after {self._options.deadline_s:.0f} s (--timeout)")
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise Stopped(self._stop_reason)
        finally:
            stop.cancel()

    @contextlib.asynccontextmanager
    async def _drawn(self) -> AsyncIterator[None]:
        done = asyncio.Event()
        drawing = asyncio.create_task(self._draw_on_terminal(done) if self._console.is_terminal else self._tell(done))
        try:
            yield
        finally:
            done.set()
            await drawing

    async def _draw_on_terminal(self, done: asyncio.Event) -> None:
        with Live(render(self.view()), console=self._console, auto_refresh=False) as live:
            while not done.is_set():
                await _wait(done, REDRAW_S)
                self._events.extend(event_line(event) for event in self._event_log.read_new())
                live.update(render(self.view()), refresh=True)

    async def _tell(self, done: asyncio.Event) -> None:
        narrator = Narrator()
        urls = "   ".join(f"{name} {url}" for name, url in self._urls.items())
        self._print(f"{self._options.dir}: {urls}" if urls else str(self._options.dir))
        while True:
            finished = done.is_set()
            unsaid, self._unsaid = self._unsaid, []
            unsaid.extend(event_line(event) for event in self._event_log.read_new())
            for line in narrator.lines(self.view(), unsaid):
                self._print(line)
            if finished:
                return
            await _wait(done, REDRAW_S)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def view(self) -> View:
        """What there is to show now."""
        now, stage = time.time(), self._stage
        children = self._supervisor.children
        if stage.startswith("genesis") and (tail := log_tail(self._options.dir / "logs" / "genesis.log", 1)):
            stage = f"genesis: {tail[0].removeprefix('--- ').removeprefix('genesis: ')}"
        by_name = {row.name: row for row in with_scores(self._options.dir, read_statuses(self._options.dir / "status"))}
        rows = []
        for name in self._options.neuron_names:
            child = children.get(name)
            if child is None:
                continue
            unknown = NeuronStatus(name=name, role=name.split("-")[0], pid=child.pid, updated_at=now)
            row = by_name.get(name, unknown)
            if child.state is ChildState.BACKOFF:
                row = replace(row, state="restarting")
            elif child.state is ChildState.FAILED:
                row = replace(row, state="failed", detail=f"see {child.spec.log_path}")
            rows.append(row)
        goal = None
        if self._options.num_epochs is not None and self._losses:
            goal = (len(self._losses) - 1, self._options.num_epochs)
        return View(
            title=f"hivetrain · {self._options.dir}",
            stage=stage,
            rows=rows,
            losses=list(self._losses),
            goal=goal,
            events=list(self._events),
            urls=self._urls,
            footer="Ctrl-C stops · state is kept",
            now=now,
        )

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(epoch, held-out loss): the epoch we started from and those published since."""
        return list(self._losses)

    @property
    def seconds(self) -> dict[str, float]:
        """What took how long."""
        return {**self._seconds, "total": time.monotonic() - self._started_at}

    def _on_child(self, event: ChildEvent) -> None:
        if event.is_problem:
            self._say(f"{time.strftime('%H:%M:%S')} {event.name} {event.text}")

    def _say(self, line: str) -> None:
        self._events.append(line.splitlines()[0])
        self._unsaid.append(line)


def _log_to(path: Path) -> logging.Handler:
    """Send our own warnings to a file: lines on the terminal would tear the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


def run_up(
    options: UpOptions,
    *,
    console: Console | None = None,
    make: Callable[[UpOptions, dict[str, int]], Plan] = make_plan,
) -> int:
    """Run a network until it is done or told to stop; the exit status.

    0: every epoch asked for holds (or, without ``--epochs``, it was stopped); 1: something did not hold, and the
    last lines say what; 130: interrupted before the verdict.

    Raises:
        ConfigError: folder, ports or options cannot work.
    """
    os.environ.update(child_env(options))
    console = console or Console()
    return asyncio.run(_run_up(options, console, make))


async def _run_up(options: UpOptions, console: Console, make: Callable[[UpOptions, dict[str, int]], Plan]) -> int:
    network = Network(options, console, make=make)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, network.ask_to_stop, INTERRUPTED)
    status = 1
    try:
        report = await network.run()
    except Stopped as exc:
        if options.num_epochs is None:
            _write(console, f"{_story(network)} · stopped, state kept in {options.dir}")
            return 0
        report = failed_report(str(exc), network.seconds)
        status = INTERRUPTED_EXIT if str(exc) == INTERRUPTED else 1
    except ServiceError as exc:
        report = failed_report(str(exc), network.seconds)
    assert report is not None
    if options.json_path is not None:
        options.json_path.write_text(report.to_json(), encoding="utf-8")
    for reason in report.failed:
        _write(console, f"failed: {reason}")
    summary = report.summary(options.num_epochs) if options.num_epochs and report.epochs else _story(network)
    _write(console, summary)
    return 0 if report.ok else status


def _story(network: Network) -> str:
    losses = network.losses
    if len(losses) < 2:
        return "no epoch published"
    published = "1 epoch" if len(losses) == 2 else f"{len(losses) - 1} epochs"
    return f"{published} published · val loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}"


def _write(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
