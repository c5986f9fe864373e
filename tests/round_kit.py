"""A tiny run with everything that a round needs: corpus, genesis in memory, miners that answer on real sockets.

A world takes about two seconds to make, so a module shares one. Its keys are sr25519 development keys, because the wire
takes no others; the model has 17 thousand parameters and a round of eight inner steps takes some milliseconds each.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hivetrain.averaging.memory import MemoryHub, MemoryTransport
from hivetrain.contribution import Contribution, build_contribution
from hivetrain.data.index import build_index
from hivetrain.data.reader import SegmentReader, load_heldout
from hivetrain.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_sha256, train_tokenizer
from hivetrain.hub.dataset import LocalDataset
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest, Ref
from hivetrain.model.assemble import assemble
from hivetrain.model.load import base_files, load_base
from hivetrain.model.vector import schema_hash
from hivetrain.run import Adapter, Data, Inner, Model, Recipe, Scoring, run_id
from hivetrain.training.evaluate import heldout_loss
from hivetrain.training.inner import Batches, RoundWork
from hivetrain.training.state import State, genesis_state, state_files, state_hash
from hivetrain.verification.receipt import Expected, Receipt
from hivetrain.workbench import BASE_PREFIX, INDEX_NAME, RECIPE_NAME, TOKENIZER_PREFIX, Parts, Workbench
from template.access import AccessPolicy, NeuronFacts
from template.axon import Axon, AxonSettings, Caller
from template.board import Board
from template.chain.client import NeuronInfo
from template.chain.keys import WalletIdentity, verify
from template.dendrite import Dendrite, PeerAddress
from template.handlers import Handlers
from template.network import NetworkThread
from template.participant import make_reply, take_part
from template.protocol import AllReduce, Train, TrainReply
from template.validator.publish import file_entries, sign_manifest
from template.validator.verify import Draw, Verifier
from tests.chain_fixture import dev_wallet

ROUND = 3
COINS = b"\x07" * 32
COINS_DIGEST = hashlib.sha256(COINS).digest()
NUM_SNAPSHOTS = 2
WHOLE = tuple(range(NUM_SNAPSHOTS))

RECIPE = Recipe(
    name="tiny",
    model=Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=300),
    adapter=Adapter(rank=4),
    data=Data(
        repo="test/corpus",
        revision="pinned",
        seq_len=16,
        batch_size=2,
        row_groups_per_miner=1,
        max_miners=4,
        heldout_row_groups=1,
        heldout_batches=2,
    ),
    inner=Inner(max_steps=8, snapshot_every=4, warmup_steps=2, total_steps=80),
    scoring=Scoring(check_share=1.0, whole_round_share=1.0),
)

TrainHandler = Callable[[Train, Caller], Awaitable[TrainReply]]


def identity(name: str) -> WalletIdentity:
    """The sr25519 development identity of that name."""
    return WalletIdentity(dev_wallet(name))


VALIDATOR = identity("validator")


@dataclass(kw_only=True, eq=False)
class World:
    """A genesis in memory, and the parts that a miner and a validator make of it."""

    dataset: LocalDataset
    store: MemoryStore
    bench: Workbench
    parts: Parts
    base: Ref
    state: State

    def fork(self, folder: Path) -> World:
        """The same run in a store of its own."""
        store = MemoryStore()
        store.publish(self.base.manifest, {name: self.store.read(self.base, name) for name in self.base.manifest.files})
        bench = Workbench(
            store=store,
            open_dataset=lambda repo, revision: self.dataset,
            cache=folder,
            device=torch.device("cpu"),
        )
        return dataclasses.replace(self, store=store, bench=bench)

    def work(
        self,
        rank: int = 0,
        *,
        num_steps: int = RECIPE.inner.max_steps,
        state: State | None = None,
        batches: Batches | None = None,
    ) -> RoundWork:
        """What a miner makes of its assignment."""
        data = self.bench.round_data(self.parts, ROUND, rank)
        return self.parts.loop.run(state or self.state, batches or data.batch, num_steps=num_steps)

    def contribution(
        self, miner: WalletIdentity, rank: int = 0, *, work: RoundWork | None = None, start: State | None = None
    ) -> Contribution:
        """What ``miner`` hands in."""
        return build_contribution(
            parts=self.parts,
            base=self.base,
            start=start or self.state,
            work=work or self.work(rank),
            data=self.bench.round_data(self.parts, ROUND, rank),
            round_number=ROUND,
            rank=rank,
            identity=miner,
        )

    def expected(self, rank: int = 0) -> Expected:
        """What an honest receipt of that rank says."""
        data, inner = self.parts.recipe.data, self.parts.recipe.inner
        return Expected(
            run_id=self.parts.run_id,
            round=ROUND,
            epoch=0,
            base_manifest=self.base.manifest_sha256,
            base_state=self.base.manifest.state_hash,
            schema_hash=self.parts.schema_hash,
            layout_hash=self.parts.layout.layout_hash,
            num_chunks=self.parts.layout.num_chunks,
            rank=rank,
            max_steps=inner.max_steps,
            snapshot_every=inner.snapshot_every,
            samples_per_step=data.batch_size,
            tokens_per_step=data.batch_size * data.seq_len,
        )

    def board(self, contribution: Contribution | None = None) -> Board:
        """A model thread's board in this round."""
        board = Board()
        board.begin_round(ROUND, 0, self.base.manifest_sha256)
        if contribution is not None:
            board.update(state="committed")
            board.commit(contribution)
        return board

    def handlers(
        self,
        miner: WalletIdentity,
        board: Board,
        why_not_leader: Callable[[str, int, int, str], str | None] = lambda *_: None,
        role: str = "miner",
    ) -> Handlers:
        """The real handlers of one neuron."""
        return Handlers(
            role=role,
            run_id=self.parts.run_id,
            identity=miner,
            board=board,
            layout=self.parts.layout,
            averaging=self.parts.recipe.averaging,
            why_not_leader=why_not_leader,
        )

    def verifier(self, wire: Wire, **changes: object) -> Verifier:
        """A validator's checks of this round."""
        honest = Verifier(
            parts=self.parts,
            base=self.base,
            state=self.state,
            round_number=ROUND,
            coins=COINS,
            dendrite=wire.dendrite,
            network=wire.network,
            load_data=lambda rank: self.bench.round_data(self.parts, ROUND, rank),
            address=wire.address,
            in_time=lambda: True,
        )
        return dataclasses.replace(honest, **changes)  # type: ignore[arg-type]


