"""The supervisor with real processes: what dies, what is started again, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hivetrain.errors import ConfigError, ServiceError
from hivetrain.supervisor import Backoff, Child, ChildEvent, ChildState, ProcessSpec, Supervisor, log_tail

FAST = Backoff(first_s=0.01, max_s=0.02, max_failures=3)
SLEEP = "import time; time.sleep(600)"
FAMILY = (  # a child that starts a grandchild, as a neuron does with p2pd, and says both pids
    "import os, subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(os.getpid(), p.pid, flush=True); time.sleep(600)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"


def spec(
    tmp_path: Path, code: str, *, name: str = "child", restart: bool = True, stop_timeout_s: float = 10.0
) -> ProcessSpec:
    argv = [sys.executable, "-S", "-c", code]
    log_path = tmp_path / f"{name}.log"
    return ProcessSpec(name=name, argv=argv, log_path=log_path, restart=restart, stop_timeout_s=stop_timeout_s)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(path: Path) -> list[int]:
    """The pids that the newest FAMILY process wrote, once it has."""
    lines = [line for line in log_tail(path) if not line.startswith("---")]
    return [int(pid) for pid in lines[-1].split()] if lines else []


def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    async def scenario() -> tuple[Child, list[ChildEvent]]:
        events: list[ChildEvent] = []
        async with Supervisor(backoff=FAST, on_event=events.append) as supervisor:
            child = supervisor.start(spec(tmp_path, SLEEP))
            first = child.pid
            os.kill(first, signal.SIGKILL)
            await until(lambda: child.num_restarts == 1 and child.state is ChildState.RUNNING, "restarted")
            assert child.pid != first
            assert is_alive(child.pid)
        return child, events

    child, events = asyncio.run(scenario())
    assert child.state is ChildState.STOPPED
    assert not is_alive(child.pid)
    assert [event.is_problem for event in events] == [False, True, False]
    assert "SIGKILL" in events[1].text


def test_a_child_that_keeps_dying_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    async def scenario() -> tuple[Child, list[ChildEvent]]:
        events: list[ChildEvent] = []
        async with Supervisor(backoff=FAST, on_event=events.append) as supervisor:
            child = supervisor.start(spec(tmp_path, "print('no disk left'); raise SystemExit(3)"))
            await until(lambda: child.state is ChildState.FAILED, "given up")
        return child, events

    child, events = asyncio.run(scenario())
    assert child.num_restarts == FAST.max_failures - 1
    assert child.state is ChildState.FAILED
    assert "status 3, 3 times in a row" in events[-1].text
    assert "no disk left" in events[-1].text


def test_a_healthy_spell_forgives_earlier_deaths(tmp_path: Path) -> None:
    backoff = Backoff(first_s=0.01, max_s=0.01, max_failures=2, healthy_s=0.0)

    async def scenario() -> None:
        async with Supervisor(backoff=backoff) as supervisor:
            child = supervisor.start(spec(tmp_path, "raise SystemExit(3)"))
            await until(lambda: child.num_restarts >= 4, "restarted more often than max_failures")

    asyncio.run(scenario())


def test_settings_that_cannot_work_are_not_tried_again(tmp_path: Path) -> None:
    async def scenario() -> Child:
        async with Supervisor(backoff=FAST) as supervisor:
            child = supervisor.start(spec(tmp_path, "raise SystemExit(2)"))
            await until(lambda: child.state is ChildState.FAILED, "given up")
        return child

    assert asyncio.run(scenario()).num_restarts == 0


def test_a_child_that_ignores_sigterm_is_killed_after_its_timeout(tmp_path: Path) -> None:
    async def scenario() -> Child:
        async with Supervisor(backoff=FAST) as supervisor:
            child = supervisor.start(spec(tmp_path, DEAF, stop_timeout_s=0.2))
            await until(lambda: "deaf" in log_tail(tmp_path / "child.log"), "deaf")
            await supervisor.stop(["child"])
            return child

    child = asyncio.run(scenario())
    assert child.exit_code == -signal.SIGKILL
    assert child.state is ChildState.STOPPED


def test_stopping_takes_the_grandchildren_along(tmp_path: Path) -> None:
    async def scenario() -> list[int]:
        async with Supervisor(backoff=FAST) as supervisor:
            supervisor.start(spec(tmp_path, FAMILY))
            await until(lambda: len(family(tmp_path / "child.log")) == 2, "two pids")
            return family(tmp_path / "child.log")

    pids = asyncio.run(scenario())
    assert len(pids) == 2
    # A killed process may be dying for a moment yet.
    asyncio.run(until(lambda: not any(is_alive(pid) for pid in pids), "the grandchild's end"))


def test_a_killed_child_leaves_no_grandchild_beside_its_successor(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Supervisor(backoff=FAST) as supervisor:
            supervisor.start(spec(tmp_path, FAMILY))
            await until(lambda: len(family(tmp_path / "child.log")) == 2, "two pids")
            old = family(tmp_path / "child.log")
            os.kill(old[0], signal.SIGKILL)
            await until(lambda: family(tmp_path / "child.log") not in (old, []), "a successor")
            await until(lambda: not any(is_alive(pid) for pid in old), "the old family's end")

    asyncio.run(scenario())


@pytest.mark.parametrize("also_kill_guardian", [False, True])
def test_kill_9_of_the_parent_leaves_no_orphan(tmp_path: Path, also_kill_guardian: bool) -> None:
    code = f"""
        import asyncio, sys
        from pathlib import Path
        from hivetrain.supervisor import ProcessSpec, Supervisor

        async def main():
            async with Supervisor() as supervisor:
                for name in ("a", "b"):
                    argv = [sys.executable, "-S", "-c", {FAMILY!r}]
                    log_path = Path({str(tmp_path)!r}) / f"{{name}}.log"
                    supervisor.start(ProcessSpec(name=name, argv=argv, log_path=log_path))
                print(supervisor._guardian.pid, flush=True)
                await asyncio.sleep(600)

        asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        guardian = int(parent.stdout.readline())
        logs = [tmp_path / "a.log", tmp_path / "b.log"]
        asyncio.run(until(lambda: all(len(family(log)) == 2 for log in logs), "four pids"))
        pids = [pid for log in logs for pid in family(log)]
        assert all(is_alive(pid) for pid in pids)
        if also_kill_guardian:
            os.kill(guardian, signal.SIGKILL)
            asyncio.run(until(lambda: not is_alive(guardian), "the guardian's end"))
            expected_dead = [family(log)[0] for log in logs]  # the kernel covers children only
        else:
            expected_dead = [*pids, guardian]
        parent.kill()
        parent.wait()
        asyncio.run(until(lambda: not any(is_alive(pid) for pid in expected_dead), "no orphan"))
    finally:
        parent.kill()
        parent.wait()
        if parent.stdout is not None:
            parent.stdout.close()
        for log in (tmp_path / "a.log", tmp_path / "b.log"):
            for pid in family(log):
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)


