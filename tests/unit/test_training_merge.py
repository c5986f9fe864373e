"""Merges: the model stays what it was, the adapter starts afresh, and every member gets the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from hivetrain.errors import IntegrityError
from hivetrain.model import Assembled, adapted_layers, assemble, base_tensors, tensors_sha256
from hivetrain.run import Adapter, Data, Inner, Model, Outer, Recipe
from hivetrain.training import InnerLoop, LiveBase, State, genesis_state, heldout_loss, learning_rate, merge_into_base
from hivetrain.training.state import load_state, state_files, state_hash

Kind = Literal["dora", "dora_linear", "lora"]
KINDS: tuple[Kind, ...] = ("dora", "dora_linear", "lora")
MERGE_EVERY = 2


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(kind: Kind) -> Recipe:
    return Recipe(
        model=Model(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, vocab_size=128),
        adapter=Adapter(kind=kind, merge_every=MERGE_EVERY),
        data=Data(seq_len=16, batch_size=4),
        inner=Inner(max_steps=10, lr=1e-2, warmup_steps=2, total_steps=60, rewarm_steps=4),
        outer=Outer(kind="nesterov", momentum=0.5),
    )


def tokens(step: int) -> Tensor:
    place = torch.arange(4 * 16).view(1, 4, 16)
    return (31 * step + (place // 16) * 17 + (place % 16) * (1 + step % 3)) % 128


HELDOUT = torch.cat([tokens(step) for step in range(50, 54)])


def trained(kind: Kind) -> tuple[Assembled, LiveBase, State]:
    """A model, its base, and a state at the epoch at which a merge is due."""
    recipe = recipe_of(kind)
    model = assemble(recipe, None, 128, "cpu")
    genesis = genesis_state(model.flat, model.base_sha256)
    work = InnerLoop(model.module, model.flat, recipe, "cpu").run(genesis, tokens, num_steps=20)
    state = dataclasses.replace(
        genesis,
        epoch=MERGE_EVERY,
        step=20,
        vector=work.vector,
        exp_avg=work.exp_avg,
        exp_avg_sq=work.exp_avg_sq,
        outer_momentum=work.vector - genesis.vector,
    )
    return model, LiveBase(model.module, model.flat, recipe, model.base_sha256), state


def loss_of(model: Assembled, state: State) -> float:
    return heldout_loss(model.module, model.flat, state.vector, HELDOUT, "cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_answers_as_before(kind: Kind) -> None:
    model, base, state = trained(kind)
    model.flat.load_(state.vector)
    before, loss_before = model.module(input_ids=HELDOUT[0]).logits, loss_of(model, state)
    merged = base.adopt_(base.advance(state))
    model.flat.load_(merged.vector)
    after = model.module(input_ids=HELDOUT[0]).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert loss_of(model, merged) == pytest.approx(loss_before, abs=1e-5)
    assert not torch.equal(merged.vector, state.vector)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_afresh_and_everything_else_goes_on(kind: Kind) -> None:
    model, base, state = trained(kind)
    merged = base.advance(state)
    adapters = {name for layer in adapted_layers(model.module) for name in layer.trained_names()}
    for field in ("exp_avg", "exp_avg_sq", "outer_momentum"):
        before, after = (model.flat.to_named(getattr(one, field)) for one in (state, merged))
        for name, tensor in after.items():
            expected = torch.zeros_like(tensor) if name in adapters else before[name]
            assert torch.equal(tensor, expected), (field, name)
    before, after = model.flat.to_named(state.vector), model.flat.to_named(merged.vector)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in adapters)
    assert all(after[layer.b_name].abs().sum() == 0 for layer in adapted_layers(model.module))
    assert (merged.epoch, merged.step) == (state.epoch, state.step)


def test_the_merged_base_is_the_whole_model() -> None:
    """Trained embeddings and norms are in it: who has no adapter code at all can still use it."""
    model, base, state = trained("dora")
    merged = base.advance(state)
    assert merged.base is not None
    assert set(merged.base) == set(base_tensors(model.module))
    named = model.flat.to_named(state.vector)
    assert torch.equal(merged.base["model.embed_tokens.weight"], named["model.embed_tokens.weight"])
    assert tensors_sha256(merged.base) == merged.base_sha256 != state.base_sha256


@pytest.mark.parametrize("kind", KINDS)
def test_two_members_merge_to_the_same_bits_and_sign_the_base_with_them(kind: Kind) -> None:
    first, second = (base.advance(state) for _, base, state in (trained(kind), trained(kind)))
    assert state_hash(first) == state_hash(second)
    other = dataclasses.replace(first, base_sha256="0" * 64)
    assert state_hash(other) != state_hash(first)


def test_a_merge_writes_to_nothing_that_it_is_given() -> None:
    model, _, state = trained("dora")
    live = base_tensors(model.module)
    before = {name: tensor.clone() for name, tensor in live.items()}, state_hash(state)
    merge_into_base(state, live, adapted_layers(model.module), model.flat.entries, 0)
    assert state_hash(state) == before[1]
    assert all(torch.equal(live[name], before[0][name]) for name in live)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_a_merge(kind: Kind) -> None:
    model, base, state = trained(kind)
    merged = base.adopt_(base.advance(state))
    loop = InnerLoop(model.module, model.flat, recipe_of(kind), "cpu")
    work = loop.run(merged, lambda step: tokens(step + 20), num_steps=20)
    after = dataclasses.replace(merged, vector=work.vector)
    assert loss_of(model, after) < loss_of(model, merged)


def test_a_merge_is_due_every_so_many_epochs_and_never_at_genesis() -> None:
    _, base, state = trained("dora")
    for epoch, due in ((0, False), (1, False), (2, True), (3, False), (4, True)):
        assert (base.advance(dataclasses.replace(state, epoch=epoch)).base is not None) is due


def test_base_epoch_is_that_of_the_newest_merge() -> None:
    assert [Adapter(merge_every=3).base_epoch(epoch) for epoch in range(7)] == [0, 0, 0, 3, 3, 3, 6]
    assert [Adapter().base_epoch(epoch) for epoch in range(4)] == [0, 0, 0, 0]


def test_each_merge_draws_another_a() -> None:
    model, base, state = trained("dora_linear")
    layer = adapted_layers(model.module)[0]
    drawn = [layer.a({}).clone()]
    for epoch in (2, 4):
        state = base.adopt_(base.advance(dataclasses.replace(state, epoch=epoch)))
        drawn.append(layer.a({}).clone())
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


# The live base


def test_a_state_on_the_base_that_is_there_is_adopted_as_it_is() -> None:
    _, base, state = trained("dora")
    assert base.adopt_(state).vector is state.vector
    assert (base.sha256, base.epoch) == (state.base_sha256, 0)


def test_a_merged_state_brings_its_base_and_loses_the_tensors() -> None:
    model, base, state = trained("dora")
    merged = base.advance(state)
    assert base.sha256 == state.base_sha256  # a round that fails leaves the model as it was
    held = base.adopt_(merged)
    assert held.base is None
    assert (base.sha256, base.epoch) == (merged.base_sha256, MERGE_EVERY)
    model.flat.load_(held.vector)
    assert tensors_sha256(base.tensors()) == merged.base_sha256


def test_a_state_on_a_base_that_is_nowhere_is_refused() -> None:
    _, base, state = trained("dora")
    with pytest.raises(ValueError, match="belongs to base 0000"):
        base.adopt_(dataclasses.replace(state, base_sha256="0" * 64))


@pytest.mark.parametrize("kind", KINDS)
def test_holding_a_merged_state_puts_the_old_base_back(kind: Kind) -> None:
    model, base, state = trained(kind)
    model.flat.load_(state.vector)
    before, logits = tensors_sha256(base.tensors()), model.module(input_ids=HELDOUT[0]).logits
    merged = base.advance(state)
    with base.holding(merged):
        assert loss_of(model, merged) == pytest.approx(loss_of_unmerged(kind), abs=1e-5)
    assert tensors_sha256(base.tensors()) == before
    assert (base.sha256, base.epoch) == (state.base_sha256, 0)
    assert torch.equal(model.module(input_ids=HELDOUT[0]).logits, logits)


def loss_of_unmerged(kind: Kind) -> float:
    model, _, state = trained(kind)
    return loss_of(model, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"the base's model\.norm\.weight must be torch\.float32 \[32\], got nothing"),
        ({"model.norm.weight": torch.zeros(31)}, r"must be torch\.float32 \[32\], got torch\.float32 \[31\]"),
        ({"model.norm.weight": torch.zeros(32).half()}, r"got torch\.float16 \[32\]"),
        ({"model.extra": torch.zeros(1)}, r"holds model\.extra, which this model does not have"),
    ],
)
def test_a_base_of_another_model_is_refused(change: dict[str, Tensor | None], message: str) -> None:
    _, base, _ = trained("dora")
    found = {**base.tensors(), **change}
    with pytest.raises(IntegrityError, match=message):
        base.check({name: tensor for name, tensor in found.items() if tensor is not None})


def test_the_files_of_a_merged_state_load_on_its_base_alone(tmp_path: Path) -> None:
    model, base, state = trained("dora")
    merged = base.advance(state)
    paths = {}
    for name, content in state_files(merged, model.flat).items():
        paths[name] = tmp_path / name
        paths[name].write_bytes(content)
    loaded = load_state(paths, model.flat, merged.base_sha256)
    assert state_hash(loaded) == state_hash(merged)


# The rate


def test_the_rate_warms_up_again_after_every_merge_and_then_is_the_schedules() -> None:
    inner = Inner(max_steps=10, lr=1.0, warmup_steps=2, total_steps=60, rewarm_steps=4)
    plain = [learning_rate(step, inner) for step in range(50)]
    merging = [learning_rate(step, inner, 2) for step in range(50)]
    for step in range(50):
        since = step % 20
        factor = (since + 1) / 4 if step >= 20 and since < 4 else 1.0
        assert merging[step] == pytest.approx(plain[step] * factor)


def test_without_re_warm_up_the_rate_knows_no_merges() -> None:
    inner = Inner(max_steps=10, rewarm_steps=0)
    assert [learning_rate(step, inner, 1) for step in range(40)] == [learning_rate(step, inner) for step in range(40)]
