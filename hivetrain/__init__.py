"""Hivetrain: one language model, trained together over the internet by people who own GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hivetrain.trainer.arguments import SwarmArguments
    from hivetrain.trainer.swarm_trainer import SwarmTrainer

__all__ = ["SwarmArguments", "SwarmTrainer", "__version__"]
__version__ = "0.1.0"

# Imported when asked for: they load transformers, which takes seconds that no neuron should pay for this.
_LAZY = {"SwarmArguments": "hivetrain.trainer.arguments", "SwarmTrainer": "hivetrain.trainer.swarm_trainer"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
