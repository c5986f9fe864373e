"""Rounds of honest miners in memory, and what one cheat among them would do: facts, before any draw.

What a check of each window finds does not depend on which windows are drawn, so it is found once, for all of them; the
lottery of challenges (`bench.attacks.pay`) is then played over these facts as often as one likes. Contributions,
receipts, challenges, replays, plans, the all-reduce (in virtual time) and what is published are production code.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from bench.attacks.cheat import Cheat, Scene
from bench.attacks.checking import Checks, every_check
from bench.attacks.group import exchange, peer_of, plan_group, publish
from bench.attacks.world import VALIDATOR, World
from bench.inmemory import Key, verify
from hivetrain.averaging.butterfly import AllReduceOutcome
from hivetrain.averaging.group import GroupPlan
from hivetrain.contribution import Contribution
from hivetrain.errors import PeerFault
from hivetrain.manifest import Ref
from hivetrain.scoring import CheckResult
from hivetrain.training.inner import Batches, RoundWork
from hivetrain.training.state import State
from hivetrain.verification.receipt import Receipt, check_receipt, parse_receipt
from template.validator.records import proven_averages


def honest_keys(num_miners: int) -> tuple[Key, ...]:
    """Keys of honest miners, all of whose hotkeys sort behind the cheat's: where order decides, it is for the cheat."""
    keys = (Key(seed) for seed in itertools.count(100))
    return tuple(itertools.islice((key for key in keys if key.hotkey > CHEATER.hotkey), num_miners))


CHEATER = min((Key(seed) for seed in range(50, 80)), key=lambda key: key.hotkey)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HonestRound:
    """One round of the honest miners, who alone make the next state."""

    number: int
    base: Ref
    state: State
    previous: State | None
    keys: tuple[Key, ...]
    works: tuple[RoundWork, ...]
    contributions: tuple[Contribution, ...]
    checks: tuple[Checks, ...]
    seen: tuple[GroupPlan, AllReduceOutcome]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheatRound:
    """What a cheat did in a round, and what the validator would see of it.

    Attributes:
        work_done: of an honest miner's tokens.
        receipt: None where it is refused.
        refused: why.
        checks: per window.
        seen: the all-reduce with the cheat in it; None where it hands in no receipt.
        proven: what that one proves to anybody.
    """

    key: Key
    work_done: float
    receipt: Receipt | None
    refused: str
    checks: Checks
    seen: tuple[GroupPlan, AllReduceOutcome] | None
    proven: Mapping[str, CheckResult] = field(default_factory=dict)


class CountedRun:
    """`InnerLoop.run` that remembers how many tokens it took."""

    def __init__(self, world: World) -> None:
        self._loop = world.parts.loop
        self.tokens = 0

    def __call__(self, state: State, batches: Batches, *, num_steps: int, first_step: int = 0) -> RoundWork:
        work = self._loop.run(state, batches, num_steps=num_steps, first_step=first_step)
        self.tokens += work.num_tokens
        return work


def honest_rounds(world: World, num_miners: int, num_rounds: int) -> list[HonestRound]:
    """A run of honest miners, checked window by window."""
    keys = honest_keys(num_miners)
    rounds: list[HonestRound] = []
    base, state, previous = world.genesis, world.state, None
    for number in range(num_rounds):
        works = tuple(_honest_work(world, state, number, rank) for rank in range(num_miners))
        members = {
            key: make_scene(world, base, state, previous, number, rank, key, works[0]).contribution(work)
            for rank, (key, work) in enumerate(zip(keys, works, strict=True))
        }
        receipts = {key.hotkey: one.receipt for key, one in members.items()}
        checks = tuple(
            every_check(world, base, state, number, one, lambda _request, reply: reply) for one in members.values()
        )
        plan = plan_group(world, number, receipts)
        outcomes = exchange(plan, {key: one.payload for key, one in members.items()})
        rounds.append(
            HonestRound(
                number=number,
                base=base,
                state=state,
                previous=previous,
                keys=keys,
                works=works,
                contributions=tuple(members.values()),
                checks=checks,
                seen=(plan, outcomes[VALIDATOR.hotkey]),
            )
        )
        previous = state
        base, state = publish(world, base, state, plan, outcomes[VALIDATOR.hotkey], keys, receipts)
    return rounds


def _honest_work(world: World, state: State, number: int, rank: int) -> RoundWork:
    data = world.load_data(number, rank)
    return world.parts.loop.run(state, data.batch, num_steps=data.num_steps(world.parts.recipe.inner.max_steps))


def make_scene(
    world: World,
    base: Ref,
    state: State,
    previous: State | None,
    number: int,
    rank: int,
    key: Key,
    stolen: RoundWork | None,
) -> Scene:
    """A round as the miner of that rank sees it."""
    data = world.load_data(number, rank)

    def leaked() -> RoundWork:
        if stolen is None:
            raise ValueError("nobody's work has leaked here")
        return stolen

    return Scene(
        parts=world.parts,
        base=base,
        state=state,
        previous=previous,
        data=data,
        round_number=number,
        rank=rank,
        num_steps=data.num_steps(world.parts.recipe.inner.max_steps),
        identity=key,
        remainder=None,
        run=CountedRun(world),
        load_data=lambda other: world.load_data(number, other),
        victim=0,
        stolen=leaked,
    )


def cheat_round(world: World, cheat: Cheat, honest: HonestRound) -> CheatRound:
    """One round of ``cheat`` beside the honest miners of that round."""
    rank, key = len(honest.keys), CHEATER
    scene = make_scene(world, honest.base, honest.state, honest.previous, honest.number, rank, key, honest.works[0])
    work = cheat.train(scene)
    contribution = cheat.commit(scene, work)
    counted = cast("CountedRun", scene.run)
    full = scene.num_steps * world.parts.recipe.data.batch_size * world.parts.recipe.data.seq_len
    done = counted.tokens / full
    raw = cheat.receipt(0, contribution.receipt.to_bytes())
    try:
        receipt = parse_receipt(raw, hotkey=key.hotkey, verify=verify)
        check_receipt(receipt, world.expected(honest.base, honest.number, rank, key.hotkey))
    except PeerFault as fault:
        return CheatRound(key=key, work_done=done, receipt=None, refused=str(fault), checks=(), seen=None)
    checks = every_check(world, honest.base, honest.state, honest.number, contribution, cheat.answer)
    receipts = {one.receipt.hotkey: one.receipt for one in honest.contributions} | {key.hotkey: receipt}
    mine = cheat.peer_id(peer_of(key.hotkey), [peer_of(one.hotkey) for one in honest.keys])
    plan = plan_group(world, honest.number, receipts, {key.hotkey: mine})
    payloads = {one: made.payload for one, made in zip(honest.keys, honest.contributions, strict=True)}
    payloads[key] = cheat.bring(contribution)
    seen = plan, exchange(plan, payloads, cheat=cheat, cheater=key)[VALIDATOR.hotkey]
    return CheatRound(
        key=key,
        work_done=done,
        receipt=receipt,
        refused="",
        checks=checks,
        seen=seen,
        proven=proven_averages([seen], verify),
    )
