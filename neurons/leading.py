"""A validator's ALL_REDUCE and PUBLISH: lead, sit, stand by, complete what a silent leader left, publish.

When to do which is `template.validator.standby`'s; this is how.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from hivetrain.averaging.group import GroupPlan
from hivetrain.errors import HubConflict, IntegrityError, ServiceError
from hivetrain.manifest import Ref
from hivetrain.progress import Phase, Position, phase_window
from hivetrain.scoring import CheckResult, MovingAverage
from hivetrain.tracking import metrics
from hivetrain.verification.receipt import Receipt
from template.anchor import Candidate, candidates, first_owners
from template.chain.client import NeuronInfo
from template.chain.keys import verify
from template.config import NeuronConfig, Secrets
from template.dendrite import Reply
from template.leader import MAX_SITTING
from template.neuron import Exchange, Neuron
from template.protocol import AllReduce, AllReduceReply, IsAlive
from template.validator.collect import Collected, address_of
from template.validator.lead import (
    Led,
    count_signatures,
    left_undone,
    make_plan,
    make_state_synapse,
    make_synapse,
)
from template.validator.links import LinkBook
from template.validator.publish import NotPublished, check_gates, publish_epoch
from template.validator.reward import MOSTLY_INCLUDED, round_weights
from template.validator.standby import Move, Seat, attempt_blocks, next_move
from template.validator.verify import Draw

logger = logging.getLogger(__name__)

AWAKE_TIMEOUT_S = 2.0
SIGN_TIMEOUT_S = 5.0
REPLY_GRACE_S = 2.0
"""At least so long after the exchange's deadline members may still answer: they take the outer step first."""
REST_ROUNDS = 3


@dataclass(slots=True, kw_only=True)
class RoundNotes:
    """What one round has given so far."""

    miners: list[NeuronInfo]
    coins: bytes
    ranks: Mapping[str, int] = field(default_factory=dict)  # as they were when the round began
    block_hash: str = ""  # of the challenge
    owed: frozenset[str] = frozenset()  # who refused its last check
    collected: Collected = field(default_factory=Collected)
    draws: dict[str, Draw] = field(default_factory=dict)
    checks: dict[str, CheckResult | None] = field(default_factory=dict)


