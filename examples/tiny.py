"""A model, a tokenizer and texts that need no network, for a first try; and yours, by name or path."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

SENTENCE = "the hive trains one model together and every bee brings its share of honey home before the night"
WORDS = SENTENCE.split(" ")


def load_model_and_tokenizer(name: str | None) -> tuple[Any, Any]:
    """``name`` from the hub or a folder; without one, a Llama of about 20,000 parameters and a tokenizer of words."""
    if name is not None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name), tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _word_tokenizer()
    torch.manual_seed(0)  # DoRA peers need equal bases
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def read_texts(path: str | None) -> list[str]:
    """The lines of ``path`` that hold something; without one, 500 made-up sentences."""
    if path is not None:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    draw = random.Random(0)
    return [
        " ".join(WORDS[(start + step) % len(WORDS)] for step in range(16)) for start in draw.choices(range(99), k=500)
    ]


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
