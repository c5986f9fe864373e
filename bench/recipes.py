"""The recipe that benchmarks of averaging train, apart from the embedded default: what they show is not its tuning."""

from __future__ import annotations

from hivetrain.run import Adapter, Inner, Model, Recipe

PLAIN_DORA = Recipe(
    adapter=Adapter(kind="dora"),
    inner=Inner(lr=6e-3, final_lr_ratio=0.1, warmup_steps=100, beta1=0.9, beta2=0.95),
)
"""Plain DoRA under AdamW with its usual betas; the rest is the embedded default's."""

TINY = Model(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=160)
"""A smaller Llama, where many members or many runs are compared."""
