"""What every neuron has: keys, chain, hub, model, network, trackers; and how it finds the state to start from.

Constructors assign; `start` opens everything in the order in which a failure is cheapest to explain, `close`
takes it down again. The model belongs to the thread that calls `start`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.swarm import Swarm
from hivetrain.errors import ConfigError, IntegrityError, ServiceError
from hivetrain.hub.client import HubDataset, HubStore
from hivetrain.hub.dataset import DatasetFiles
from hivetrain.manifest import Manifest, Ref, state_message
from hivetrain.progress import Phase, Position, phase_at
from hivetrain.run import read_recipe
from hivetrain.tracking import EventLog, RunInfo, StatusWriter, Trackers, make_tracker
from hivetrain.training.state import State
from hivetrain.workbench import Parts, Workbench
from template.access import AccessPolicy, NeuronFacts
from template.anchor import Anchor, candidates, find_base, parse_anchors, voted_run
from template.axon import Axon
from template.blocks import BlockWatcher
from template.board import AllReduceTask, Board
from template.chain.client import Chain, Metagraph, NeuronInfo
from template.chain.keys import WalletIdentity, load_wallet, verify
from template.config import NeuronConfig, Secrets
from template.dendrite import Dendrite
from template.handlers import Handlers
from template.leader import leader_order
from template.network import NetworkThread
from template.participant import Participation, make_reply, take_part
from template.protocol import AllReduce, IsAlive, Train

logger = logging.getLogger(__name__)

POLL_S = 0.25
CHAIN_SILENT_S = 30.0
DEFAULT_HUB = "https://huggingface.co"
START_PATIENCE_S = 20.0
"""How long a start waits for a chain or hub that does not answer; whoever supervises the process tries again later."""
START_RETRY_S = 2.0
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The state that this neuron holds, and the epoch it belongs to."""

    ref: Ref
    state: State


