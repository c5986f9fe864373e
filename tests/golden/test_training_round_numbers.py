"""One round of two miners in numbers: a refactor must show the same loss, a change in the maths must change these.

The loop itself is checked against torch's own AdamW in `tests/unit/test_training_inner.py`; this pins the draw of
the model, the schedule, the averaging and the outer step together.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from hivetrain.model import assemble
from hivetrain.run import Adapter, Data, Inner, Model, Outer, Recipe
from hivetrain.training import InnerLoop, genesis_state, heldout_loss, outer_step, pseudo_gradient

MODEL = Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128)
INNER = Inner(
    max_steps=10,
    lr=4e-3,
    final_lr_ratio=0.1,
    warmup_steps=2,
    total_steps=40,
    beta1=0.9,
    beta2=0.95,
    snapshot_every=5,
)
RECIPE = Recipe(model=MODEL, adapter=Adapter(kind="dora"), data=Data(seq_len=16, batch_size=4), inner=INNER)

LOSSES = (
    4.848400592803955,
    4.854244709014893,
    4.871969699859619,
    4.711207866668701,
    4.705118179321289,
    4.716169357299805,
    4.645987033843994,
    4.599232196807861,
    4.589506149291992,
    4.419778347015381,
)
VECTOR_NORM = 14.646607
EXP_AVG_SQ_SUM = 0.38684708
HELDOUT = (4.873727, 4.4583065)
LAYER = (
    ("input_layernorm.weight", (32,)),
    ("mlp.down_proj.lora_A.weight", (8, 64)),
    ("mlp.down_proj.lora_B.weight", (32, 8)),
    ("mlp.down_proj.lora_magnitude_vector.weight", (32,)),
    ("mlp.gate_proj.lora_A.weight", (8, 32)),
    ("mlp.gate_proj.lora_B.weight", (64, 8)),
    ("mlp.gate_proj.lora_magnitude_vector.weight", (64,)),
    ("mlp.up_proj.lora_A.weight", (8, 32)),
    ("mlp.up_proj.lora_B.weight", (64, 8)),
    ("mlp.up_proj.lora_magnitude_vector.weight", (64,)),
    ("post_attention_layernorm.weight", (32,)),
    *(
        (f"self_attn.{projection}_proj.{name}.weight", shape)
        for projection in "koqv"
        for name, shape in (("lora_A", (8, 32)), ("lora_B", (32, 8)), ("lora_magnitude_vector", (32,)))
    ),
)
ENTRIES = (
    ("model.embed_tokens.weight", (128, 32)),
    *((f"model.layers.{layer}.{name}", shape) for layer in range(2) for name, shape in LAYER),
    ("model.norm.weight", (32,)),
)


def tokens(miner: int, step: int) -> Tensor:
    """Arithmetic, so that no generator's version matters."""
    place = torch.arange(4 * 16).view(1, 4, 16)
    return (7 * miner + 31 * step + (place // 16) * 17 + (place % 16) * (1 + step % 3)) % 128


def test_one_round_of_two_miners_gives_the_pinned_numbers() -> None:
    model = assemble(RECIPE, None, 128, "cpu")
    loop = InnerLoop(model.module, model.flat, RECIPE, "cpu")
    state = genesis_state(model.flat, model.base_sha256)
    works = [loop.run(state, lambda step, miner=miner: tokens(miner, step), num_steps=10) for miner in range(2)]
    after = outer_step(
        state,
        torch.stack([pseudo_gradient(state.vector, work.vector) for work in works]).mean(dim=0),
        torch.stack([work.exp_avg for work in works]).mean(dim=0),
        torch.stack([work.exp_avg_sq for work in works]).mean(dim=0),
        Outer(),
        10,
    )
    heldout = torch.cat([tokens(5, step) for step in range(3)])
    assert works[0].losses == pytest.approx(LOSSES, rel=1e-4)
    assert torch.linalg.vector_norm(after.vector).item() == pytest.approx(VECTOR_NORM, rel=1e-4)
    assert after.exp_avg_sq.sum().item() == pytest.approx(EXP_AVG_SQ_SUM, rel=1e-4)
    losses = [heldout_loss(model.module, model.flat, s.vector, heldout, "cpu") for s in (state, after)]
    assert losses == pytest.approx(HELDOUT, rel=1e-4)


def test_the_names_and_shapes_of_the_trainable_vector_are_pinned() -> None:
    """Another version of peft or transformers must not rename a parameter unseen: nodes could not average."""
    assert assemble(RECIPE, None, 128, "cpu").flat.entries == ENTRIES


def test_the_linear_form_names_the_same_but_for_its_frozen_a() -> None:
    linear = dataclasses.replace(RECIPE, adapter=Adapter(kind="dora_linear"))
    entries = assemble(linear, None, 128, "cpu").flat.entries
    assert [shape for _, shape in entries] == [shape for name, shape in ENTRIES if "lora_A" not in name]
    assert not any("lora_A" in name for name, _ in entries)
