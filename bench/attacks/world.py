"""A tiny run in memory: corpus, genesis, keys, and the parts that every node makes of it.

Production code from the hub's files on; only the sockets are missing. The model has some ten thousand parameters, so
that a round of twenty inner steps takes a tenth of a second.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from bench.inmemory import Key
from hivetrain.contribution import expected_receipt
from hivetrain.data.index import build_index
from hivetrain.data.reader import RoundData, SegmentReader, load_heldout
from hivetrain.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_sha256, train_tokenizer
from hivetrain.hub.dataset import LocalDataset
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest, Ref
from hivetrain.model.assemble import assemble
from hivetrain.model.load import base_files, load_base
from hivetrain.model.vector import schema_hash
from hivetrain.run import Adapter, Data, Inner, Model, Recipe, run_id
from hivetrain.training.evaluate import heldout_loss
from hivetrain.training.state import State, genesis_state, state_files, state_hash
from hivetrain.verification.receipt import Expected
from hivetrain.workbench import BASE_PREFIX, INDEX_NAME, RECIPE_NAME, TOKENIZER_PREFIX, Parts, Workbench
from template.validator.publish import file_entries, sign_manifest

VALIDATOR = Key(1)

TINY = Recipe(
    name="attacks",
    model=Model(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=300),
    adapter=Adapter(rank=4),
    data=Data(
        repo="bench/attacks",
        revision="pinned",
        seq_len=16,
        batch_size=2,
        row_groups_per_miner=1,
        max_miners=16,
        heldout_row_groups=1,
        heldout_batches=16,
    ),
    inner=Inner(max_steps=20, snapshot_every=4, warmup_steps=40, total_steps=400),
)
"""Five windows in a round, as in the embedded default; everything about checks and scores is the default."""


def tiny(num_rounds: int) -> Recipe:
    """`TINY` whose rate falls over so many rounds."""
    inner = dataclasses.replace(TINY.inner, total_steps=num_rounds * TINY.inner.max_steps)
    return dataclasses.replace(TINY, inner=inner)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """A run.

    Attributes:
        load_data: ``(round, rank)`` to the tokens assigned there.
    """

    store: MemoryStore
    bench: Workbench
    parts: Parts
    genesis: Ref
    state: State
    load_data: Callable[[int, int], RoundData]

    def expected(self, base: Ref, round_number: int, rank: int, hotkey: str) -> Expected:
        """What an honest receipt says."""
        return expected_receipt(self.parts, base, round_number, hotkey, rank)


def make_world(folder: Path, recipe: Recipe = TINY, *, num_texts: int = 5) -> World:
    """Write a corpus, publish a genesis into memory, and open it as a neuron does."""
    write_corpus(folder / "corpus" / "part.parquet", num_texts=num_texts)
    dataset = LocalDataset(folder / "corpus")
    store = MemoryStore()
    files, manifest = make_genesis(folder, dataset, recipe)
    genesis = store.publish(manifest, files)
    bench = Workbench(
        store=store,
        open_dataset=lambda repo, revision: dataset,
        cache=folder / "cache",
        device=torch.device("cpu"),
    )
    parts = bench.open(genesis.manifest.run_id)
    load = lru_cache(maxsize=4096)(lambda number, rank: bench.round_data(parts, number, rank))
    state = bench.load_state(genesis, parts)
    return World(store=store, bench=bench, parts=parts, genesis=genesis, state=state, load_data=load)


def write_corpus(path: Path, num_row_groups: int = 80, num_texts: int = 5) -> None:
    """Sentences over a few made-up words that tend to follow each other; so many of them in each row group."""
    generator = random.Random(5)
    words = ["".join(generator.choices("abcdeilnorstu", k=generator.randint(2, 7))) for _ in range(150)]
    follows = {word: generator.choices(words, k=4) for word in words}
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for _ in range(num_row_groups):
            texts = []
            for _ in range(num_texts):
                said = [generator.choice(words)]
                while len(said) < 70:
                    said.append(generator.choice(follows[said[-1]] if generator.random() < 0.8 else words))
                texts.append(" ".join(said))
            writer.write_table(pa.table({"text": texts}))


def make_genesis(folder: Path, dataset: LocalDataset, recipe: Recipe) -> tuple[dict[str, bytes], Manifest]:
    """Files and manifest of epoch 0, as `neurons.genesis` publishes them."""
    data = recipe.data
    index = build_index(dataset, data.repo, data.revision, data.config, data.heldout_row_groups)
    reader = SegmentReader(dataset, data.text_column)
    texts = [text for group in index.train for text in reader.read(group)]
    tokenizer_files = save_tokenizer(train_tokenizer(texts, recipe.model.vocab_size), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    made = assemble(recipe, None, len(tokenizer), "cpu")
    state = genesis_state(made.flat, made.base_sha256)
    files: dict[str, bytes] = dict(state_files(state, made.flat))
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
    return files, sign_manifest(manifest, VALIDATOR)
