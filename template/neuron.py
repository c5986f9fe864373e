"""What a neuron does in every round: finds the state to start from, waits for its phases, takes part in the averaging.

What it opens is `template.node.Node`'s; what a miner or a validator does in its phases is in `neurons/`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.transport import Transport
from hivetrain.contribution import Contribution
from hivetrain.errors import ServiceError
from hivetrain.manifest import Manifest, Ref
from hivetrain.progress import Phase, Position, phase_at, phase_window
from hivetrain.training.state import State
from template.acceptance import why_unacceptable
from template.anchor import Anchor, Candidate, candidates, find_base, parse_anchors
from template.board import AllReduceTask
from template.chain.keys import verify
from template.config import NeuronConfig, Secrets
from template.node import POLL_S, Node
from template.participant import Participation, make_reply, take_part

logger = logging.getLogger(__name__)

CHAIN_SILENT_S = 30.0
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The state that this neuron holds, and the epoch it belongs to."""

    ref: Ref
    state: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One attempt at a round's all-reduce that ended by itself here, with a state or without.

    Attributes:
        ended_at: the newest block then.
    """

    plan: GroupPlan
    done: Participation
    ended_at: int


class Neuron(Node):
    """The common part of miners and validators."""

    def __init__(self, config: NeuronConfig, secrets: Secrets) -> None:
        super().__init__(config, secrets)
        self.held: Held | None = None
        self.exchanges: list[Exchange] = []  # of this round, in the order of their attempts
        self.anchors: dict[str, tuple[int, Anchor]] = {}  # as `read_anchors` last read them
        self._mean_memory: bytearray | None = None  # that means land in, kept from exchange to exchange
        self._last_round = -1  # the newest that has begun, here or before we were ready

    def start(self) -> None:
        """Open everything, as `Node.start`; the round that is under way then is not for us."""
        super().start()
        self._last_round = self.position.round

    def run(self) -> None:
        """Round after round, until told to stop. A round that fails for want of a service or of disk is skipped."""
        while not self.stopping.is_set():
            position = self.wait_for_next_round()
            if position is None:
                return
            try:
                self.round(position)
            except ServiceError as exc:
                self._skip(position, str(exc))
            except OSError as exc:
                if exc.errno not in _DISK_ERRNOS:
                    raise
                where = exc.filename or self.config.state_dir
                self._skip(position, f"cannot write {where}: {exc.strerror}; free some space there")

    def round(self, position: Position) -> None:
        """The role's own part of one round."""
        raise NotImplementedError

    def _skip(self, position: Position, why: str) -> None:
        logger.warning("round %d is skipped: %s", position.round, why)
        self.events.append("round_skipped", f"round {position.round}: {why}", round=position.round)

    # -- state --------------------------------------------------------------------------------------------

    def find_base(self, position: Position) -> Ref:
        """The epoch that the round at ``position`` starts from.

        Raises:
            IntegrityError: nothing that is anchored can be verified.
            ServiceError: chain or hub do not answer.
        """
        self.refresh_metagraph()
        return find_base(self.read_anchors(), position.round_start, self.store.resolve, self.why_unacceptable)

    def read_anchors(self) -> list[Candidate]:
        """Read what everyone has committed on chain; the epochs that permitted validators stand for, newest first.

        Raises:
            ServiceError: the chain does not answer.
        """
        self.anchors = parse_anchors(self.chain.commitments())
        return candidates(self.anchors, set(self.validators()), self.run_id)

    def begin_round(self, position: Position, base: Ref) -> None:
        """Forget the last round, and say where we are."""
        self.exchanges = []
        self.board.begin_round(position.round, base.epoch, base.manifest_sha256)

    def adopt(self, ref: Ref) -> None:
        """Hold the state of ``ref``: the one that we computed, if it is the same, else a download."""
        if self.held is not None and self.held.ref.manifest_sha256 == ref.manifest_sha256:
            return
        digest = computed = ref.manifest.state_hash
        state = next((one.done.state for one in self.exchanges if one.done.state_hash == digest), None)
        source = "computed"
        if state is None:
            self._say("resync", f"downloading epoch {ref.epoch}")
            source, state = "downloaded", self.bench.load_state(ref, self.parts)
            tried = (ref.manifest.round, ref.manifest.attempt)
            ours = [one.done for one in self.exchanges if (one.plan.round, one.plan.attempt) == tried]
            computed = next((done.state_hash for done in ours if done.state_hash), digest)
        self.held = Held(ref=ref, state=self.parts.base.adopt_(state))
        self._record_state(ref, computed, source)
        self.status.update(epoch=ref.epoch)
        if source == "downloaded" and ref.epoch > 0:
            self.events.append("resync", f"loaded epoch {ref.epoch} from the hub", epoch=ref.epoch)

    def _record_state(self, ref: Ref, computed: str, source: str) -> None:
        line: dict[str, object] = {
            "epoch": ref.epoch,
            "state_hash": computed,
            "manifest_state_hash": ref.manifest.state_hash,
            "source": source,
        }
        append_line(self.config.state_dir / "states.jsonl", line)

    def why_unacceptable(self, manifest: Manifest) -> str | None:
        """Why a manifest is refused here and now, or None."""
        permitted = self.validators()
        return why_unacceptable(
            manifest,
            run_id=self.run_id,
            schema_hash=self.parts.schema_hash,
            quorum=self.recipe.gates.quorum,
            registered=lambda hotkey: self.metagraph.by_hotkey(hotkey) is not None,
            base_epoch=self.recipe.adapter.base_epoch,
            why_no_publisher=lambda hotkey, round_number, attempt: self.leaders.why_no_publisher(
                hotkey, round_number, attempt, permitted
            ),
            verify=verify,
        )

    # -- rounds -------------------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """Where the newest block lies."""
        return phase_at(self.blocks.block, self.schedule)

    def wait_for_block(self, block: int) -> bool:
        """Wait for ``block``, doing what the mailbox brings meanwhile; False when we are to stop."""
        while not self.stopping.is_set():
            self.drain_mailbox()
            if self.blocks.wait(block, POLL_S) >= block:
                self.status.update(phase=self.position.phase.value)
                return True
            if self.blocks.age_s > CHAIN_SILENT_S:
                self.status.update(detail="the chain does not answer")
            else:
                self.status.update(phase=self.position.phase.value)
        return False

    def wait_for_phase(self, position: Position, phase: Phase) -> bool:
        """Wait for ``phase`` of the round at ``position``; False when we are to stop."""
        return self.wait_for_block(phase_window(position.round, phase, self.schedule)[0])

    def wait_for_next_round(self) -> Position | None:
        """Wait for a round that has not begun here yet, while its TRAIN lasts; None when we are to stop."""
        position = self.position
        # Whoever waits in vain for an epoch until a round's last block is in the next round already.
        if position.round <= self._last_round or position.phase is not Phase.TRAIN:
            following = position.round_start + self.schedule.round_blocks
            if not self.wait_for_block(following if position.round >= 0 else self.schedule.start_block):
                return None
            position = self.position
        self._last_round = position.round
        return position

    def wait_for_epoch(self, position: Position) -> None:
        """Until the round ends, watch for its epoch, and hold it as soon as it is anchored."""
        assert self.held is not None
        end = position.round_start + self.schedule.round_blocks
        base = self.held.ref
        while self.blocks.block < end and not self.stopping.is_set() and self.held.ref is base:
            try:
                found = self.read_anchors()
                if found and found[0].epoch > base.epoch:
                    self.adopt(find_base(found, found[0].block + 1, self.store.resolve, self.why_unacceptable))
            except ServiceError as exc:
                logger.warning("cannot take the new epoch yet: %s", exc)
            self.wait_for_block(min(end, self.blocks.block + 1))

    def drain_mailbox(self) -> None:
        """Do what leaders ask of the model's thread."""
        while not self.board.mailbox.empty():
            self._serve(self.board.mailbox.get())

    def _serve(self, task: AllReduceTask) -> None:
        current = task.request.round == self.board.report.round  # a failed round leaves the base as it was
        current = current and task.plan.attempt >= self.board.begun
        if self.held is None or not current or task.request.base_manifest != self.held.ref.manifest_sha256:
            task.reply.cancel()
            return
        mine = next(member for member in task.plan.members if member.hotkey == self.identity.hotkey)
        contribution = self.board.contribution
        ours = contribution if mine.weight > 0 else None
        self._say("all-reduce", f"with {len(task.plan.members) - 1} others")
        done = self.take_part(task.plan, ours)
        reply = make_reply(task.plan, done)
        self.board.record_outcome(reply)
        if not task.reply.cancelled():
            task.reply.set_result(reply)
        self._say("waiting", "for the next epoch")

    def take_part(self, plan: GroupPlan, contribution: Contribution | None) -> Participation:
        """Exchange with the group of ``plan``; the next state is kept until the next round says what was published.

        A valid call of a higher attempt ends the exchange.
        """
        assert self.held is not None
        memory, self._mean_memory = self._mean_memory or bytearray(self.parts.layout.size_bytes), None
        done = take_part(
            plan,
            parts=self.parts,
            state=self.held.state,
            payload=contribution.payload if contribution is not None else None,
            tree=contribution.tree if contribution is not None else None,
            memory=memory,
            identity=self.identity,
            verify=verify,
            network=self.network,
            transport=self.transport(plan),
            give_way=lambda: self.board.begun > plan.attempt,
        )
        is_over = self.board.newest_attempt > plan.attempt
        if done.state is not None and (is_over or not self.board.sign_once(plan.attempt, done.state_hash)):
            done = replace(done, signature="")  # a higher attempt counts, or the leader had another state signed
        if done.outcome is not None or not is_over:
            self.exchanges.append(Exchange(plan=plan, done=done, ended_at=self.blocks.block))
            self.exchanged(self.exchanges[-1])
        if done.outcome is not None:
            self._mean_memory = memory  # an exchange that gave way may still be writing to it
            self._log_all_reduce(done)
        return done

    def transport(self, plan: GroupPlan) -> Transport:
        """What carries the exchange with the group of ``plan``."""
        return self.swarm

    def exchanged(self, exchange: Exchange) -> None:
        """The role's own part of what an all-reduce showed."""

    def _log_all_reduce(self, done: Participation) -> None:
        outcome = done.outcome
        assert outcome is not None
        logger.info(
            "all-reduce: %.2f s, %d bytes sent, %d received, %d faults, state %s",
            outcome.seconds,
            outcome.bytes_sent,
            outcome.bytes_received,
            len(outcome.faults),
            done.state_hash[:12] or "incomplete",
        )


def append_line(path: Path, record: dict[str, object]) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


__all__ = ["Exchange", "Held", "Neuron", "append_line"]