class LeadingNeuron(Neuron):
    """A neuron that may lead the all-reduce; `Validator` adds checks, scores and weights."""

    def __init__(self, config: NeuronConfig, secrets: Secrets) -> None:
        super().__init__(config, secrets)
        self._resting: dict[str, int] = {}  # until which round a member reduces nothing, for it left a part undone
        self._links = LinkBook()
        self._peer_owners: dict[str, str] = {}  # who was the first to announce a libp2p peer as its own
        self._doubted: set[tuple[str, str]] = set()  # peers and hotkeys of those who did not come as announced

    def start(self) -> None:
        """Open everything, as `Node.start`, and read the averages."""
        super().start()
        self.average = MovingAverage(self.config.state_dir / "averages.json", self.recipe.scoring)
        self.average.load()

    def read_anchors(self) -> list[Candidate]:
        """Read what everyone has committed, as `Neuron.read_anchors`; and remember who announced which peer first."""
        found = super().read_anchors()
        registered = {neuron.hotkey for neuron in self.metagraph.neurons}
        self._doubted = {pair for pair in self._doubted if pair[1] in registered}
        self._peer_owners = first_owners(self._peer_owners, self.anchors, registered, self._doubted)
        return found

    def average_group(self, position: Position, base: Ref, notes: RoundNotes) -> None:
        """Lead the all-reduce and publish, or sit in it and stand by: where a leader is silent, the next one leads.

        Returns when this round's epoch is anchored, or there is nothing left for us to do for it.
        """
        order = self.leader_order(position.round)
        place = order.index(self.identity.hotkey) if self.identity.hotkey in order else len(order)
        if place > 0:
            self._say("all-reduce", "standing by")
        has_led = False
        while not self.stopping.is_set():
            self.drain_mailbox()
            seat = self._seat(position, base, place, min(MAX_SITTING, len(order)), has_led)
            move = next_move(seat)
            if move is Move.OVER:
                return
            if move is Move.WAIT:
                self.wait_for_block(self.blocks.block + 1)
                continue
            has_led = True
            if place > 0:
                self._say_taking_over(position, place, order[:place])
            try:
                if move is Move.LEAD:
                    self.lead(position, base, notes, attempt_blocks(seat))
                else:
                    self.complete(position, base, notes, place)
            except ServiceError as exc:  # the next validator may have more luck, and the round is scored all the same
                self._say_failed(position, place, str(exc))

    def _seat(self, position: Position, base: Ref, place: int, num_leaders: int, has_led: bool) -> Seat:
        start, end = phase_window(position.round, Phase.ALL_REDUCE, self.schedule)
        held = [one.plan.attempt for one in self.exchanges if one.done.state is not None]
        failed = [one for one in self.exchanges if one.done.state is None]
        block = self.blocks.block
        return Seat(
            place=place,
            num_leaders=num_leaders,
            block=block,
            start=start,
            end=end,
            round_end=position.round_start + self.schedule.round_blocks,
            patience=self.schedule.leader_patience,
            heard=self.board.heard,
            held=max(held, default=-1),
            failed=failed[-1].plan.attempt if failed else -1,
            failed_at=failed[-1].ended_at if failed else -1,
            has_led=has_led,
            is_published=block > start and self._is_anchored(base.epoch + 1, start),
        )

    def _is_anchored(self, epoch: int, since: int) -> bool:
        """Whether a permitted validator has anchored that epoch since that block; what is older is another round's.

        An anchor alone proves nothing, or one bad validator could end every round: the hub must hold what it names.
        """
        try:
            named = {one.manifest_sha256 for one in self.read_anchors() if one.epoch == epoch and one.block >= since}
            ref = self.store.resolve(epoch) if named else None
            return ref is not None and ref.manifest_sha256 in named and self.why_unacceptable(ref.manifest) is None
        except ServiceError as exc:
            logger.warning("cannot tell whether epoch %d is published: %s", epoch, exc)
            return False

    def _say_taking_over(self, position: Position, attempt: int, silent: tuple[str, ...]) -> None:
        names = ", ".join(hotkey[:8] for hotkey in silent)
        text = f"round {position.round}: no epoch from {names}, attempt {attempt} is ours"
        logger.warning(text)
        self.events.append("took_over", text, round=position.round, attempt=attempt)

    def _say_failed(self, position: Position, attempt: int, why: str) -> None:
        logger.warning("round %d, attempt %d makes no epoch: %s", position.round, attempt, why)
        text = f"round {position.round}, attempt {attempt}: {why}"
        self.events.append("attempt_failed", text, round=position.round, attempt=attempt)

    def lead(self, position: Position, base: Ref, notes: RoundNotes, num_blocks: int) -> None:
        """Name a group, exchange with it, and publish what came of it.

        Args:
            num_blocks: how long all of the exchange may take.
        """
        order = self.leader_order(position.round)[:MAX_SITTING]
        plan = self._plan(position, notes, list(order), 0.8 * num_blocks * self.schedule.block_time_s)
        if plan is None:
            self._say_failed(position, order.index(self.identity.hotkey), "nobody has anything to average")
            return
        self.board.begin_attempt(plan.attempt)
        self._say("all-reduce", f"leading {len(plan.members) - 1} members")
        # Stand-bys that seem dead are told as well: one that hears nothing leads the next attempt.
        called = {*order, *(member.hotkey for member in plan.members)}
        timeout_s = plan.deadline_s + max(REPLY_GRACE_S, 0.15 * plan.deadline_s)
        calls = self._call(called, make_synapse(plan, base.manifest_sha256), timeout_s)
        try:
            done = self.take_part(plan, None)
            if done.outcome is None or done.state is None:
                self._say_failed(position, plan.attempt, done.detail)
                return
            # Nobody else's signature counts, and a member that was left out may not answer before its time is up.
            senders = [
                calls[hotkey] for hotkey, share in done.outcome.included.items() if share > 0 and hotkey in calls
            ]
            replies = [call.result(timeout_s + REPLY_GRACE_S) for call in senders]
        finally:
            for call in calls.values():
                call.cancel()
        self.publish(position, base, count_signatures(plan, done, replies, verify), notes.collected.receipts)

    def _call(
        self, hotkeys: Collection[str], synapse: AllReduce, timeout_s: float
    ) -> dict[str, Future[Reply[AllReduceReply]]]:
        """Call everyone of ``hotkeys`` but ourselves at once."""
        peers = [address_of(neuron) for neuron in self.metagraph.neurons if neuron.hotkey in hotkeys]
        return {
            peer.hotkey: self.network.submit(self.dendrite.call(peer, synapse, timeout_s=timeout_s))
            for peer in peers
            if peer.hotkey != self.identity.hotkey
        }

    def _plan(self, position: Position, notes: RoundNotes, order: list[str], duration_s: float) -> GroupPlan | None:
        weights = round_weights(notes.collected.receipts, notes.checks, self.average, position.round)
        self.read_anchors()
        return make_plan(
            parts=self.parts,
            round_number=position.round,
            attempt=order.index(self.identity.hotkey),
            receipts=notes.collected.receipts,
            weights=weights,
            sitting=self._awake(order, position.round),
            resting={hotkey for hotkey, until in self._resting.items() if position.round < until},
            shares=self._links.shares(),
            owners=self._peer_owners,
            anchors={hotkey: anchor for hotkey, (_, anchor) in self.anchors.items()},
            duration_s=duration_s,
        )

    def _awake(self, sitting: list[str], round_number: int) -> list[str]:
        """Those of ``sitting`` that are in this round: a seat that stays empty costs the group time, or a part."""
        neurons = {neuron.hotkey: neuron for neuron in self.metagraph.neurons}
        others = [address_of(neurons[h]) for h in sitting if h in neurons and h != self.identity.hotkey]
        calls = self.dendrite.call_many(others, IsAlive(), timeout_s=AWAKE_TIMEOUT_S)
        replies = self.network.run(calls, AWAKE_TIMEOUT_S + 2)
        awake = {one.hotkey for one in replies if one.reply is not None and one.reply.round == round_number}
        return [hotkey for hotkey in sitting if hotkey == self.identity.hotkey or hotkey in awake]

    def complete(self, position: Position, base: Ref, notes: RoundNotes, attempt: int) -> None:
        """Publish the result that we hold, for its leader is silent; it may have got as far as the tag."""
        if self._child(base) is not None:
            self._anchor_orphan(base)
            return
        held = next(one for one in reversed(self.exchanges) if one.done.state is not None)
        plan = replace(held.plan, attempt=attempt)
        synapse = make_state_synapse(plan, base.manifest_sha256, held.done.state_hash)
        calls = self._call({member.hotkey for member in plan.members if member.sends}, synapse, SIGN_TIMEOUT_S)
        replies = [call.result(SIGN_TIMEOUT_S + REPLY_GRACE_S) for call in calls.values()]
        self.publish(position, base, count_signatures(plan, held.done, replies, verify), notes.collected.receipts)

    def exchanged(self, exchange: Exchange) -> None:
        """Remember how fast members sent, and who is not to reduce for a while."""
        outcome = exchange.done.outcome
        if outcome is None:
            return
        self._links.note(outcome.links)
        for member in exchange.plan.members:
            pair = (member.peer_id, member.hotkey)
            if outcome.included.get(member.hotkey, 0.0) > MOSTLY_INCLUDED:  # most reducers have met it as that peer
                self._doubted.discard(pair)
                self._peer_owners[member.peer_id] = member.hotkey
            elif member.sends and any(outcome.included.values()):  # a round that failed for everyone tells of nobody
                self._doubted.add(pair)
        undone = left_undone(exchange.plan, outcome) - {self.identity.hotkey}
        self._resting.update(dict.fromkeys(undone, exchange.plan.round + 1 + REST_ROUNDS))

    def publish(self, position: Position, base: Ref, led: Led, receipts: Mapping[str, Receipt]) -> None:
        """Pass the gates, tag, anchor; a refusal makes no epoch."""
        state = led.done.state
        assert state is not None

        def require_time() -> None:
            if self.position.round != position.round:  # a slow upload may outlast it
                raise NotPublished(f"round {position.round} is over: the next one has begun from its parent")

        self._say("publishing", f"epoch {state.epoch}")
        val_loss = self.bench.heldout_loss(self.parts, state)
        try:
            check_gates(self.parts, led, val_loss, base.manifest.val_loss)
            require_time()
            ref = publish_epoch(
                store=self.store,
                parts=self.parts,
                base=base,
                led=led,
                val_loss=val_loss,
                block=self.blocks.block,
                identity=self.identity,
                receipts=receipts,
                before_tag=require_time,
                why_refused=self.why_unacceptable,
            )
            self.announce(epoch=ref.epoch, manifest=ref.manifest_sha256)
        except HubConflict:
            logger.info("epoch %d was published by another leader of round %d", state.epoch, position.round)
            self.events.append("lost_race", f"epoch {state.epoch} is published already", epoch=state.epoch)
            return
        except (NotPublished, ServiceError) as exc:  # the round is scored all the same
            self._say_failed(position, led.plan.attempt, str(exc))
            return
        self._log_epoch(ref, led)
        try:
            self.store.prune(self.recipe.hub.keep_epochs, self.recipe.adapter.base_epoch, ref.epoch)
        except ServiceError as exc:
            logger.warning("old epochs stay on the hub for now: %s", exc)

    def _log_epoch(self, ref: Ref, led: Led) -> None:
        outcome = led.done.outcome
        assert outcome is not None
        manifest = ref.manifest
        self.status.update(loss=manifest.val_loss)
        text = f"epoch {ref.epoch}: val loss {manifest.val_loss:.3f}, {len(manifest.members)} members"
        logger.info("published %s", text)
        self.events.append(
            "published", text, epoch=ref.epoch, val_loss=manifest.val_loss, members=len(manifest.members)
        )
        self.tracker.log(
            {
                metrics.GLOBAL_EPOCH: ref.epoch,
                metrics.GLOBAL_SAMPLES: manifest.total_samples,
                metrics.VAL_LOSS: manifest.val_loss,
                metrics.ALLREDUCE_SECONDS: outcome.seconds,
                metrics.ALLREDUCE_BYTES_SENT: outcome.bytes_sent,
                metrics.ALLREDUCE_BYTES_RECEIVED: outcome.bytes_received,
                metrics.ALLREDUCE_FAULTS: len(outcome.faults),
                metrics.ALLREDUCE_MEMBERS: len(manifest.members),
            },
            step=manifest.round,
        )

    def _stand_for(self, base: Ref) -> None:
        """Anchor the base ourselves when its leader did: the run must not hang on one validator's commitment."""
        mine = self.anchors.get(self.identity.hotkey)
        if mine is None or mine[1].epoch < base.epoch:
            self.announce(epoch=base.epoch, manifest=base.manifest_sha256)

    def _anchor_orphan(self, base: Ref) -> None:
        """An epoch that was tagged by a leader who died before its hash was on chain: anchor it for the next round."""
        child = self._child(base)
        if child is None:
            return
        found = candidates(self.anchors, set(self.validators()), self.run_id)
        if any(candidate.manifest_sha256 == child.manifest_sha256 for candidate in found):
            return
        logger.info("anchoring epoch %d, which its leader left unanchored", child.epoch)
        self.announce(epoch=child.epoch, manifest=child.manifest_sha256)

    def _child(self, base: Ref) -> Ref | None:
        """The epoch that follows ``base`` on the hub, if it is one; what else is tagged there stops nobody."""
        number = base.epoch + 1
        try:
            ref = self.store.resolve(number)
            if ref is None or ref.manifest.parent != base.manifest_sha256:
                return None
            why = self.why_unacceptable(ref.manifest)
        except IntegrityError as exc:
            why = str(exc)
        if why is None:
            return ref
        logger.error("epoch %d lies on the hub and cannot be accepted: %s", number, why)
        self.events.append("orphan_refused", f"epoch {number} on the hub: {why}", epoch=number)
        return None
