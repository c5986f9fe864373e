"""Base, adapter and flat vector in the one order that works: hash the base, attach, move, flatten."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hivetrain import run
from hivetrain.model.dora import attach_adapter
from hivetrain.model.load import base_sha256, load_base
from hivetrain.model.vector import FlatVector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Assembled:
    """A model that is ready to train.

    Attributes:
        module: what to call, on its device.
        flat: its trainable vector.
        base_sha256: of the base that it was built on.
    """

    module: nn.Module
    flat: FlatVector
    base_sha256: str


def assemble(recipe: run.Recipe, source: Path | None, vocab_size: int, device: torch.device | str) -> Assembled:
    """The recipe's model with its adapter, on ``device``. The same recipe and base give the same vector.

    Args:
        recipe: its tables `model` and `adapter` are read.
        source: the base's folder; None draws it (genesis alone does that).
        vocab_size: token ids that the tokenizer can produce.
        device: such as ``"cpu"`` or ``"cuda:0"``.

    Raises:
        ConfigError: see `load_base` and `attach_adapter`.
    """
    base = load_base(recipe.model, source, vocab_size)
    digest = base_sha256(base)
    module = attach_adapter(base, recipe.adapter, recipe.model.seed).to(device)
    return Assembled(module=module, flat=FlatVector(module), base_sha256=digest)
