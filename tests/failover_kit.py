"""A round's all-reduce with several validators in one process: the neurons' own code, real sockets, a clock to turn.

Every neuron has a thread, an axon, a board and a transport in memory; they share one network thread, one model and one
chain of anchors. Blocks come when the test says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hivetrain.averaging.memory import MemoryHub
from hivetrain.contribution import Contribution
from hivetrain.manifest import Manifest, Ref
from hivetrain.progress import Phase, phase_at, phase_window
from hivetrain.run import Schedule
from hivetrain.scoring import MovingAverage
from hivetrain.tracking import Trackers
from hivetrain.workbench import Workbench
from neurons.leading import LeadingNeuron, RoundNotes
from template.access import AccessPolicy, NeuronFacts
from template.axon import Axon, AxonSettings
from template.chain.client import ChainCommitment, Metagraph, NeuronInfo
from template.config import Secrets, parse_config
from template.dendrite import Dendrite
from template.handlers import Handlers
from template.leader import Leaders
from template.network import NetworkThread
from template.neuron import Held, Neuron
from template.protocol import AllReduce, IsAlive
from template.validator.collect import Collected
from tests.chain_fixture import dev_wallet
from tests.round_kit import COINS, ROUND, World, identity, neuron_info

SCHEDULE = Schedule(
    start_block=1, block_time_s=0.5, train=1, commit=1, verify=1, all_reduce=12, publish=8, leader_patience=3
)
START, END = phase_window(ROUND, Phase.ALL_REDUCE, SCHEDULE)
ROUND_END = END + SCHEDULE.publish
POSITION = phase_at(START - 3, SCHEDULE)
MINERS = ("miner", "miner-2", "miner-3")
WAIT_S = 60.0
QUICK = AxonSettings(close_grace_s=0.1)


class Clock:
    """Stands in for `BlockWatcher`: the newest block is the one that the test has set."""

    age_s = 0.0

    def __init__(self) -> None:
        self.block = START - 1
        self._changed = threading.Condition()

    def turn(self, block: int) -> None:
        """A new block for everyone."""
        with self._changed:
            self.block = block
            self._changed.notify_all()

    def wait(self, until: int, timeout_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self.block >= until, min(timeout_s, 0.02))
            return self.block


class AnchorChain:
    """The commitments of everyone, as one neuron's chain client shows them."""

    def __init__(self, clock: Clock, hotkey: str, shared: dict[str, ChainCommitment]) -> None:
        self._clock = clock
        self._hotkey = hotkey
        self._shared = shared

    def commitments(self) -> dict[str, ChainCommitment]:
        return dict(self._shared)

    def commit(self, data: bytes) -> None:
        self._shared[self._hotkey] = ChainCommitment(block=self._clock.block, data=data)


class SharedBench:
    """One model for all: its users take turns."""

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._lock = threading.Lock()

    def heldout_loss(self, *arguments: object) -> float:
        with self._lock:
            return self._bench.heldout_loss(*arguments)  # type: ignore[arg-type]

    def load_state(self, *arguments: object) -> object:
        return self._bench.load_state(*arguments)  # type: ignore[arg-type]


