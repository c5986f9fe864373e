"""Rounds of honest miners in memory, and what one cheat among them would do: facts, before any draw.

What a check of each window finds does not depend on which windows are drawn, so it is found once, for all of them; the
lottery of challenges (`bench.attacks.pay`) is then played over these facts as often as one likes. Contributions,
receipts, challenges, replays, plans, the all-reduce (in virtual time) and what is published are production code.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from bench.attacks.cheat import Cheat, Scene
from bench.attacks.world import VALIDATOR, World
from bench.inmemory import Key, verify
from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.memory import MemoryHub, run_in_virtual_time
from hivetrain.contribution import Contribution
from hivetrain.errors import HivetrainError, PeerFault
from hivetrain.manifest import Ref, state_message
from hivetrain.scoring import CheckResult
from hivetrain.training.inner import Batches, RoundWork
from hivetrain.training.outer import outer_step
from hivetrain.training.state import State, state_hash
from hivetrain.verification.receipt import Receipt, check_receipt, parse_receipt
from hivetrain.workbench import DELTA, EXP_AVG, EXP_AVG_SQ
from template.anchor import Anchor
from template.axon import Caller
from template.board import Board
from template.dendrite import Dendrite, Failure, PeerAddress, Reply
from template.handlers import Handlers
from template.network import NetworkThread
from template.participant import Participation
from template.protocol import Train, TrainReply
from template.validator.lead import Led, make_plan
from template.validator.publish import check_gates, publish_epoch
from template.validator.records import proven_averages
from template.validator.verify import Draw, Verifier

DURATION_S = 60.0  # of virtual time, for an all-reduce
COINS = b"\x07" * 32
LINK_BYTES_PER_S = 5_000_000  # where rates are measured: a line that earns the full score
MAX_REPLY_BYTES = 64 << 20

Checks = tuple[CheckResult, ...]
"""What a check finds where window 0, 1, ... of a round is drawn."""


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


# -- VERIFY ---------------------------------------------------------------------------------------------------

Answer = Callable[[Train, TrainReply], "TrainReply | None"]


def every_check(
    world: World, base: Ref, state: State, number: int, contribution: Contribution, answer: Answer
) -> Checks:
    """What the check of each window finds, if that one is drawn."""
    receipt = contribution.receipt
    draws = [Draw(hotkey=receipt.hotkey, windows=(window,)) for window in range(receipt.num_snapshots)]
    return tuple(judge(world, base, state, number, contribution, draw, answer) for draw in draws)


def judge(
    world: World, base: Ref, state: State, number: int, contribution: Contribution, drawn: Draw, answer: Answer
) -> CheckResult:
    """Challenge a miner through its real handlers, and check what it answers."""
    reply = challenge(world, base, contribution, drawn, answer)
    return check(world, base, state, number, contribution.receipt, drawn, reply)


def challenge(world: World, base: Ref, contribution: Contribution, drawn: Draw, answer: Answer) -> Reply[TrainReply]:
    """What comes over the wire when a miner is asked to open what is drawn."""
    receipt = contribution.receipt
    request = Train(
        run_id=receipt.run_id,
        round=receipt.round,
        want="open",
        snapshots=drawn.snapshots(receipt.num_snapshots),
        coins=COINS,
    )
    answered = answer(request, honest_answer(world, base, contribution, request))
    if answered is None:
        return Reply(hotkey=receipt.hotkey, failure=Failure.TIMEOUT, detail="no whole reply in time")
    return Reply(hotkey=receipt.hotkey, reply=TrainReply.from_bytes(answered.to_bytes(), MAX_REPLY_BYTES))


def check(
    world: World, base: Ref, state: State, number: int, receipt: Receipt, drawn: Draw, reply: Reply[TrainReply]
) -> CheckResult:
    """The validator's check of one answer, as `Verifier.check` does it."""
    verifier = Verifier(
        parts=world.parts,
        base=base,
        state=state,
        round_number=number,
        coins=COINS,
        dendrite=cast("Dendrite", None),  # no sockets: the answer is at hand
        network=cast("NetworkThread", None),
        load_data=lambda rank: world.load_data(number, rank),
        address=lambda hotkey: PeerAddress(hotkey=hotkey, ip="127.0.0.1", port=1),
        in_time=lambda: True,
    )
    try:
        return verifier.check_one(receipt, drawn, reply)
    except PeerFault as fault:
        return CheckResult(fault=fault.fault, detail=fault.detail)


def honest_answer(world: World, base: Ref, contribution: Contribution, request: Train) -> TrainReply:
    """What the real handlers answer."""
    board = Board()
    board.begin_round(request.round, base.epoch, base.manifest_sha256)
    board.commit(contribution)
    handlers = Handlers(
        role="miner",
        run_id=world.parts.run_id,
        identity=VALIDATOR,
        board=board,
        layout=world.parts.layout,
        averaging=world.parts.recipe.averaging,
        why_not_leader=lambda *_: None,
    )
    caller = Caller(hotkey=VALIDATOR.hotkey, host="127.0.0.1", uid=0, stake=1.0, validator_permit=True)

    async def converse() -> TrainReply:
        digest = hashlib.sha256(request.coins).digest()
        await handlers.train(request.model_copy(update={"want": "receipt", "coins": digest, "snapshots": ()}), caller)
        return await handlers.train(request, caller)

    return asyncio.run(converse())


