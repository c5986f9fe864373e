"""Epochs whose adapter is merged: signed by everyone, published with their base, and loaded by whoever comes later."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from hivetrain.errors import IntegrityError
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest, Ref
from hivetrain.model.load import load_base
from hivetrain.scoring import MovingAverage
from hivetrain.training.state import State, state_hash
from hivetrain.workbench import BASE_PREFIX, BASE_WEIGHTS, Parts, Workbench
from template.acceptance import why_unacceptable
from template.chain.keys import verify
from template.validator.publish import file_entries, sign_manifest
from template.validator.reward import round_weights
from tests.integration.test_round import NAMES, Miner, Net
from tests.round_kit import RECIPE, ROUND, VALIDATOR, World, identity, make_world, memory_transports, open_wire

MERGING = dataclasses.replace(RECIPE, adapter=dataclasses.replace(RECIPE.adapter, kind="dora_linear", merge_every=1))


@pytest.fixture(scope="module")
def epoch(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, State, Ref]:
    """One round of three miners at whose end a merge is due; what the leader holds, and what it published."""
    world = make_world(tmp_path_factory.mktemp("merging"), MERGING)
    with (
        open_wire() as wire,
        memory_transports(wire.network, [*(f"peer-{n}" for n in NAMES), "peer-leader"]) as streams,
    ):
        miners = []
        for rank, name in enumerate(NAMES):
            contribution = world.contribution(identity(name), rank)
            board = world.board(contribution)
            handlers = world.handlers(identity(name), board)
            info = wire.serve(name, handlers.train, handlers)
            miners.append(
                Miner(identity=identity(name), board=board, handlers=handlers, contribution=contribution, info=info)
            )
        average = MovingAverage(tmp_path_factory.mktemp("averages") / "a.json", MERGING.scoring)
        net = Net(world=world, wire=wire, miners=miners, transports=streams, average=average)
        collected = net.collect()
        led = net.lead(collected, round_weights(collected.receipts, {}, average, ROUND))
        assert set(led.signatures) == set(collected.receipts)  # all of them computed the same base
        ref = net.publish(led)
    assert led.done.state is not None
    return world, led.done.state, ref


@pytest.fixture
def newcomer(epoch: tuple[World, State, Ref], tmp_path: Path) -> tuple[Workbench, Parts]:
    """Somebody else, who opens the run with a model of its own."""
    world = epoch[0]
    bench = Workbench(
        store=world.store,
        open_dataset=lambda repo, revision: world.dataset,
        cache=tmp_path,
        device=torch.device("cpu"),
    )
    return bench, bench.open(world.parts.run_id)


def why(world: World, manifest: Manifest) -> str | None:
    return why_unacceptable(
        manifest,
        run_id=world.parts.run_id,
        schema_hash=world.parts.schema_hash,
        quorum=world.parts.recipe.gates.quorum,
        registered=lambda hotkey: True,
        base_epoch=world.parts.recipe.adapter.base_epoch,
        why_no_publisher=lambda *_: None,
        verify=verify,
    )


def test_a_merged_epoch_holds_its_base_and_is_accepted(epoch: tuple[World, State, Ref]) -> None:
    world, _, ref = epoch
    assert ref.manifest.base_epoch == 1
    assert {BASE_PREFIX + "config.json", BASE_WEIGHTS} < set(ref.manifest.files)
    assert why(world, ref.manifest) is None
    assert ref.manifest.val_loss < world.base.manifest.val_loss


def test_publishing_leaves_the_leaders_model_on_the_old_base(epoch: tuple[World, State, Ref]) -> None:
    world, merged, _ = epoch
    assert (world.parts.base.sha256, world.parts.base.epoch) == (world.state.base_sha256, 0)
    assert merged.base_sha256 != world.state.base_sha256


def test_a_newcomer_loads_the_merged_base_and_gets_the_published_loss(
    epoch: tuple[World, State, Ref], newcomer: tuple[Workbench, Parts]
) -> None:
    _, merged, ref = epoch
    bench, parts = newcomer
    state = bench.load_state(ref, parts)
    assert state_hash(state) == state_hash(merged) == ref.manifest.state_hash
    held = parts.base.adopt_(state)
    assert parts.base.sha256 == merged.base_sha256
    assert bench.heldout_loss(parts, held) == pytest.approx(ref.manifest.val_loss, rel=1e-5)


def test_who_computed_the_merge_and_who_downloaded_it_train_alike(
    epoch: tuple[World, State, Ref], newcomer: tuple[Workbench, Parts], tmp_path: Path
) -> None:
    world, merged, ref = epoch
    bench, parts = newcomer
    downloaded = parts.base.adopt_(bench.load_state(ref, parts))
    batch = bench.round_data(parts, ROUND, 0).batch
    theirs = parts.loop.run(downloaded, batch, num_steps=4)
    with world.parts.base.holding(merged):
        ours = world.parts.loop.run(merged, batch, num_steps=4)
    assert torch.equal(ours.vector, theirs.vector)


def test_the_way_back_to_an_older_base_is_a_download(
    epoch: tuple[World, State, Ref], newcomer: tuple[Workbench, Parts]
) -> None:
    world, _, ref = epoch
    bench, parts = newcomer
    parts.base.adopt_(bench.load_state(ref, parts))
    back = parts.base.adopt_(bench.load_state(world.base, parts))
    assert (parts.base.sha256, parts.base.epoch) == (world.state.base_sha256, 0)
    assert bench.heldout_loss(parts, back) == pytest.approx(world.base.manifest.val_loss, rel=1e-5)


def test_the_merged_base_alone_is_a_model(epoch: tuple[World, State, Ref], tmp_path: Path) -> None:
    """Its weights are the trained model's: nobody needs the adapter to use it."""
    world, _, ref = epoch
    world.store.fetch(ref, [BASE_PREFIX + "config.json", BASE_WEIGHTS], tmp_path)
    model = load_base(MERGING.model, tmp_path / BASE_PREFIX, MERGING.model.vocab_size).eval()
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss for ids in world.parts.heldout]
    assert torch.stack(losses).mean().item() == pytest.approx(ref.manifest.val_loss, rel=1e-5)


