"""Everything that a recipe fixes, opened on one device: what miner and validator have in common.

It reads recipe, tokenizer, index and base model from the run's genesis epoch, checks that they are the ones
whose hash is on chain, and then turns epochs into states and rounds into tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hivetrain import run
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.data.index import DatasetIndex, parse_index
from hivetrain.data.reader import RoundData, SegmentReader, load_heldout, load_round
from hivetrain.data.tokenizer import load_tokenizer, tokenizer_sha256
from hivetrain.errors import ConfigError, IntegrityError, SchemaMismatch
from hivetrain.hub.dataset import DatasetFiles
from hivetrain.hub.store import ModelStore
from hivetrain.manifest import Ref
from hivetrain.model.dora import attach_adapter
from hivetrain.model.load import WEIGHTS_NAME, base_sha256, load_base, read_weights
from hivetrain.model.vector import FlatVector, schema_hash
from hivetrain.model.weights import tensors_sha256
from hivetrain.run import Recipe, differing_fields, parse_recipe
from hivetrain.training.base import LiveBase
from hivetrain.training.evaluate import heldout_loss
from hivetrain.training.inner import InnerLoop
from hivetrain.training.state import MAX_HEADER_BYTES, State, load_state, state_hash
from hivetrain.verification.receipt import MAX_SNAPSHOT_BYTES, snapshot_size_bytes

logger = logging.getLogger(__name__)

RECIPE_NAME = "run.toml"
INDEX_NAME = "index.json"
TOKENIZER_PREFIX = "tokenizer/"
BASE_PREFIX = "base/"
BASE_WEIGHTS = BASE_PREFIX + WEIGHTS_NAME
DELTA, EXP_AVG, EXP_AVG_SQ = "delta", "exp_avg", "exp_avg_sq"
"""Sections of what the all-reduce carries: pseudo-gradient, then AdamW's two moments."""


