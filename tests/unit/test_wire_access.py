"""Access: who may call, how often, and who goes first."""

from __future__ import annotations

import asyncio

import pytest

from template.access import AccessPolicy, Busy, NeuronFacts, PriorityGate, RateLimiter
from template.protocol import AllReduce, IsAlive, Train

METAGRAPH = {
    "validator": NeuronFacts(uid=0, stake=50.0, validator_permit=True),
    "poor": NeuronFacts(uid=1, stake=1.0, validator_permit=True),
    "miner": NeuronFacts(uid=2, stake=80.0, validator_permit=False),
}


def policy(**changes) -> AccessPolicy:
    return AccessPolicy(registry=METAGRAPH.get, **changes)


@pytest.mark.parametrize(
    ("changes", "hotkey", "route", "allowed", "says"),
    [
        ({}, "validator", Train.route, True, ""),
        ({}, "validator", AllReduce.route, True, ""),
        ({}, "miner", IsAlive.route, True, ""),
        ({}, "miner", Train.route, False, "validator permit"),
        ({}, "miner", AllReduce.route, False, "validator permit"),
        ({}, "stranger", IsAlive.route, False, "not registered"),
        ({}, "stranger", Train.route, False, "not registered"),
        ({"min_stake": 10.0}, "poor", Train.route, False, "at least 10 TAO, got 1"),
        ({"min_stake": 10.0}, "poor", IsAlive.route, True, ""),
        ({"min_stake": 50.0}, "validator", Train.route, True, ""),
        ({"force_validator_permit": False}, "miner", Train.route, True, ""),
        ({"allow_non_registered": True}, "stranger", IsAlive.route, True, ""),
        ({"allow_non_registered": True}, "stranger", Train.route, False, "validator permit"),
        (
            {"allow_non_registered": True, "force_validator_permit": False, "min_stake": 1.0},
            "stranger",
            Train.route,
            False,
            "got 0",
        ),
        ({"denied": frozenset({"validator"})}, "validator", IsAlive.route, False, "denied"),
    ],
)
def test_access_follows_the_rules(changes, hotkey, route, allowed, says) -> None:
    decision = policy(**changes).check(hotkey, route)
    assert decision.allowed is allowed
    assert says in decision.reason
    assert decision.status == (200 if allowed else 403)


def test_priority_is_the_stake_and_zero_for_a_stranger() -> None:
    assert [policy().priority(hotkey) for hotkey in ("miner", "validator", "stranger")] == [80.0, 50.0, 0.0]


def test_a_negative_or_undefined_minimum_stake_is_refused() -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="min_stake"):
            policy(min_stake=wrong)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock, **changes) -> RateLimiter:
    return RateLimiter(**({"rate_per_s": 1.0, "burst": 2, "max_in_flight": 2} | changes), clock=clock)


def test_a_burst_is_spent_and_refilled_with_time() -> None:
    clock = Clock()
    limits = limiter(clock)
    for _ in range(2):
        with limits.admit("a"):
            pass
    with pytest.raises(Busy, match="per second"), limits.admit("a"):
        pass
    with limits.admit("b"):  # another key has its own
        pass
    clock.now += 1.0
    with limits.admit("a"):
        pass
    with pytest.raises(Busy), limits.admit("a"):
        pass


def test_places_in_flight_are_given_back_even_after_an_error() -> None:
    limits = limiter(Clock(), burst=10)
    with limits.admit("a"), limits.admit("a"), pytest.raises(Busy, match="in flight"), limits.admit("a"):
        pass
    with pytest.raises(KeyError), limits.admit("a"):
        raise KeyError
    with limits.admit("a"), limits.admit("a"):
        pass


def test_the_memory_of_a_limiter_is_bounded_and_forgets_the_idle_first() -> None:
    limits = limiter(Clock(), max_keys=3)
    with limits.admit("busy"):
        for key in range(100):
            with limits.admit(f"stranger {key}"):
                pass
        assert len(limits._usage) == 3
        assert "busy" in limits._usage


def test_a_limiter_full_of_callers_in_flight_turns_the_next_away() -> None:
    limits = limiter(Clock(), max_keys=1)
    with limits.admit("a"), pytest.raises(Busy, match="callers"), limits.admit("b"):
        pass


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run_gate(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_the_gate_serves_waiting_callers_by_priority_then_by_arrival() -> None:
    order: list[str] = []

    async def scenario() -> None:
        gate = PriorityGate(max_inside=1, max_waiting=10)

        async def enter(name: str, priority: float) -> None:
            async with gate.admit(priority, 5):
                order.append(name)

        async with gate.admit(0, 5):
            tasks = []
            for name, priority in (("low", 1.0), ("high", 9.0), ("middle", 5.0), ("high too", 9.0)):
                tasks.append(asyncio.create_task(enter(name, priority)))
                await settle()
            assert order == []
        await asyncio.gather(*tasks)
        assert gate._inside == 0

    run_gate(scenario)
    assert order == ["high", "high too", "middle", "low"]


def test_a_full_queue_turns_away_the_lowest_be_it_the_newcomer() -> None:
    async def scenario() -> None:
        gate = PriorityGate(max_inside=1, max_waiting=1)

        async def enter(priority: float) -> float:
            async with gate.admit(priority, 5):
                return priority

        async with gate.admit(0, 5):
            poor = asyncio.create_task(enter(1.0))
            await settle()
            rich = asyncio.create_task(enter(2.0))
            await settle()
            poorest = asyncio.create_task(enter(0.5))
            await settle()
            assert poor.done()
            assert poorest.done()
        assert await rich == 2.0
        for task in (poor, poorest):
            with pytest.raises(Busy, match="higher stake"):
                await task

    run_gate(scenario)


def test_a_place_survives_callers_that_give_up_while_they_wait() -> None:
    async def scenario() -> None:
        gate = PriorityGate(max_inside=1, max_waiting=10)

        async def enter(priority: float) -> None:
            async with gate.admit(priority, 5):
                pass

        async with gate.admit(0, 5):
            with pytest.raises(Busy, match="no place within"):
                async with gate.admit(9.0, 0.01):
                    pass
            quits = asyncio.create_task(enter(9.0))
            waits = asyncio.create_task(enter(1.0))
            await settle()
        # The place has just been handed to `quits`, which is cancelled before it runs.
        quits.cancel()
        await waits
        with pytest.raises(asyncio.CancelledError):
            await quits
        assert (gate._inside, gate._waiting) == (0, [])
        await enter(0.0)

    run_gate(scenario)
