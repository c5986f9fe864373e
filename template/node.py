"""What every neuron opens: keys, chain, run, network, trackers; and what it reads from the chain.

Constructors assign; `start` opens everything in the order in which a failure is cheapest to explain, `close`
takes it down again. The model belongs to the thread that calls `start`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from hivetrain.averaging.swarm import Swarm
from hivetrain.errors import ConfigError, IntegrityError, ServiceError
from hivetrain.hub.client import HubDataset, HubStore
from hivetrain.hub.dataset import DatasetFiles
from hivetrain.run import read_recipe
from hivetrain.tracking import EventLog, RunInfo, StatusWriter, Trackers, make_tracker
from hivetrain.workbench import Parts, Workbench
from template.access import AccessPolicy, NeuronFacts
from template.anchor import MAX_MADDR_CHARS, Anchor, parse_anchors, voted_run
from template.axon import Axon
from template.blocks import BlockWatcher
from template.board import Board
from template.chain.client import Chain, Metagraph, NeuronInfo
from template.chain.keys import WalletIdentity, load_wallet
from template.config import NeuronConfig, Secrets
from template.dendrite import Dendrite
from template.handlers import Handlers
from template.leader import Leaders
from template.network import NetworkThread
from template.protocol import AllReduce, IsAlive, Train

logger = logging.getLogger(__name__)

POLL_S = 0.25
DEFAULT_HUB = "https://huggingface.co"
START_PATIENCE_S = 20.0
"""How long a start waits for a chain or hub that does not answer; whoever supervises the process tries again later."""
START_RETRY_S = 2.0

MAX_INITIAL_PEERS = 16
MAX_CONNECTIONS = 300  # an all-reduce holds one to every member until it is over

T = TypeVar("T")


def announced_maddrs(visible: list[str]) -> tuple[str, ...]:
    """Up to two of our addresses for the anchor: public before loopback; those too long for one are left out.

    Raises:
        ConfigError: none fits.
    """
    fitting = [maddr for maddr in visible if 0 < len(maddr) <= MAX_MADDR_CHARS]
    if not fitting:
        raise ConfigError(
            f"none of this neuron's addresses {visible} fits on chain ({MAX_MADDR_CHARS} characters); "
            "name one with --dht.announce_maddrs"
        )
    return tuple(sorted(fitting, key=lambda maddr: maddr.startswith("/ip4/127."))[:2])


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


class Node:
    """A process with a hotkey, opened and closed; `template.neuron.Neuron` adds what it does."""

    def __init__(self, config: NeuronConfig, secrets: Secrets) -> None:
        self.config = config
        self.secrets = secrets
        self.name = config.name
        self.stopping = threading.Event()
        self.board = Board()
        self.network = NetworkThread()
        self.status = StatusWriter(config.run_dir / "status", self.name, config.role)
        self.events = EventLog(config.run_dir / "events.jsonl", self.name)
        self.metagraph = Metagraph(netuid=config.netuid, block=-1, neurons=())

    # -- life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Open everything; returns when this neuron can take part.

        Raises:
            ConfigError: something that the operator must mend; the message says how.
            ServiceError: chain or hub do not answer.
        """
        config = self.config
        try:
            config.state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"--neuron.dir: cannot write {config.state_dir}: {exc.strerror}") from exc
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

    def close(self) -> None:
        """Take down what `start` opened. Never raises: a neuron that stops must stop."""
        self.stopping.set()
        self._say("stopping", "")
        for step in (self._close_blocks, self._close_network, self._close_tracker, self._close_chain):
            try:
                step()
            except Exception:  # the boundary of shutting down: log and go on
                logger.exception("while stopping")
        self._say("stopped", "")
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
        self.leaders = Leaders(self.schedule)

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
        self.dendrite = Dendrite(keypair, max_connections=MAX_CONNECTIONS)
        self.network.run(self.dendrite.start(), 10)
        policy = AccessPolicy(
            registry=self._facts,
            min_stake=config.blacklist.min_stake,
            force_validator_permit=config.blacklist.force_validator_permit,
            allow_non_registered=config.blacklist.allow_non_registered,
        )
        self.axon = Axon(keypair, policy, host=config.axon.ip, port=config.axon.port)
        handlers = self.make_handlers()
        self.axon.attach(IsAlive, handlers.is_alive)
        self.axon.attach(Train, handlers.train)
        self.axon.attach(AllReduce, handlers.all_reduce, timeout_s=600.0)
        self.network.run(self.axon.start(), 30)
        ip = config.axon.external_ip or config.axon.ip
        self.chain.serve(ip, config.axon.external_port or self.axon.port)
        self.announce()

    def make_handlers(self) -> Handlers:
        """What answers the synapses of this neuron."""
        return Handlers(
            role=self.config.role,
            run_id=self.run_id,
            identity=self.identity,
            board=self.board,
            layout=self.parts.layout,
            averaging=self.recipe.averaging,
            why_not_leader=self._why_not_leader,
            max_deadline_s=self.schedule.all_reduce * self.schedule.block_time_s,
        )

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
                bulk=config.dht.bulk,
                bulk_port=config.dht.bulk_port,
                announce_bulk=config.dht.announce_bulk,
            )
            try:
                self.network.run(swarm.start(), 90)
                return swarm
            except (ServiceError, ConfigError) as exc:
                if named or not peers:
                    raise
                # Addresses on chain outlive their neurons; members are dialled by the plan's addresses anyway.
                logger.info("none of the %d peers on chain is up yet, starting alone", len(peers))
                logger.debug("%s", exc)
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
        # Whoever took a uid over since then leaves a hole: nobody else's rank may shift in mid-round.
        return {n.hotkey: rank for rank, n in enumerate(self.metagraph.neurons) if n.registered_at <= round_start}

    def miners(self, round_start: int) -> list[NeuronInfo]:
        """Who may train in a round that began at ``round_start``: registered by then, without a permit."""
        ranks, slots = self.ranks(round_start), self.recipe.data.max_miners
        return [n for n in self.metagraph.neurons if ranks.get(n.hotkey, slots) < slots and not n.validator_permit]

    def announce(self, epoch: int | None = None, manifest: str | None = None) -> None:
        """Commit on chain where we are reached and, for a validator, which epoch we stand for.

        Without arguments an epoch that is already anchored stays.
        """
        mine = parse_anchors(self.chain.commitments()).get(self.identity.hotkey)
        old = mine[1] if mine is not None else Anchor()
        anchor = Anchor(
            peer_id=self.swarm.peer_id,
            # Behind a NAT no address works: who announces none reduces nothing, and sends over its own streams.
            maddrs=() if self.config.dht.client_mode else announced_maddrs(self.swarm.visible_maddrs()),
            run_id=bytes.fromhex(self.run_id),
            repo=self._repo,
            epoch=old.epoch if epoch is None else epoch,
            manifest=old.manifest if manifest is None else bytes.fromhex(manifest),
        )
        if anchor != old:
            self.chain.commit(anchor.to_bytes())

    def leader_order(self, round_number: int) -> tuple[str, ...]:
        """The order in which validators lead the current round.

        Raises:
            ServiceError: the chain does not tell the seed.
        """
        if not self.leaders.order(round_number):
            seed = self.chain.block_hash(self.leaders.draw_block(round_number))
            self.leaders.learn(round_number, seed, self.validators())
        return self.leaders.order(round_number)

    def _why_not_leader(self, hotkey: str, round_number: int, attempt: int, want: str) -> str | None:
        return self.leaders.why_not(hotkey, round_number, attempt, want, self.blocks.block)

    def _facts(self, hotkey: str) -> NeuronFacts | None:
        neuron = self.metagraph.by_hotkey(hotkey)
        if neuron is None:
            return None
        return NeuronFacts(uid=neuron.uid, stake=neuron.stake, validator_permit=neuron.validator_permit)

    def _peers_on_chain(self) -> list[str]:
        """Where registered neurons say that they are reached; addresses that cannot be dialled are left out."""
        anchors = parse_anchors(self.chain.commitments())
        others = [anchor for hotkey, (_, anchor) in anchors.items() if hotkey != self.identity.hotkey]
        known = {anchor.peer_id for hotkey, (_, anchor) in anchors.items() if self.metagraph.by_hotkey(hotkey)}
        return [
            maddr
            for anchor in others
            if anchor.peer_id in known
            for maddr in anchor.maddrs
            if maddr.startswith("/") and "/p2p/" in maddr
        ][:MAX_INITIAL_PEERS]

    def _say(self, state: str, detail: str) -> None:
        self.board.update(state=state)
        self.status.update(state=state, detail=detail)