@dataclass(kw_only=True, eq=False)
class Failover:
    """Three miners that have committed, and validators in the order in which they lead."""

    world: World
    clock: Clock
    network: NetworkThread
    validators: list[LeadingNeuron]
    miners: list[Neuron]
    axons: dict[str, Axon]
    notes: RoundNotes
    commitments: dict[str, ChainCommitment]
    threads: dict[str, threading.Thread] = field(default_factory=dict)
    crashes: list[BaseException] = field(default_factory=list)

    def run(self, *neurons: Neuron) -> None:
        """Start the threads of these neurons: a validator's ALL_REDUCE and PUBLISH, a miner's wait for its calls."""
        for neuron in neurons:
            thread = threading.Thread(target=self._main, args=(neuron,), name=neuron.name)
            self.threads[neuron.identity.hotkey] = thread
            thread.start()

    def _main(self, neuron: Neuron) -> None:
        try:
            if isinstance(neuron, LeadingNeuron):
                neuron.average_group(POSITION, self.world.base, self.notes)
            else:
                neuron.wait_for_block(ROUND_END)
        except BaseException as exc:
            self.crashes.append(exc)

    def kill(self, neuron: Neuron) -> None:
        """As `kill -9`: nothing of it answers any more. May be called by the neuron's own thread."""
        neuron.stopping.set()
        self.network.run(self.axons.pop(neuron.identity.hotkey).close(), 10)
        self.network.run(neuron.swarm.close(), 10)

    def join(self, *neurons: Neuron) -> None:
        """Wait until the threads of these neurons have come to their end."""
        for neuron in neurons:
            thread = self.threads[neuron.identity.hotkey]
            thread.join(WAIT_S)
            assert not thread.is_alive(), f"{neuron.name} hangs"
        assert not self.crashes, self.crashes

    def turn_until(self, block: int, condition: Callable[[], object], last: int) -> None:
        """Turn the clock block by block from ``block`` on, each a moment long, until ``condition`` holds."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"not by block {self.clock.block}"
            self.clock.turn(min(max(block, self.clock.block), last))
            block += 1
            wait_for(condition, 0.3)

    def epoch(self) -> Manifest | None:
        """The published epoch 1."""
        ref = self.world.store.resolve(1)
        return ref.manifest if ref is not None else None

    def anchored(self) -> set[str]:
        """Hotkeys of the validators that stand for epoch 1."""
        return {candidate.hotkey for candidate in self.validators[-1].read_anchors() if candidate.epoch == 1}

    def published(self) -> Ref:
        """Epoch 1, which is anchored and acceptable to everyone."""
        ref = self.world.store.resolve(1)
        assert ref is not None
        for neuron in (*self.miners, *self.validators):
            assert neuron.why_unacceptable(ref.manifest) is None
        assert self.anchored()
        return ref

    def adopt_everywhere(self, *without: Neuron) -> list[str]:
        """Have everyone take epoch 1; where each state came from, after a look that all hold the manifest's."""
        ref, sources = self.published(), []
        for neuron in (*self.miners, *self.validators):
            if neuron in without:
                continue
            neuron.adopt(ref)
            line = (neuron.config.state_dir / "states.jsonl").read_text().splitlines()[-1]
            assert f'"state_hash": "{ref.manifest.state_hash}"' in line
            sources.append("computed" if '"computed"' in line else "downloaded")
        return sources