_shared: list[World] = []


def ask(handlers: Handlers, world: World, who: object = VALIDATOR, **fields: object) -> TrainReply:
    """What ``who`` is answered to a Train of this round."""
    synapse = Train.model_validate({"run_id": world.parts.run_id, "round": ROUND, **fields})
    return asyncio.run(handlers.train(synapse, caller(who)))  # type: ignore[arg-type]


def shared_world(folders: pytest.TempPathFactory) -> World:
    """One world for all modules of a session. Publish into a `World.fork`, never into it."""
    if not _shared:
        _shared.append(make_world(folders.mktemp("world")))
    return _shared[0]


def make_world(folder: Path, recipe: Recipe = RECIPE) -> World:
    """Write a corpus, publish a genesis into memory, and open it as a neuron does."""
    torch.set_num_threads(1)
    write_corpus(folder / "corpus" / "part.parquet")
    dataset = LocalDataset(folder / "corpus")
    store, base = publish_genesis(folder, dataset, recipe)
    bench = Workbench(
        store=store,
        open_dataset=lambda repo, revision: dataset,
        cache=folder / "cache",
        device=torch.device("cpu"),
    )
    parts = bench.open(base.manifest.run_id)
    return World(dataset=dataset, store=store, bench=bench, parts=parts, base=base, state=bench.load_state(base, parts))