# Refusals


def test_another_base_than_the_recipes_is_refused(epoch: tuple[World, State, Ref]) -> None:
    world, _, ref = epoch
    other = sign_manifest(ref.manifest.model_copy(update={"base_epoch": 0}), VALIDATOR)
    assert why(world, other) == "names epoch 0 for its base, by the recipe that is epoch 1"


def test_a_merged_epoch_without_its_base_is_refused(epoch: tuple[World, State, Ref]) -> None:
    world, _, ref = epoch
    files = {name: entry for name, entry in ref.manifest.files.items() if name != BASE_WEIGHTS}
    other = sign_manifest(ref.manifest.model_copy(update={"files": files}), VALIDATOR)
    assert why(world, other) == f"its adapter was merged, and it holds no {BASE_WEIGHTS}"


def with_base(world: World, ref: Ref, base: bytes) -> tuple[MemoryStore, Ref]:
    """The epoch, published by a leader that puts other bytes where the base should be."""
    store = MemoryStore()
    store.publish(world.base.manifest, {name: world.store.read(world.base, name) for name in world.base.manifest.files})
    files = {name: world.store.read(ref, name) for name in ref.manifest.files} | {BASE_WEIGHTS: base}
    manifest = ref.manifest.model_copy(update={"files": file_entries(files)})
    return store, store.publish(sign_manifest(manifest, VALIDATOR), files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1e-3}, "belongs to base"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.zeros(31)}, r"must be torch\.float32 \[32\]"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.zeros(60_000_000 // 4)}, "the limit is"),
        (None, "is not safetensors"),
    ],
    ids=["other values", "other shape", "too large", "no safetensors"],
)
def test_a_base_that_the_members_did_not_sign_is_refused(
    epoch: tuple[World, State, Ref],
    newcomer: tuple[Workbench, Parts],
    tmp_path: Path,
    change: object,
    message: str,
) -> None:
    world, _, ref = epoch
    _, parts = newcomer
    right = load(world.store.read(ref, BASE_WEIGHTS))
    store, lying = with_base(world, ref, save(change(right)) if callable(change) else b"no tensors here")
    bench = Workbench(
        store=store, open_dataset=lambda repo, revision: world.dataset, cache=tmp_path, device=torch.device("cpu")
    )
    with pytest.raises(IntegrityError, match=message):
        bench.load_state(lying, parts)
    assert parts.base.epoch == 0


def test_a_merge_whose_tag_is_gone_is_refused(
    epoch: tuple[World, State, Ref], newcomer: tuple[Workbench, Parts], tmp_path: Path
) -> None:
    world, _, ref = epoch
    _, parts = newcomer
    empty = MemoryStore()
    bench = Workbench(
        store=empty, open_dataset=lambda repo, revision: world.dataset, cache=tmp_path, device=torch.device("cpu")
    )
    with pytest.raises(IntegrityError, match=r"epoch 1 should hold the base in base/model\.safetensors"):
        bench.load_state(ref, parts)