# -- ALL_REDUCE and PUBLISH -----------------------------------------------------------------------------------


def peer_of(hotkey: str) -> str:
    """The libp2p peer of a hotkey."""
    return f"peer-{hotkey[:16]}"


def plan_group(
    world: World, number: int, receipts: Mapping[str, Receipt], peers: Mapping[str, str] | None = None
) -> GroupPlan:
    """The leader's plan, every receipt weighed by its samples."""
    peers = peers or {}
    anchors = {
        hotkey: Anchor(peer_id=peers.get(hotkey, peer_of(hotkey)), maddrs=("/ip4/127.0.0.1/tcp/1",))
        for hotkey in (*receipts, VALIDATOR.hotkey)
    }
    plan = make_plan(
        parts=world.parts,
        round_number=number,
        attempt=0,
        receipts=receipts,
        weights={hotkey: float(receipt.num_samples) for hotkey, receipt in receipts.items()},
        sitting=(VALIDATOR.hotkey,),
        anchors=anchors,
        duration_s=DURATION_S,
        owners={peer_of(hotkey): hotkey for hotkey in receipts},
    )
    assert plan is not None
    return plan


ACTING: contextvars.ContextVar[bool] = contextvars.ContextVar("ACTING", default=False)
"""Whether the code that runs is the cheat's: all members share one process here."""


@contextlib.contextmanager
def patched(cheat: Cheat) -> Iterator[None]:
    """The cheat's patches, in effect where `ACTING` says that it runs."""
    with contextlib.ExitStack() as undo:
        for patch in cheat.patches():
            real = getattr(patch.module, patch.name)

            def either(*args: Any, _real: Any = real, _bad: Any = patch.bad, **kwargs: Any) -> Any:
                return _bad(_real, *args, **kwargs) if ACTING.get() else _real(*args, **kwargs)

            setattr(patch.module, patch.name, either)
            undo.callback(setattr, patch.module, patch.name, real)
        yield


def exchange(
    plan: GroupPlan, payloads: Mapping[Key, bytes], cheat: Cheat | None = None, cheater: Key | None = None
) -> dict[str, AllReduceOutcome]:
    """The real all-reduce of a plan, over memory and in virtual time; outcomes by hotkey, without failed members."""
    here = [key for key in (*payloads, VALIDATOR) if plan.member(key.hotkey) is not None]

    async def one(hub: MemoryHub, key: Key) -> AllReduceOutcome | None:
        bent = cheat if key is cheater else None
        ACTING.set(bent is not None)
        member = plan.member(key.hotkey)
        assert member is not None
        transport: Any = hub.transport(peer_of(key.hotkey))
        await transport.start()
        real = transport
        if bent is not None:
            transport = bent.transport(real, plan)
        meddling = asyncio.ensure_future(bent.beside(plan, key, transport, verify)) if bent is not None else None
        try:
            return await all_reduce(plan, key, payloads.get(key), transport, verify)
        except (HivetrainError, ValueError):
            if bent is None:
                raise
            return None
        finally:
            if meddling is not None:
                meddling.cancel()
                await asyncio.gather(meddling, return_exceptions=True)
            await real.close()

    async def main() -> list[AllReduceOutcome | None]:
        hub = MemoryHub()
        if cheat is not None and cheat.small_rates:
            _slow_links(hub, [peer_of(key.hotkey) for key in here])
        return await asyncio.gather(*(one(hub, key) for key in here))

    with patched(cheat) if cheat is not None else contextlib.nullcontext():
        outcomes = run_in_virtual_time(main())
    return {key.hotkey: done for key, done in zip(here, outcomes, strict=True) if done is not None}


def _slow_links(hub: MemoryHub, peers: Sequence[str]) -> None:
    """Every frame takes a while, so that rates are finite."""
    for source in peers:
        for target in peers:
            if source != target:
                hub.script(source, target).delay_s = 0.001


def publish(
    world: World,
    base: Ref,
    state: State,
    plan: GroupPlan,
    outcome: AllReduceOutcome,
    keys: Sequence[Key],
    receipts: Mapping[str, Receipt],
    *,
    gated: bool = False,
) -> tuple[Ref, State]:
    """Outer step and publish: the next base and its state.

    Raises:
        NotPublished: ``gated``, and a gate refuses it.
    """
    recipe = world.parts.recipe
    vectors = outcome.vectors
    stepped = outer_step(
        state, vectors[DELTA], vectors[EXP_AVG], vectors[EXP_AVG_SQ], recipe.outer, recipe.inner.max_steps
    )
    stepped = world.parts.base.advance(stepped)
    digest = state_hash(stepped)
    message = state_message(plan.run_id, plan.round, plan.attempt, digest)
    led = Led(
        plan=plan,
        done=Participation(outcome=outcome, state=stepped, state_hash=digest),
        replies={},
        signatures={key.hotkey: key.sign(message).hex() for key in keys},
    )
    val_loss = world.bench.heldout_loss(world.parts, stepped)
    if gated:
        check_gates(world.parts, led, val_loss, base.manifest.val_loss)
    ref = publish_epoch(
        store=world.store,
        parts=world.parts,
        base=base,
        led=led,
        val_loss=val_loss,
        block=plan.round + 1,
        identity=VALIDATOR,
        receipts=receipts,
    )
    return ref, stepped


__all__ = ["CheatRound", "Checks", "HonestRound", "cheat_round", "exchange", "honest_rounds", "judge", "publish"]