def write_corpus(path: Path, num_row_groups: int = 13) -> None:
    """Sentences of made-up words: enough in a row group for more steps than a round has."""
    generator = random.Random(5)
    words = ["".join(generator.choices("abcdeilnorstu", k=generator.randint(2, 7))) for _ in range(150)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for _ in range(num_row_groups):
            texts = [" ".join(generator.choices(words, k=60)) for _ in range(5)]
            writer.write_table(pa.table({"text": texts}))


def publish_genesis(folder: Path, dataset: LocalDataset, recipe: Recipe) -> tuple[MemoryStore, Ref]:
    """Epoch 0, as `neurons.genesis` publishes it."""
    data = recipe.data
    index = build_index(dataset, data.repo, data.revision, data.config, data.heldout_row_groups)
    reader = SegmentReader(dataset, data.text_column)
    texts = [text for group in index.train for text in reader.read(group)]
    tokenizer_files = save_tokenizer(train_tokenizer(texts, recipe.model.vocab_size), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    made = assemble(recipe, None, len(tokenizer), "cpu")
    state = genesis_state(made.flat, made.base_sha256)
    files = state_files(state, made.flat)
    base = base_files(load_base(recipe.model, None, len(tokenizer)))
    files |= {BASE_PREFIX + name: content for name, content in base.items()}
    files |= {TOKENIZER_PREFIX + name: content for name, content in tokenizer_files.items()}
    files |= {RECIPE_NAME: recipe.to_toml().encode(), INDEX_NAME: index.to_json()}
    heldout = load_heldout(reader, index, tokenizer, data)
    manifest = Manifest(
        run_id=run_id(recipe, tokenizer_sha256(folder / "tokenizer"), state_hash(state)),
        epoch=0,
        round=-1,
        parent="",
        schema_hash=schema_hash(made.flat.entries, recipe),
        state_hash=state_hash(state),
        files=file_entries(files),
        val_loss=heldout_loss(made.module, made.flat, state.vector, heldout, "cpu"),
        block=0,
        nonce="genesis-" + "0" * 8,
        leader=VALIDATOR.hotkey,
    )
    store = MemoryStore()
    return store, store.publish(sign_manifest(manifest, VALIDATOR), files)


@dataclass(kw_only=True, eq=False)
class Wire:
    """A network thread, the validator's dendrite, and the axons that were opened on it."""

    network: NetworkThread
    dendrite: Dendrite
    axons: dict[str, Axon] = field(default_factory=dict)

    def serve(self, name: str, train: TrainHandler, handlers: Handlers | None = None) -> NeuronInfo:
        """Open an axon for the development key ``name``; what the chain would say of it."""
        axon = Axon(dev_wallet(name).hotkey, POLICY, host="127.0.0.1", port=0, settings=AxonSettings(close_grace_s=0.1))
        axon.attach(Train, train)
        if handlers is not None:
            axon.attach(AllReduce, handlers.all_reduce, timeout_s=60.0)
        self.network.run(axon.start(), 10)
        self.axons[axon.hotkey] = axon
        return neuron_info(axon.hotkey, axon.port)

    def close_axon(self, hotkey: str) -> None:
        """As if that neuron's process had ended."""
        self.network.run(self.axons.pop(hotkey).close(), 10)

    def address(self, hotkey: str) -> PeerAddress:
        """Where that hotkey serves."""
        return PeerAddress(hotkey=hotkey, ip="127.0.0.1", port=self.axons[hotkey].port)


POLICY = AccessPolicy(
    registry={VALIDATOR.hotkey: NeuronFacts(uid=0, stake=1000.0, validator_permit=True)}.get,
)


class Place:
    """A miner's axon whose answers a test replaces."""

    def __init__(self, wire: Wire, name: str) -> None:
        self.train: TrainHandler = self._unset
        self.info = wire.serve(name, self._answer)

    async def _answer(self, synapse: Train, caller: Caller) -> TrainReply:
        return await self.train(synapse, caller)

    async def _unset(self, synapse: Train, caller: Caller) -> TrainReply:
        raise AssertionError("no answer was set for this test")


@contextmanager
def open_wire() -> Iterator[Wire]:
    """A `Wire`; everything on it is closed at the end."""
    network = NetworkThread()
    network.start()
    wire = Wire(network=network, dendrite=Dendrite(dev_wallet("validator").hotkey))
    try:
        network.run(wire.dendrite.start(), 10)
        yield wire
    finally:
        for hotkey in list(wire.axons):
            wire.close_axon(hotkey)
        network.run(wire.dendrite.close(), 10)
        network.close()


def neuron_info(hotkey: str, port: int, uid: int = 1) -> NeuronInfo:
    """A registered miner that serves on loopback."""
    return NeuronInfo(
        uid=uid,
        hotkey=hotkey,
        coldkey=hotkey,
        stake=0.0,
        validator_permit=False,
        ip="127.0.0.1",
        port=port,
        incentive=0.0,
        dividends=0.0,
        emission=0.0,
        last_update=0,
        registered_at=0,
        active=True,
    )


def caller(who: WalletIdentity = VALIDATOR) -> Caller:
    """A verified request's sender."""
    return Caller(hotkey=who.hotkey, host="127.0.0.1", uid=0, stake=1000.0, validator_permit=True)


def whole_round(receipts: Sequence[Receipt]) -> dict[str, Draw]:
    """Every miner drawn, with all of its windows."""
    return {
        receipt.hotkey: Draw(hotkey=receipt.hotkey, windows=tuple(range(receipt.num_snapshots))) for receipt in receipts
    }


@contextmanager
def model_thread(
    world: World, me: WalletIdentity, board: Board, network: NetworkThread, transport: MemoryTransport
) -> Iterator[None]:
    """A thread that serves one neuron's mailbox until the block ends, as `Neuron.drain_mailbox` does."""
    stop = threading.Event()

    def main() -> None:
        while not stop.wait(0.01):
            while not board.mailbox.empty():
                task = board.mailbox.get()
                contribution = board.contribution
                done = take_part(
                    task.plan,
                    parts=world.parts,
                    state=world.state,
                    payload=contribution.payload if contribution is not None else None,
                    identity=me,
                    verify=verify,
                    network=network,
                    transport=transport,
                )
                task.reply.set_result(make_reply(task.plan, done))
                board.record_outcome(task.reply.result())

    thread = threading.Thread(target=main, name=f"model-{me.hotkey[:6]}")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


@contextmanager
def memory_transports(network: NetworkThread, peer_ids: Sequence[str]) -> Iterator[dict[str, MemoryTransport]]:
    """Started transports of one hub, on the network thread's loop."""
    hub = MemoryHub()
    with ExitStack() as stack:
        transports = {peer_id: hub.transport(peer_id) for peer_id in peer_ids}
        for transport in transports.values():
            network.run(transport.start(), 5)
            stack.callback(lambda one=transport: network.run(one.close(), 5))  # type: ignore[misc]
        yield transports