def test_run_once_returns_at_the_end_and_raises_with_the_log_on_failure(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Supervisor() as supervisor:
            await supervisor.run_once(spec(tmp_path, "print('done')", name="good", restart=False))
            with pytest.raises(ServiceError, match=r"bad failed with status 7(.|\n)*corpus is empty"):
                await supervisor.run_once(
                    spec(tmp_path, "print('corpus is empty'); raise SystemExit(7)", name="bad", restart=False)
                )

    asyncio.run(scenario())
    assert log_tail(tmp_path / "good.log")[-1] == "done"


def test_waiting_for_a_child_that_cannot_start_says_why(tmp_path: Path) -> None:
    argv = [str(tmp_path / "no-such-program")]
    missing = ProcessSpec(name="x", argv=argv, log_path=tmp_path / "x.log", ready=lambda: False)

    async def scenario() -> None:
        async with Supervisor(backoff=FAST) as supervisor:
            supervisor.start(missing)
            with pytest.raises(ServiceError, match=r"ended before it was ready(.|\n)*no-such-program: No such file"):
                await supervisor.wait_ready("x", 20.0)

    asyncio.run(scenario())


def test_waiting_ends_when_the_child_serves_and_fails_when_it_never_does(tmp_path: Path) -> None:
    flag = tmp_path / "serving"
    base = spec(tmp_path, f"open({str(flag)!r}, 'w').close(); {SLEEP}")

    async def scenario() -> None:
        async with Supervisor() as supervisor:
            argv, log_path = base.argv, base.log_path
            supervisor.start(ProcessSpec(name="good", argv=argv, log_path=log_path, ready=flag.exists))
            await supervisor.wait_ready("good", 20.0)
            supervisor.start(ProcessSpec(name="never", argv=argv, log_path=log_path, ready=lambda: False))
            with pytest.raises(ServiceError, match="never was not ready within 0 s"):
                await supervisor.wait_ready("never", 0.2)

    asyncio.run(scenario())


def test_a_log_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = ProcessSpec(name="x", argv=["true"], log_path=tmp_path / "file" / "x.log")

    async def scenario() -> None:
        async with Supervisor() as supervisor:
            with pytest.raises(ConfigError, match="cannot start x"):
                supervisor.start(bad)

    asyncio.run(scenario())


def test_an_oversized_log_is_set_aside_at_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    with log.open("wb") as file:
        file.truncate(17 << 20)

    async def scenario() -> None:
        async with Supervisor() as supervisor:
            await supervisor.run_once(spec(tmp_path, "print('new')", restart=False))

    asyncio.run(scenario())
    assert log.stat().st_size < 1000
    assert (tmp_path / "child.log.1").stat().st_size == 17 << 20