def wait_for(condition: Callable[[], object], timeout_s: float = WAIT_S) -> bool:
    """Whether ``condition`` became true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def open_failover(world: World, folder: Path, num_validators: int = 2) -> Iterator[Failover]:
    """A round at the block before ALL_REDUCE, nobody running yet; everything is closed at the end."""
    names = [*MINERS, *(f"validator-{number}" for number in range(1, num_validators + 1))]
    network, clock, hub = NetworkThread(), Clock(), MemoryHub()
    network.start()
    commitments: dict[str, ChainCommitment] = {}
    policy = _policy(names)
    axons = {n: Axon(dev_wallet(n).hotkey, policy, host="127.0.0.1", port=0, settings=QUICK) for n in names}
    contributions = _contributions(world)
    made: dict[str, Neuron] = {}
    for name in names:
        role, is_miner = ("miner", True) if name in MINERS else ("validator", False)
        config = parse_config(["--neuron.dir", str(folder / name), "--neuron.name", name], role, {})  # type: ignore[arg-type]
        config.state_dir.mkdir(parents=True)
        neuron = (Neuron if is_miner else LeadingNeuron)(config, Secrets())
        made[name] = neuron
        _fit(neuron, world, name, clock, network, hub, commitments)
        neuron.begin_round(POSITION, world.base)
        if is_miner:
            neuron.board.commit(contributions[name])
        handlers = Handlers(
            role=role,
            run_id=world.parts.run_id,
            identity=neuron.identity,
            board=neuron.board,
            layout=world.parts.layout,
            averaging=world.parts.recipe.averaging,
            why_not_leader=neuron._why_not_leader,
        )
        axons[name].attach(IsAlive, handlers.is_alive)
        axons[name].attach(AllReduce, handlers.all_reduce, timeout_s=60.0)
        network.run(axons[name].start(), 10)
    graph = Metagraph(netuid=1, block=0, neurons=tuple(_info(names, axons)))
    for neuron in made.values():
        neuron.metagraph = graph
        neuron.leaders.learn(ROUND, "0xabc", neuron.validators())
        neuron.announce(epoch=0, manifest=world.base.manifest_sha256)
    order = made[names[-1]].leaders.order(ROUND)
    by_hotkey = {neuron.identity.hotkey: neuron for neuron in made.values()}
    validators = [by_hotkey[hotkey] for hotkey in order]
    for validator in validators:
        assert isinstance(validator, LeadingNeuron)
        validator.average = MovingAverage(folder / f"{validator.name}.json", world.parts.recipe.scoring)
    receipts = {identity(name).hotkey: contributions[name].receipt for name in MINERS}
    net = Failover(
        world=world,
        clock=clock,
        network=network,
        validators=validators,  # type: ignore[arg-type]
        miners=[made[name] for name in MINERS],
        axons={axon.hotkey: axon for axon in axons.values()},
        notes=RoundNotes(miners=[], coins=COINS, collected=Collected(receipts=receipts)),
        commitments=commitments,
    )
    try:
        yield net
    finally:
        clock.turn(ROUND_END)
        for neuron in made.values():
            neuron.stopping.set()
        for thread in net.threads.values():
            thread.join(WAIT_S)
        for axon in net.axons.values():
            network.run(axon.close(), 10)
        for neuron in made.values():
            network.run(neuron.dendrite.close(), 10)
            network.run(neuron.swarm.close(), 10)
            neuron.events.close()
        network.close()


_made: dict[str, dict[str, Contribution]] = {}


def _contributions(world: World) -> dict[str, Contribution]:
    """What the miners hand in; made once for each run."""
    found = _made.get(world.parts.run_id)
    if found is None:
        found = {name: world.contribution(identity(name), rank) for rank, name in enumerate(MINERS)}
        _made[world.parts.run_id] = found
    return found


def _policy(names: Sequence[str]) -> AccessPolicy:
    facts = {
        identity(name).hotkey: NeuronFacts(uid=uid, stake=1000.0, validator_permit=name not in MINERS)
        for uid, name in enumerate(names)
    }
    return AccessPolicy(registry=facts.get)


def _info(names: Sequence[str], axons: dict[str, Axon]) -> Iterator[NeuronInfo]:
    for uid, name in enumerate(names):
        info = neuron_info(identity(name).hotkey, axons[name].port, uid)
        yield dataclasses.replace(info, validator_permit=name not in MINERS, stake=100.0)


def _fit(
    neuron: Neuron,
    world: World,
    name: str,
    clock: Clock,
    network: NetworkThread,
    hub: MemoryHub,
    commitments: dict[str, ChainCommitment],
) -> None:
    """Give the neuron what `Node.start` would open."""
    neuron.identity = identity(name)
    neuron.run_id, neuron._repo = world.parts.run_id, "test/model"
    neuron.parts, neuron.recipe, neuron.schedule = world.parts, world.parts.recipe, SCHEDULE
    neuron.leaders = Leaders(SCHEDULE)
    neuron.store = world.store  # type: ignore[assignment]
    neuron.bench = SharedBench(world.bench)  # type: ignore[assignment]
    neuron.blocks = clock  # type: ignore[assignment]
    neuron.chain = AnchorChain(clock, neuron.identity.hotkey, commitments)  # type: ignore[assignment]
    neuron.network = network
    neuron.dendrite = Dendrite(dev_wallet(name).hotkey)
    network.run(neuron.dendrite.start(), 10)
    transport = hub.transport(f"peer-{name}")
    transport.visible_maddrs = lambda: [f"/memory/{name}"]  # type: ignore[attr-defined]
    network.run(transport.start(), 5)
    neuron.swarm = transport  # type: ignore[assignment]
    neuron.tracker = Trackers({})
    neuron.held = Held(ref=world.base, state=world.state)
