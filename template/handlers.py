"""What a neuron answers, without ever touching the model: Train, AllReduce and IsAlive."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack

from hivetrain import __version__
from hivetrain.averaging.group import AUDIT_BLOCKS, GroupPlan, plan_from_dict
from hivetrain.averaging.layout import PayloadLayout
from hivetrain.errors import Fault, PeerFault
from hivetrain.identity import Identity
from hivetrain.manifest import state_message
from hivetrain.run import Averaging
from template.axon import Caller
from template.board import AllReduceTask, Board
from template.protocol import (
    AllReduce,
    AllReduceReply,
    IsAlive,
    IsAliveReply,
    Opening,
    RemainderOpening,
    Train,
    TrainReply,
)

logger = logging.getLogger(__name__)

MAX_PLAN_BYTES = 1 << 20
CALL_LIMIT_S = 600.0
MAX_DEADLINE_S = CALL_LIMIT_S - 20.0
"""The model's thread waits for the exchange: a leader may not hold it for longer than its call can last."""


def spec_version() -> int:
    """`__version__` as one number, 1000·major + 10·minor + patch: what SetWeights carries as version_key."""
    major, minor, patch = (int(part) for part in __version__.split("."))
    return 1000 * major + 10 * minor + patch


def parse_plan(raw: bytes) -> GroupPlan:
    """Parse the group plan of an AllReduce synapse.

    Raises:
        PeerFault: MALFORMED.
    """
    try:
        if len(raw) > MAX_PLAN_BYTES:
            raise ValueError(f"{len(raw)} bytes, the limit is {MAX_PLAN_BYTES}")
        fields = msgpack.unpackb(raw, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as exc:
        raise PeerFault(Fault.MALFORMED, f"plan is not msgpack: {exc}") from exc
    return plan_from_dict(fields)


@dataclass(slots=True)
class Coins:
    """Per validator, the digest of the challenge coins that it committed to with its receipt request."""

    committed: dict[tuple[int, str], str] = field(default_factory=dict)

    def commit(self, round_number: int, validator: str, digest: bytes) -> None:
        """Keep the first digest of a round; forget older rounds."""
        self.committed = {key: value for key, value in self.committed.items() if key[0] >= round_number - 1}
        self.committed.setdefault((round_number, validator), digest.hex())

    def reveals(self, round_number: int, validator: str, coins: bytes) -> bool:
        """Whether ``coins`` are those that the validator committed to."""
        return self.committed.get((round_number, validator)) == hashlib.sha256(coins).hexdigest()


class Handlers:
    """The three handlers of one neuron.

    Args:
        role: "miner" or "validator".
        run_id: the run that this neuron is in.
        identity: who this neuron is; signs the state that it holds for a leader who has it too.
        board: where the model's thread writes.
        layout: of what the all-reduce carries.
        averaging: the recipe's table.
        why_not_leader: why ``hotkey`` may not ask for ``want`` in an attempt at a round, or None when it may; called
            as ``why_not_leader(hotkey, round, attempt, want)``.
        max_deadline_s: how long a leader may hold this neuron: the length of ALL_REDUCE.
    """

    def __init__(
        self,
        *,
        role: str,
        run_id: str,
        identity: Identity,
        board: Board,
        layout: PayloadLayout,
        averaging: Averaging,
        why_not_leader: Callable[[str, int, int, str], str | None],
        max_deadline_s: float = MAX_DEADLINE_S,
    ) -> None:
        self._role = role
        self._run_id = run_id
        self._identity = identity
        self._board = board
        self._layout = layout
        self._averaging = averaging
        self._why_not_leader = why_not_leader
        self._max_deadline_s = min(max_deadline_s, MAX_DEADLINE_S)
        self._coins = Coins()
        self._running: dict[tuple[int, int], concurrent.futures.Future[AllReduceReply]] = {}

    async def is_alive(self, synapse: IsAlive, caller: Caller) -> IsAliveReply:
        """Who is here, and where in the run."""
        report = self._board.report
        return IsAliveReply(
            version=spec_version(),
            role=self._role,
            run_id=self._run_id,
            epoch=report.epoch,
            round=report.round,
            state=report.state.replace("-", "_"),
        )

    async def train(self, synapse: Train, caller: Caller) -> TrainReply:
        """The last report; with it the receipt, or openings of what it commits to."""
        report = self._board.report
        contribution = self._board.contribution
        reply = TrainReply(
            run_id=self._run_id,
            round=max(report.round, 0),
            status=report.state.replace("-", "_"),
            epoch=report.epoch,
            step=report.step,
            num_steps=report.num_steps,
            loss=report.loss,
            tokens_per_second=report.tokens_per_second,
        )
        if synapse.run_id != self._run_id:
            return reply.model_copy(update={"status": "wrong_run"})
        if synapse.want == "report":
            return reply
        if contribution is None or contribution.receipt.round != synapse.round:
            return reply.model_copy(update={"status": "not_committed"})
        if synapse.want == "receipt":
            self._coins.commit(synapse.round, caller.hotkey, synapse.coins)
            return reply.model_copy(update={"status": "committed", "receipt": contribution.receipt.to_bytes()})
        if not self._coins.reveals(synapse.round, caller.hotkey, synapse.coins):
            return reply.model_copy(update={"status": "wrong_coins", "detail": "coins are not those committed to"})
        try:
            opened = [(index, *contribution.snapshots.open(index)) for index in synapse.snapshots]
        except IndexError as exc:
            return reply.model_copy(update={"status": "no_such_snapshot", "detail": str(exc)})
        openings = tuple(
            Opening(index=index, step=snapshot.step, payload=snapshot.payload, proof=tuple(proof))
            for index, snapshot, proof in opened
        )
        remainder = None
        if contribution.remainder is not None and contribution.receipt.num_snapshots - 1 in synapse.snapshots:
            remainder = RemainderOpening(**dataclasses.asdict(contribution.remainder))
        shown = {"openings": openings, "remainder": remainder, "steps": contribution.steps}
        return reply.model_copy(update={"status": "opened", "receipt": contribution.receipt.to_bytes(), **shown})

    async def all_reduce(self, synapse: AllReduce, caller: Caller) -> AllReduceReply:
        """Check the call, hand it to the model's thread, and wait for what came of it."""
        if synapse.want == "state":
            return self._sign_held(synapse, caller)
        done = self._board.outcome(synapse.round, synapse.attempt)
        if done is not None:
            return done
        running = self._running.get((synapse.round, synapse.attempt))
        if running is not None:  # a call that was delivered twice waits for the one answer
            return await self._answer(synapse, running, CALL_LIMIT_S)
        try:
            plan = parse_plan(synapse.plan)
            refusal = self._refuse(synapse, plan, caller)
        except PeerFault as exc:
            refusal = str(exc)
        if refusal is not None:
            logger.warning("refused AllReduce of %s for round %d: %s", caller.hotkey[:8], synapse.round, refusal)
            return self._reply(synapse, accepted=False, detail=refusal)
        self._board.begin_attempt(synapse.attempt)  # an exchange of a lower one gives way
        future: concurrent.futures.Future[AllReduceReply] = concurrent.futures.Future()
        self._running = {(synapse.round, synapse.attempt): future}
        self._board.mailbox.put(AllReduceTask(request=synapse, plan=plan, caller=caller.hotkey, reply=future))
        return await self._answer(synapse, future, plan.deadline_s + 10)

    async def _answer(
        self, synapse: AllReduce, future: concurrent.futures.Future[AllReduceReply], timeout_s: float
    ) -> AllReduceReply:
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), timeout_s)
        except TimeoutError:
            return self._reply(synapse, accepted=True, detail="the model's thread did not answer in time")
        except asyncio.CancelledError:
            if future.cancelled():
                return self._reply(synapse, accepted=False, detail="the round has moved on")
            raise

    def _sign_held(self, synapse: AllReduce, caller: Caller) -> AllReduceReply:
        """Sign the state that an earlier attempt gave here, for the leader who goes on with it."""
        refusal = self._refuse_caller(synapse, caller)
        if refusal is None and not self._board.holds(synapse.state_hash):
            refusal = f"state {synapse.state_hash[:12]} is not held here"
        if refusal is None and not self._board.sign_once(synapse.attempt, synapse.state_hash):
            refusal = f"another state is signed for attempt {synapse.attempt}"
        if refusal is not None:
            logger.warning("no signature for %s in round %d: %s", caller.hotkey[:8], synapse.round, refusal)
            return self._reply(synapse, accepted=False, detail=refusal)
        message = state_message(self._run_id, synapse.round, synapse.attempt, synapse.state_hash)
        return AllReduceReply(
            run_id=self._run_id,
            round=synapse.round,
            attempt=synapse.attempt,
            accepted=True,
            completed=True,
            state_hash=synapse.state_hash,
            state_signature=self._identity.sign(message).hex(),
        )

    def _refuse_caller(self, synapse: AllReduce, caller: Caller) -> str | None:
        """Why this call is not one of the round's leader, or comes too late; None where it is to be heard."""
        report = self._board.report
        if synapse.run_id != self._run_id:
            return f"another run: {synapse.run_id[:12]}, here {self._run_id[:12]}"
        if synapse.round != report.round:
            return f"round {synapse.round}, here {report.round}"
        if synapse.base_manifest != report.base_manifest:
            return f"base {synapse.base_manifest[:12]}, here {report.base_manifest[:12]}"
        why = self._why_not_leader(caller.hotkey, synapse.round, synapse.attempt, synapse.want)
        if why is not None:
            return why
        self._board.hear(synapse.attempt)
        newest = self._board.newest_attempt
        if synapse.attempt < newest:
            return f"attempt {synapse.attempt} is over: attempt {newest} has begun here"
        return None

    def _refuse(self, synapse: AllReduce, plan: GroupPlan, caller: Caller) -> str | None:
        refusal = self._refuse_caller(synapse, caller)
        if refusal is not None:
            return refusal
        if plan.run_id != self._run_id:
            return f"another run: {plan.run_id[:12]}, here {self._run_id[:12]}"
        if (plan.round, plan.attempt) != (synapse.round, synapse.attempt):
            return f"plan is of round {plan.round}.{plan.attempt}, the call of {synapse.round}.{synapse.attempt}"
        if plan.deadline_s > self._max_deadline_s:
            return f"deadline {plan.deadline_s:g} s, the limit is {self._max_deadline_s:g} s"
        if plan.layout != self._layout:
            return f"layout {plan.layout.layout_hash[:12]}, here {self._layout.layout_hash[:12]}"
        if (plan.mean, plan.max_abs) != (self._averaging.mean, self._averaging.max_abs):
            return (
                f"mean {plan.mean!r} within ±{plan.max_abs:g}, "
                f"the recipe says {self._averaging.mean!r} within ±{self._averaging.max_abs:g}"
            )
        if (plan.audit_blocks, plan.stall_s, plan.min_rate) != (AUDIT_BLOCKS, None, 0.0):
            return (
                f"audits of {plan.audit_blocks} blocks, stall {plan.stall_s}, rate {plan.min_rate}: not the protocol's"
            )
        if not 0.25 <= plan.send_deadline_s / plan.deadline_s <= 0.75:
            return f"vectors in {plan.send_deadline_s:g} of {plan.deadline_s:g} s: a quarter to three quarters is due"
        mine = plan.member(self._identity.hotkey)
        if mine is None:
            return "this hotkey is not in the group"
        contribution = self._board.contribution
        if mine.weight > 0:
            if contribution is None or contribution.receipt.round != synapse.round:
                return "nothing is committed for this round"
            if mine.root != contribution.payload_root:
                return "the plan names another root than the receipt's"
        return None

    def _reply(self, synapse: AllReduce, *, accepted: bool, detail: str) -> AllReduceReply:
        return AllReduceReply(
            run_id=self._run_id,
            round=synapse.round,
            attempt=synapse.attempt,
            accepted=accepted,
            completed=False,
            detail=detail[:500],
        )
