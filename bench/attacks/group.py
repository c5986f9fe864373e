"""ALL_REDUCE and PUBLISH in memory: the leader's plan, the real exchange in virtual time, the next epoch."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.attacks.cheat import Cheat
from bench.attacks.world import VALIDATOR, World
from bench.inmemory import Key, verify
from hivetrain.averaging.butterfly import AllReduceOutcome, all_reduce
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.memory import MemoryHub, run_in_virtual_time
from hivetrain.errors import HivetrainError
from hivetrain.manifest import Ref, state_message
from hivetrain.training.outer import outer_step
from hivetrain.training.state import State, state_hash
from hivetrain.verification.receipt import Receipt
from hivetrain.workbench import DELTA, EXP_AVG, EXP_AVG_SQ
from template.anchor import Anchor
from template.participant import Participation
from template.validator.lead import Led, make_plan
from template.validator.publish import check_gates, publish_epoch

DURATION_S = 60.0  # of virtual time, for an all-reduce


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