def pick_device(name: str) -> torch.device:
    """The device for ``--neuron.device``; "auto" is CUDA when it is there.

    Raises:
        ConfigError: a CUDA device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"--neuron.device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


class Neuron:
    """The common part of miners and validators."""

    def __init__(self, config: NeuronConfig, secrets: Secrets) -> None:
        self.config = config
        self.secrets = secrets
        self.name = config.name
        self.stopping = threading.Event()
        self.board = Board()
        self.network = NetworkThread()
        self.status = StatusWriter(config.run_dir / "status", self.name, config.role)
        self.events = EventLog(config.run_dir / "events.jsonl", self.name)
        self.held: Held | None = None
        self.pending: Participation | None = None
        self.sat: tuple[GroupPlan, Participation] | None = None  # the last all-reduce that took place here
        self.metagraph = Metagraph(netuid=config.netuid, block=-1, neurons=())
        self._closers: list[tuple[str, object]] = []
        self._last_leader: tuple[int, list[str]] = (-1, [])
        self._last_round = -1  # the newest that has begun, here or before we were ready

    # -- life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open everything; returns when this neuron can take part.

        Raises:
            ConfigError: something that the operator must mend; the message says how.
            ServiceError: chain or hub do not answer.
        """
        config = self.config
        config.state_dir.mkdir(parents=True, exist_ok=True)
        if config.neuron.threads:
            torch.set_num_threads(config.neuron.threads)
        self._say("starting", "reading keys")
        device = pick_device(config.neuron.device)
        self.wallet = load_wallet(config.wallet.name, config.wallet.hotkey, config.wallet.path)
        self.identity = WalletIdentity(self.wallet)
        self.chain = Chain(
            network=config.subtensor.network,
            netuid=config.netuid,
            wallet=self.wallet,
            chain_endpoint=config.subtensor.chain_endpoint or None,
        )
        self._start_chain()
        self.uid = self._require_registered()
        self.status.update(uid=self.uid, hotkey=self.identity.hotkey)
        self._say("starting", "reading the run from the hub")
        self._patiently(lambda: self._open_run(device), f"check --hub.endpoint {self.hub_endpoint}")
        self._say("starting", "opening sockets")
        self._open_network()
        self.tracker = self._open_tracker()
        self.blocks = BlockWatcher(self.chain.block, POLL_S)
        self.blocks.start()
        self._last_round = self.position.round
        self.status.update(ready=True)
        self._say("waiting", "")
        logger.info(
            "%s: uid %d, run %s, %d trainable parameters on %s",
            self.name,
            self.uid,
            self.run_id[:12],
            self.parts.flat.size,
            device,
        )

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

    def close(self) -> None:
        """Take down what `start` opened. Never raises: a neuron that stops must stop."""
        self.stopping.set()
        self._say("stopping", "")
        for step in (self._close_blocks, self._close_network, self._close_tracker, self._close_chain):
            try:
                step()
            except Exception:  # the boundary of shutting down: log and go on
                logger.exception("while stopping")
        self.events.close()
        self.status.flush()

    @property
    def hub_endpoint(self) -> str:
        """The hub that this neuron reads from."""
        return self.config.hub.endpoint or DEFAULT_HUB

    def _start_chain(self) -> None:
        subtensor = self.config.subtensor
        if subtensor.chain_endpoint.startswith("sqlite://"):  # a file that is not there does not come back by itself
            self.chain.start()
        else:
            fix = f"check --subtensor.network {subtensor.network} and --subtensor.chain_endpoint"
            self._patiently(self.chain.start, fix)

    def _patiently(self, action: Callable[[], T], fix: str) -> T:
        """Run ``action``, again while a service does not answer, for `START_PATIENCE_S`.

        Raises:
            ServiceError: it still does not answer; the message ends with ``fix``.
        """
        give_up_at = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                return action()
            except IntegrityError:
                raise
            except ServiceError as exc:
                if time.monotonic() >= give_up_at or self.stopping.is_set():
                    raise ServiceError(f"{exc}; {fix}") from exc
                logger.warning("waiting: %s", exc)
                self.stopping.wait(START_RETRY_S)

    def _require_registered(self) -> int:
        self.refresh_metagraph()
        me = self.metagraph.by_hotkey(self.identity.hotkey)
        if me is None:
            raise ConfigError(
                f"hotkey {self.identity.hotkey} is not registered on subnet {self.config.netuid}; register it: "
                f"`hivetrain register {self.config.wallet.name}` on a local network, "
                f"`btcli subnets register --netuid {self.config.netuid}` elsewhere"
            )
        return int(me.uid)

    def _open_run(self, device: torch.device) -> None:
        config = self.config
        endpoint = self.hub_endpoint
        token = self.secrets.hub_token
        self.run_id, self._repo = self._run_on_chain()
        self.store = HubStore(endpoint=endpoint, repo=config.hub.repo or self._repo, token=token)

        def open_dataset(repo: str, revision: str) -> DatasetFiles:
            return HubDataset(endpoint=endpoint, repo=repo, revision=revision, token=token)

        self.bench = Workbench(store=self.store, open_dataset=open_dataset, cache=config.cache_dir, device=device)
        pinned = read_recipe(config.neuron.recipe) if config.neuron.recipe is not None else None
        self.parts: Parts = self.bench.open(self.run_id, pinned)
        self.recipe = self.parts.recipe
        self.schedule = self.recipe.schedule

    def _run_on_chain(self) -> tuple[str, str]:
        """Id and repo of the run that the validators with the most stake stand for."""
        run = voted_run(parse_anchors(self.chain.commitments()), self.validators())
        if run is None:
            raise ConfigError(
                f"no validator of subnet {self.config.netuid} has committed to a run yet; run genesis first"
            )
        return run

    def _open_network(self) -> None:
        config = self.config
        self.network.start()
        self.swarm = self._join_swarm()
        keypair = self.wallet.hotkey
        self.dendrite = Dendrite(keypair)
        self.network.run(self.dendrite.start(), 10)
        policy = AccessPolicy(
            registry=self._facts,
            min_stake=config.blacklist.min_stake,
            force_validator_permit=config.blacklist.force_validator_permit,
            allow_non_registered=config.blacklist.allow_non_registered,
        )
        self.axon = Axon(keypair, policy, host=config.axon.ip, port=config.axon.port)
        handlers = Handlers(
            role=config.role,
            run_id=self.run_id,
            hotkey=self.identity.hotkey,
            board=self.board,
            layout=self.parts.layout,
            may_lead=self._may_lead,
        )
        self.axon.attach(IsAlive, handlers.is_alive)
        self.axon.attach(Train, handlers.train)
        self.axon.attach(AllReduce, handlers.all_reduce, timeout_s=600.0)
        self.network.run(self.axon.start(), 30)
        ip = config.axon.external_ip or config.axon.ip
        self.chain.serve(ip, config.axon.external_port or self.axon.port)
        self.announce()

    def _join_swarm(self) -> Swarm:
        """Join through the peers that the operator names, or through those on chain, or be the first."""
        config = self.config
        named = list(config.dht.initial_peers)
        for peers in (named,) if named else (self._peers_on_chain(), []):
            swarm = Swarm(
                initial_peers=peers,
                host_maddrs=list(config.dht.host_maddrs),
                announce_maddrs=list(config.dht.announce_maddrs) or None,
                identity_path=config.identity_path,
                client_mode=config.dht.client_mode,
            )
            try:
                self.network.run(swarm.start(), 90)
                return swarm
            except ServiceError as exc:
                if named or not peers:
                    raise
                # Addresses on chain outlive their neurons; members are dialled by the plan's addresses anyway.
                logger.info("none of the %d peers on chain answers, starting alone: %s", len(peers), exc)
        raise AssertionError("the last attempt returns or raises")

    def _open_tracker(self) -> Trackers:
        config = self.config
        info = RunInfo(
            project=config.tracker.project,
            name=self.name,
            group=self.run_id[:12],
            config={"role": config.role, "uid": self.uid, "hotkey": self.identity.hotkey, "run_id": self.run_id},
        )
        tracker = make_tracker(config.tracker.kind, info, config.tracker_dir, wandb_mode=config.tracker.wandb_mode)
        tracker.start()
        return tracker

    def _close_blocks(self) -> None:
        if hasattr(self, "blocks"):
            self.blocks.close()

    def _close_network(self) -> None:
        if hasattr(self, "axon"):
            self.network.run(self.axon.close(), 10)
        if hasattr(self, "dendrite"):
            self.network.run(self.dendrite.close(), 5)
        if hasattr(self, "swarm"):
            self.network.run(self.swarm.close(), 10)
        self.network.close()

    def _close_tracker(self) -> None:
        if hasattr(self, "tracker"):
            self.tracker.finish()

    def _close_chain(self) -> None:
        if hasattr(self, "chain"):
            self.chain.close()

    # -- chain --------------------------------------------------------------------------------------------

    def refresh_metagraph(self) -> None:
        """Read the metagraph; the axon answers from this copy."""
        self.metagraph = self.chain.metagraph()

    def validators(self) -> dict[str, float]:
        """Stake of every hotkey with a validator permit."""
        return {neuron.hotkey: neuron.stake for neuron in self.metagraph.neurons if neuron.validator_permit}

    def ranks(self, round_start: int) -> dict[str, int]:
        """Rank of every hotkey that was registered at the round's first block."""
        return {neuron.hotkey: rank for rank, neuron in enumerate(self.metagraph.registered_by(round_start))}

    def miners(self, round_start: int) -> list[NeuronInfo]:
        """Who may train in a round that began at ``round_start``: registered by then, without a permit."""
        slots = self.recipe.data.max_miners
        registered = self.metagraph.registered_by(round_start)[:slots]
        return [neuron for neuron in registered if not neuron.validator_permit]

    def announce(self, epoch: int | None = None, manifest: str | None = None) -> None:
        """Commit on chain where we are reached and, for a validator, which epoch we stand for.

        Without arguments an epoch that is already anchored stays.
        """
        mine = parse_anchors(self.chain.commitments()).get(self.identity.hotkey)
        old = mine[1] if mine is not None else Anchor()
        anchor = Anchor(
            peer_id=self.swarm.peer_id,
            maddrs=tuple(self.swarm.visible_maddrs())[:2],
            run_id=bytes.fromhex(self.run_id),
            repo=self._repo,
            epoch=old.epoch if epoch is None else epoch,
            manifest=old.manifest if manifest is None else bytes.fromhex(manifest),
        )
        if anchor != old:
            self.chain.commit(anchor.to_bytes())

    def leaders(self, round_number: int) -> list[str]:
        """The order in which validators lead a round: drawn from the hash of the first block of its VERIFY."""
        if self._last_leader[0] != round_number:
            start = self.schedule.start_block + round_number * self.schedule.round_blocks
            drawn_at = start + self.schedule.train + self.schedule.commit
            order = leader_order(self.chain.block_hash(drawn_at), self.validators())
            self._last_leader = (round_number, order)
        return self._last_leader[1]

    def _may_lead(self, hotkey: str, round_number: int, attempt: int) -> str | None:
        known_round, order = self._last_leader
        if known_round != round_number:
            return f"round {round_number} has no leader yet"
        if attempt >= len(order) or order[attempt] != hotkey:
            return f"attempt {attempt} of round {round_number} is led by {order[min(attempt, len(order) - 1)]}"
        return None

    def _facts(self, hotkey: str) -> NeuronFacts | None:
        neuron = self.metagraph.by_hotkey(hotkey)
        if neuron is None:
            return None
        return NeuronFacts(uid=neuron.uid, stake=neuron.stake, validator_permit=neuron.validator_permit)

    def _peers_on_chain(self) -> list[str]:
        anchors = parse_anchors(self.chain.commitments())
        return [maddr for hotkey, (_, a) in anchors.items() if hotkey != self.identity.hotkey for maddr in a.maddrs]

    # -- state --------------------------------------------------------------------------------------------

    def find_base(self, position: Position) -> Ref:
        """The epoch that the round at ``position`` starts from.

        Raises:
            IntegrityError: nothing that is anchored can be verified.
            ServiceError: chain or hub do not answer.
        """
        self.refresh_metagraph()
        found = candidates(parse_anchors(self.chain.commitments()), set(self.validators()), self.run_id)
        return find_base(found, position.round_start, self.store.resolve, self._why_unacceptable)

    def adopt(self, ref: Ref) -> None:
        """Hold the state of ``ref``: the one that we computed, if it is the same, else a download."""
        if self.held is not None and self.held.ref.manifest_sha256 == ref.manifest_sha256:
            return
        digest = ref.manifest.state_hash
        pending, self.pending = self.pending, None
        if pending is not None and pending.state is not None and pending.state_hash == digest:
            source, state = "computed", pending.state
        else:
            self._say("resync", f"downloading epoch {ref.epoch}")
            source, state = "downloaded", self.bench.load_state(ref, self.parts)
        self.held = Held(ref=ref, state=state)
        computed = pending.state_hash if pending is not None and pending.state_hash else digest
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

    def _why_unacceptable(self, manifest: Manifest) -> str | None:
        """Why a manifest is refused, or None: another run, the leader's signature, the members' quorum."""
        if manifest.run_id != self.run_id:
            return f"run {manifest.run_id[:12]}, ours is {self.run_id[:12]}"
        if not verify(manifest.leader, manifest.signed_bytes(), _hex(manifest.leader_signature)):
            return f"not signed by its leader {manifest.leader}"
        if manifest.epoch == 0:
            return None
        if manifest.schema_hash != self.parts.schema_hash:
            return f"schema {manifest.schema_hash[:12]}, ours is {self.parts.schema_hash[:12]}"
        message = state_message(manifest.run_id, manifest.round, manifest.attempt, manifest.state_hash)
        total = sum(manifest.weights.values())
        signed = sum(
            weight
            for hotkey, weight in manifest.weights.items()
            if verify(hotkey, message, _hex(manifest.signatures.get(hotkey, "")))
        )
        if total <= 0 or signed < self.recipe.gates.quorum * total:
            return (
                f"members who hold {signed:g} of {total:g} samples signed, the quorum is {self.recipe.gates.quorum:.2f}"
            )
        return None

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
        start = position.round_start
        for candidate, num_blocks in zip(Phase, self.schedule.phase_blocks, strict=True):
            if candidate is phase:
                break
            start += num_blocks
        return self.wait_for_block(start)

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
                found = candidates(parse_anchors(self.chain.commitments()), set(self.validators()), self.run_id)
                if found and found[0].epoch > base.epoch:
                    self.adopt(find_base(found, found[0].block + 1, self.store.resolve, self._why_unacceptable))
            except ServiceError as exc:
                logger.warning("cannot take the new epoch yet: %s", exc)
            self.wait_for_block(min(end, self.blocks.block + 1))

    def drain_mailbox(self) -> None:
        """Do what leaders ask of the model's thread."""
        while not self.board.mailbox.empty():
            self._serve(self.board.mailbox.get())

    def _serve(self, task: AllReduceTask) -> None:
        current = task.request.round == self.board.report.round  # a failed round leaves the base as it was
        if self.held is None or not current or task.request.base_manifest != self.held.ref.manifest_sha256:
            task.reply.cancel()
            return
        mine = next(member for member in task.plan.members if member.hotkey == self.identity.hotkey)
        contribution = self.board.contribution
        payload = contribution.payload if contribution is not None and mine.weight > 0 else None
        self._say("all-reduce", f"with {len(task.plan.members) - 1} others")
        done = self.take_part(task.plan, payload)
        reply = make_reply(task.plan, done)
        self.board.record_outcome(reply)
        if not task.reply.cancelled():
            task.reply.set_result(reply)
        self._say("waiting", "for the next epoch")

    def take_part(self, plan: GroupPlan, payload: bytes | None) -> Participation:
        """Exchange with the group of ``plan``; the next state is kept until the next round says what was published."""
        assert self.held is not None
        done = take_part(
            plan,
            parts=self.parts,
            state=self.held.state,
            payload=payload,
            identity=self.identity,
            verify=verify,
            network=self.network,
            transport=self.swarm,
        )
        if done.state is not None:
            self.pending = done
        if done.outcome is not None:
            self.sat = (plan, done)
            self._log_all_reduce(done)
        return done

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

    def _say(self, state: str, detail: str) -> None:
        self.board.update(state=state)
        self.status.update(state=state, detail=detail)


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def append_line(path: Path, record: dict[str, object]) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


__all__ = ["Held", "Neuron", "append_line", "pick_device"]
