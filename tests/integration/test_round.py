"""One whole round in one process: real training, real sockets, the real butterfly, and a state that all agree on.

Each neuron has its own board, axon and model thread; they share one network thread, and one model, which serves them
in turn. The parts exchange over streams in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.memory import MemoryTransport
from hivetrain.contribution import Contribution
from hivetrain.errors import Fault, IntegrityError
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest, Ref
from hivetrain.scoring import CheckResult, MovingAverage, Score
from hivetrain.training.state import state_hash
from hivetrain.verification.receipt import decode_snapshot
from hivetrain.workbench import Workbench
from template.acceptance import why_unacceptable
from template.anchor import Anchor, candidates, find_base, parse_anchors
from template.board import Board
from template.chain.client import ChainCommitment, NeuronInfo
from template.chain.keys import WalletIdentity, verify
from template.handlers import Handlers
from template.leader import leader_order
from template.participant import Participation, make_reply, take_part
from template.validator.collect import Collected, address_of, collect_receipts
from template.validator.lead import Led, count_signatures, make_plan, make_synapse
from template.validator.publish import check_gates, publish_epoch
from template.validator.reward import round_weights, score_miners
from template.validator.verify import draw
from tests.round_kit import (
    COINS,
    COINS_DIGEST,
    ROUND,
    VALIDATOR,
    Wire,
    World,
    identity,
    memory_transports,
    model_thread,
    open_wire,
    shared_world,
)

NAMES = ("miner", "miner-2", "miner-3")
BLOCK_HASH = "0x" + "5a" * 32


@dataclass(kw_only=True, eq=False)
class Miner:
    """One miner that has trained and committed, and answers."""

    identity: WalletIdentity
    board: Board
    handlers: Handlers
    contribution: Contribution
    info: NeuronInfo


@dataclass(kw_only=True, eq=False)
class Net:
    """Three miners and the validator that leads."""

    world: World
    wire: Wire
    miners: list[Miner]
    transports: dict[str, MemoryTransport]
    average: MovingAverage

    @property
    def anchors(self) -> dict[str, Anchor]:
        hotkeys = [miner.identity.hotkey for miner in self.miners] + [VALIDATOR.hotkey]
        return {
            hotkey: Anchor(peer_id=peer, maddrs=("/memory",))
            for hotkey, peer in zip(hotkeys, self.transports, strict=True)
        }

    def collect(self) -> Collected:
        return collect_receipts(
            miners=[miner.info for miner in self.miners],
            expected={miner.identity.hotkey: self.world.expected(rank) for rank, miner in enumerate(self.miners)},
            run_id=self.world.parts.run_id,
            round_number=ROUND,
            coins_digest=COINS_DIGEST,
            dendrite=self.wire.dendrite,
            network=self.wire.network,
            verify=verify,
            keep_waiting=lambda: False,
        )

    def lead(self, collected: Collected, weights: dict[str, float]) -> Led:
        """As `LeadingNeuron.lead` does it."""
        order = leader_order(BLOCK_HASH, {VALIDATOR.hotkey: 1000.0})
        plan = make_plan(
            parts=self.world.parts,
            round_number=ROUND,
            attempt=0,
            receipts=collected.receipts,
            weights=weights,
            sitting=order,
            anchors=self.anchors,
            duration_s=20.0,
        )
        assert plan is not None
        members = {member.hotkey for member in plan.members}
        others = [address_of(miner.info) for miner in self.miners if miner.identity.hotkey in members]
        synapse = make_synapse(plan, self.world.base.manifest_sha256)
        with ExitStack() as stack:
            for miner in self.miners:
                transport = self.transports[self.anchors[miner.identity.hotkey].peer_id]
                stack.enter_context(model_thread(self.world, miner.identity, miner.board, self.wire.network, transport))
            calls = self.wire.network.submit(self.wire.dendrite.call_many(others, synapse, timeout_s=30.0))
            return count_signatures(plan, self.take_part(plan), calls.result(40.0), verify)

    def take_part(self, plan: GroupPlan) -> Participation:
        """The leader's own seat."""
        return take_part(
            plan,
            parts=self.world.parts,
            state=self.world.state,
            payload=None,
            identity=VALIDATOR,
            verify=verify,
            network=self.wire.network,
            transport=self.transports["peer-leader"],
        )

    def publish(self, led: Led) -> Ref:
        assert led.done.state is not None
        val_loss = self.world.bench.heldout_loss(self.world.parts, led.done.state)
        check_gates(self.world.parts, led, val_loss, self.world.base.manifest.val_loss)
        return publish_epoch(
            store=self.world.store,
            parts=self.world.parts,
            base=self.world.base,
            led=led,
            val_loss=val_loss,
            block=40,
            identity=VALIDATOR,
        )


