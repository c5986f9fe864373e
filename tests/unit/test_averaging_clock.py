from __future__ import annotations

import asyncio
import dataclasses

import pytest

from hivetrain.averaging.clock import Clock, Signal
from hivetrain.averaging.group import GroupPlan, Member
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.averaging.memory import VirtualTimeLoop, run_in_virtual_time

PLAN = GroupPlan(
    run_id="r",
    round=1,
    attempt=0,
    members=(Member(hotkey="h", peer_id="p", maddrs=(), weight=1.0, reduces=True, root=bytes(32)),),
    layout=PayloadLayout([Section(name="v", num_elements=1, codec="fp32")]),
    send_deadline_s=20.0,
    deadline_s=40.0,
    max_abs=10.0,
)


def test_times_of_the_plan() -> None:
    async def main() -> None:
        await asyncio.sleep(3.0)
        clock = Clock(PLAN)
        clock.begin()
        times = (clock.send_deadline, clock.fetch_at, clock.fetch_close, clock.confirm_close, clock.deadline)
        assert [time - 3.0 for time in times] == pytest.approx([20.0, 30.0, 36.0, 38.0, 40.0])
        clock.stop()

    run_in_virtual_time(main())
    assert PLAN.patience_s == 5.0
    assert dataclasses.replace(PLAN, stall_s=7.0).patience_s == 7.0


def test_patience_ends_when_it_was_not_fed() -> None:
    async def main() -> float:
        clock = Clock(PLAN)
        clock.begin()

        async def wait() -> None:
            async with clock.patience(5.0, 100.0) as patience:
                await asyncio.sleep(4.0)
                patience.feed()
                await asyncio.sleep(4.0)
                patience.hold()
                await asyncio.sleep(30.0)
                patience.feed()
                await asyncio.sleep(6.0)

        with pytest.raises(TimeoutError):
            await wait()
        clock.stop()
        return clock.now()

    assert run_in_virtual_time(main()) == pytest.approx(43.0)


def test_patience_ends_at_its_limit_however_well_fed() -> None:
    async def main() -> float:
        clock = Clock(PLAN)
        clock.begin()

        async def wait() -> None:
            async with clock.patience(5.0, 10.0) as patience:
                while True:
                    await asyncio.sleep(1.0)
                    patience.feed()

        with pytest.raises(TimeoutError):
            await wait()
        clock.stop()
        return clock.now()

    assert run_in_virtual_time(main()) == pytest.approx(10.0)


def test_time_in_which_we_stood_still_is_nobodys_fault() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        clock = Clock(PLAN)
        clock.begin()
        async with clock.patience(5.0, 1000.0):
            await asyncio.sleep(2.0)
            loop.advance(60.0)
            await asyncio.sleep(2.0)  # it sees a standstill from its last tick on
        assert clock.stalled_s == pytest.approx(60.0, abs=1.0)
        assert clock.awake() == pytest.approx(4.0, abs=1.0)
        clock.stop()

    run_in_virtual_time(main())


def test_signal_wakes_who_waits_and_nobody_later() -> None:
    async def main() -> None:
        signal, woken = Signal(), []

        async def wait(name: str) -> None:
            await signal.wait()
            woken.append(name)

        tasks = [asyncio.create_task(wait(name)) for name in "ab"]
        await asyncio.sleep(0)
        signal.notify()
        await asyncio.gather(*tasks)
        assert woken == ["a", "b"]
        before = asyncio.get_running_loop().time()
        await signal.wait(before + 2.0)
        assert asyncio.get_running_loop().time() == before + 2.0

    run_in_virtual_time(main())