def make_layout(num_params: int, averaging: run.Averaging) -> PayloadLayout:
    """Sections of what one member sends, for a vector of ``num_params`` elements; what has no codec has no section."""
    codecs = {
        DELTA: averaging.codec,
        EXP_AVG: averaging.moments_codec,
        EXP_AVG_SQ: averaging.second_moments_codec,
    }
    return PayloadLayout(
        [Section(name=name, num_elements=num_params, codec=codec) for name, codec in codecs.items() if codec != "none"]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What `Workbench.open` makes of a genesis epoch."""

    genesis: Ref
    recipe: Recipe
    run_id: str
    schema_hash: str
    tokenizer: PreTrainedTokenizerFast
    index: DatasetIndex
    model: nn.Module
    flat: FlatVector
    base: LiveBase
    layout: PayloadLayout
    loop: InnerLoop
    reader: SegmentReader
    heldout: Tensor


class Workbench:
    """A run, opened on one device. Owned by the model's thread.

    Args:
        store: where epochs are published.
        open_dataset: the data set's files for ``(repo, revision)``.
        cache: folder for downloaded files.
        device: where the model lives.
    """

    def __init__(
        self,
        *,
        store: ModelStore,
        open_dataset: Callable[[str, str], DatasetFiles],
        cache: Path,
        device: torch.device,
    ) -> None:
        self.store = store
        self.device = device
        self._open_dataset = open_dataset
        self._cache = cache

    def open(self, expected_run_id: str, pinned: Recipe | None = None) -> Parts:
        """Read and check the genesis epoch.

        Args:
            expected_run_id: the one on chain.
            pinned: the recipe that the operator agreed to, where one was given.

        Raises:
            IntegrityError: the hub's recipe, tokenizer and state are not those whose hash is on chain.
            SchemaMismatch: the model that this machine builds has another trainable vector than the run's.
            ServiceError: hub or data set cannot be read.
        """
        genesis = self.store.resolve(0)
        if genesis is None:
            raise IntegrityError("the hub has no epoch 0: run genesis, or check --hub.endpoint and --hub.repo")
        folder = self._cache / "genesis"
        for name in (RECIPE_NAME, INDEX_NAME):
            if name not in genesis.manifest.files:
                raise IntegrityError(f"the hub's epoch 0 holds no {name}: it is not the genesis of a run")
        self.store.fetch(genesis, genesis.manifest.files, folder)
        recipe = parse_recipe((folder / RECIPE_NAME).read_text())
        tokens_sha = tokenizer_sha256(folder / TOKENIZER_PREFIX)
        found = run.run_id(recipe, tokens_sha, genesis.manifest.state_hash)
        if found != expected_run_id:
            raise IntegrityError(
                f"the hub's recipe, tokenizer and genesis state hash to run {found[:12]}, on chain is "
                f"{expected_run_id[:12]}: the hub was tampered with, or --hub.repo is another run's"
            )
        if pinned is not None and (differing := differing_fields(pinned, recipe)):
            raise SchemaMismatch(f"the run's recipe is not the one of --neuron.recipe: {'; '.join(differing[:5])}")
        tokenizer = load_tokenizer(folder / TOKENIZER_PREFIX)
        index_sha256 = hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
        if recipe.data.index_sha256 and recipe.data.index_sha256 != index_sha256:
            raise IntegrityError(
                f"the hub's {INDEX_NAME} has sha256 {index_sha256}, the recipe says {recipe.data.index_sha256}"
            )
        index = parse_index((folder / INDEX_NAME).read_bytes())
        model = load_base(recipe.model, folder / BASE_PREFIX, len(tokenizer))
        base_hash = base_sha256(model)
        adapted = attach_adapter(model, recipe.adapter, recipe.model.seed).to(self.device)
        flat = FlatVector(adapted)
        schema = schema_hash(flat.entries, recipe)
        if snapshot_size_bytes(flat.size) > MAX_SNAPSHOT_BYTES:
            raise ConfigError(
                f"a snapshot of {flat.size} trainable parameters takes {snapshot_size_bytes(flat.size)} bytes, the "
                f"limit is {MAX_SNAPSHOT_BYTES}: train fewer, such as with adapter.train_embeddings = false"
            )
        if schema != genesis.manifest.schema_hash:
            load_state(_state_paths(genesis, folder), flat, base_hash)  # names the parameter that differs
            raise SchemaMismatch(
                f"this machine builds a trainable vector of {flat.size} elements with schema {schema[:12]}, the run's "
                f"is {genesis.manifest.schema_hash[:12]}: check the versions of peft and transformers"
            )
        reader = SegmentReader(self._open_dataset(index.repo, index.revision), recipe.data.text_column)
        return Parts(
            genesis=genesis,
            recipe=recipe,
            run_id=found,
            schema_hash=schema,
            tokenizer=tokenizer,
            index=index,
            model=adapted,
            flat=flat,
            base=LiveBase(adapted, flat, recipe, base_hash),
            layout=make_layout(flat.size, recipe.averaging),
            loop=InnerLoop(adapted, flat, recipe, self.device),
            reader=reader,
            heldout=load_heldout(reader, index, tokenizer, recipe.data),
        )

    def load_state(self, ref: Ref, parts: Parts) -> State:
        """Download, verify and parse the state of ``ref``, with its base where that is not under the model.

        Raises:
            IntegrityError: its hash is not the manifest's.
            ServiceError: the hub cannot be read.
        """
        folder = self._cache / f"epoch-{ref.epoch}-{ref.manifest_sha256[:12]}"
        try:
            base = self._load_base(parts, parts.recipe.adapter.base_epoch(ref.epoch), folder)
            expected = parts.base.sha256 if base is None else tensors_sha256(base)
            paths = self.store.fetch(ref, _state_paths(ref, folder), folder)
            state = load_state(paths, parts.flat, expected)
        except SchemaMismatch as exc:  # its publisher's doing, not a setting of ours
            raise IntegrityError(f"epoch {ref.epoch} does not hold this run's state: {exc}") from exc
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = state_hash(state)
        if found != ref.manifest.state_hash:
            raise IntegrityError(
                f"epoch {ref.epoch} holds state {found[:12]}, its manifest says {ref.manifest.state_hash[:12]}"
            )
        return dataclasses.replace(state, base=base)

    def _load_base(self, parts: Parts, epoch: int, folder: Path) -> dict[str, Tensor] | None:
        """The base that epoch ``epoch`` published; None where it is under the model already.

        Its hash is in every state that belongs to it, which members signed: the caller checks that.
        """
        if epoch == parts.base.epoch:
            return None
        name = BASE_WEIGHTS
        ref = self.store.resolve(epoch)
        if ref is None or name not in ref.manifest.files:
            raise IntegrityError(f"epoch {epoch} should hold the base in {name} and does not")
        size, limit = ref.manifest.files[name].size_bytes, parts.base.size_bytes() + MAX_HEADER_BYTES
        if size > limit:
            raise IntegrityError(f"{name} of epoch {epoch} is {size} bytes, the limit is {limit}")
        tensors = read_weights(self.store.fetch(ref, [name], folder)[name])
        parts.base.check(tensors)
        return tensors

    def round_data(self, parts: Parts, round_number: int, rank: int) -> RoundData:
        """The tokens of one miner's round; the same for everyone who asks."""
        return load_round(
            parts.reader,
            parts.index,
            parts.tokenizer,
            run_id=parts.run_id,
            round_number=round_number,
            rank=rank,
            data=parts.recipe.data,
        )

    def heldout_loss(self, parts: Parts, state: State) -> float:
        """Held-out loss of ``state`` on its own base, nats per token."""
        with parts.base.holding(state):
            return heldout_loss(parts.model, parts.flat, state.vector, parts.heldout, self.device)


def _state_paths(ref: Ref, folder: Path) -> dict[str, Path]:
    """The state's files among those of ``ref``, as they lie in ``folder``."""
    return {name: folder / name for name in ref.manifest.files if name.endswith(".safetensors") and "/" not in name}


__all__ = ["Parts", "Workbench", "make_layout"]