@pytest.fixture
def net(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    world = shared_world(tmp_path_factory).fork(tmp_path / "cache")
    with (
        open_wire() as wire,
        memory_transports(wire.network, [*(f"peer-{n}" for n in NAMES), "peer-leader"]) as streams,
    ):
        miners = []
        for rank, name in enumerate(NAMES):
            me = identity(name)
            contribution = world.contribution(me, rank)
            board = world.board(contribution)
            handlers = world.handlers(me, board)
            info = wire.serve(name, handlers.train, handlers)
            miners.append(Miner(identity=me, board=board, handlers=handlers, contribution=contribution, info=info))
        average = MovingAverage(tmp_path / "averages.json", world.parts.recipe.scoring)
        yield Net(world=world, wire=wire, miners=miners, transports=streams, average=average)


def check_all(net: Net, collected: Collected) -> dict[str, CheckResult | None]:
    """Everyone is drawn: the recipe's share is 1."""
    draws = {
        hotkey: draw(
            block_hash=BLOCK_HASH,
            validator=VALIDATOR.hotkey,
            miner=hotkey,
            coins=COINS,
            num_snapshots=receipt.num_snapshots,
            scoring=net.world.parts.recipe.scoring,
        )
        for hotkey, receipt in collected.receipts.items()
    }
    return net.world.verifier(net.wire).check(collected.receipts, draws)


def score(net: Net, collected: Collected, checks: dict[str, CheckResult | None], led: Led) -> dict[str, Score]:
    scores = score_miners(
        miners=[miner.identity.hotkey for miner in net.miners],
        collected=collected,
        checks=checks,
        seen=[(led.plan, led.done.outcome)] if led.done.outcome is not None else [],
        average=net.average,
        round_number=ROUND,
        scoring=net.world.parts.recipe.scoring,
    )
    net.average.update(ROUND, scores, set(scores))
    return {hotkey: one for hotkey, one in scores.items() if isinstance(one, Score)}


def mean_state(net: Net, miners: list[Miner]) -> torch.Tensor:
    """Where the outer step must end: the start minus the plain mean of what these miners moved."""
    start = net.world.state.vector.double()
    finals = [
        decode_snapshot(miner.contribution.snapshots.snapshots[-1].payload, len(start)).vector.double()
        for miner in miners
    ]
    return start - torch.stack([start - final for final in finals]).mean(0)


def test_one_round_ends_in_one_state_that_everybody_holds_and_in_full_pay(net: Net) -> None:
    collected = net.collect()
    assert set(collected.receipts) == {miner.identity.hotkey for miner in net.miners}
    checks = check_all(net, collected)
    for result in checks.values():
        assert result is not None
        assert result.fault is None
        assert result.distance is not None
        assert result.distance < 1e-3

    led = net.lead(collected, round_weights(collected.receipts, checks, net.average, ROUND))
    assert led.done.outcome is not None
    assert led.done.outcome.faults == ()
    assert {reply.state_hash for reply in led.replies.values()} == {led.done.state_hash}
    assert set(led.signatures) == set(collected.receipts)
    assert led.done.state is not None
    torch.testing.assert_close(led.done.state.vector.double(), mean_state(net, net.miners), rtol=1e-5, atol=1e-6)

    ref = net.publish(led)
    assert ref.manifest.val_loss < net.world.base.manifest.val_loss
    assert ref.manifest.samples == 3 * 16
    scores = score(net, collected, checks, led)
    assert [one.score for one in scores.values()] == [1.0, 1.0, 1.0]
    assert net.average.weights() == pytest.approx(dict.fromkeys(collected.receipts, 1 / 3))


def test_who_comes_later_finds_the_epoch_by_its_anchor_and_loads_the_same_bits(net: Net, tmp_path: Path) -> None:
    collected = net.collect()
    led = net.lead(collected, round_weights(collected.receipts, {}, net.average, ROUND))
    ref = net.publish(led)
    anchor = Anchor(run_id=bytes.fromhex(net.world.parts.run_id), epoch=1, manifest=bytes.fromhex(ref.manifest_sha256))
    found = candidates(
        parse_anchors({VALIDATOR.hotkey: ChainCommitment(block=41, data=anchor.to_bytes())}),
        {VALIDATOR.hotkey},
        net.world.parts.run_id,
    )
    parts = net.world.parts

    def acceptable(manifest: Manifest) -> str | None:
        return why_unacceptable(
            manifest,
            run_id=parts.run_id,
            schema_hash=parts.schema_hash,
            quorum=parts.recipe.gates.quorum,
            registered=lambda hotkey: True,
            base_epoch=parts.recipe.adapter.base_epoch,
            why_no_publisher=lambda *_: None,
            verify=verify,
        )

    assert find_base(found, 50, net.world.store.resolve, acceptable) == ref
    during_the_round = find_base(found, 41, net.world.store.resolve, acceptable)
    assert during_the_round == net.world.base
    loaded = net.world.bench.load_state(ref, net.world.parts)
    assert state_hash(loaded) == led.done.state_hash == ref.manifest.state_hash


def test_a_state_that_the_hub_damaged_is_not_loaded(net: Net) -> None:
    collected = net.collect()
    ref = net.publish(net.lead(collected, round_weights(collected.receipts, {}, net.average, ROUND)))
    net.world.store.corrupt(ref, "moments.safetensors")
    with pytest.raises(IntegrityError, match=r"moments\.safetensors of epoch 1"):
        net.world.bench.load_state(ref, net.world.parts)


def test_a_cheat_is_left_out_of_the_mean_and_of_the_pay_and_the_others_go_on(net: Net) -> None:
    cheat = net.miners[1]
    copied = net.world.work(rank=0)
    cheat.contribution = net.world.contribution(cheat.identity, 1, work=copied)
    cheat.board.commit(cheat.contribution)
    collected = net.collect()
    checks = check_all(net, collected)
    found = checks[cheat.identity.hotkey]
    assert found is not None
    assert found.fault is Fault.WRONG_REPLAY

    led = net.lead(collected, round_weights(collected.receipts, checks, net.average, ROUND))
    assert cheat.identity.hotkey not in {member.hotkey for member in led.plan.members}
    honest = [net.miners[0], net.miners[2]]
    assert led.done.state is not None
    torch.testing.assert_close(led.done.state.vector.double(), mean_state(net, honest), rtol=1e-5, atol=1e-6)
    ref = net.publish(led)
    assert set(ref.manifest.signatures) == {miner.identity.hotkey for miner in honest}
    scores = score(net, collected, checks, led)
    assert {hotkey: one.score for hotkey, one in scores.items()} == {
        miner.identity.hotkey: 1.0 if miner in honest else 0.0 for miner in net.miners
    }
    assert net.average.cooldown_left(cheat.identity.hotkey, ROUND + 1) == 5


def test_a_plan_that_has_us_at_another_peer_is_no_crash(net: Net) -> None:
    collected = net.collect()
    plan = make_plan(
        parts=net.world.parts,
        round_number=ROUND,
        attempt=0,
        receipts=collected.receipts,
        weights=dict.fromkeys(collected.receipts, 1.0),
        sitting=[VALIDATOR.hotkey],
        anchors={**net.anchors, VALIDATOR.hotkey: Anchor(peer_id="peer-of-yesterday", maddrs=("/memory",))},
        duration_s=20.0,
    )
    assert plan is not None
    done = net.take_part(plan)
    assert (done.outcome, done.state) == (None, None)
    assert "peer-of-yesterday" in done.detail
    reply = make_reply(plan, done)
    assert (reply.accepted, reply.completed) == (True, False)


def test_a_genesis_of_another_run_is_not_opened(net: Net) -> None:
    with pytest.raises(IntegrityError, match="on chain is ffffffffffff"):
        net.world.bench.open("ff" * 32)


def test_an_epoch_0_without_a_recipe_is_not_opened(net: Net, tmp_path: Path) -> None:
    manifest = net.world.base.manifest
    files = {name: net.world.store.read(net.world.base, name) for name in manifest.files if name != "run.toml"}
    store = MemoryStore()
    store.publish(manifest.model_copy(update={"files": {name: manifest.files[name] for name in files}}), files)
    bench = Workbench(
        store=store,
        open_dataset=lambda repo, revision: net.world.dataset,
        cache=tmp_path / "other",
        device=torch.device("cpu"),
    )
    with pytest.raises(IntegrityError, match=r"holds no run\.toml"):
        bench.open(net.world.parts.run_id)


def test_an_empty_hub_is_not_opened(net: Net, tmp_path: Path) -> None:
    bench = Workbench(
        store=MemoryStore(),
        open_dataset=lambda repo, revision: net.world.dataset,
        cache=tmp_path / "other",
        device=torch.device("cpu"),
    )
    with pytest.raises(IntegrityError, match="the hub has no epoch 0"):
        bench.open(net.world.parts.run_id)
