"""The smallest models of both families, for tests of what is put on them."""

from __future__ import annotations

from typing import Any

import torch

from hivetrain import run
from hivetrain.model import load_base

TINY = run.Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128)


def llama() -> Any:
    """One with Linear layers and an untied head."""
    return load_base(TINY, None, 128)


def gpt2() -> Any:
    """One with Conv1D layers and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def tokens() -> torch.Tensor:
    """Two sequences of 16."""
    return torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))
