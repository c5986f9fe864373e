"""Text to token ids: a byte-level BPE trained at genesis, or any fast tokenizer from a folder.

A tokenizer is loaded from its `tokenizer.json` alone, never through a class that its config names: the file
holds the whole pipeline, so that every node tokenizes alike whatever version of transformers it has, and no
code comes with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hivetrain.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 64 * 2**20
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files that can belong to a tokenizer, in canonical order; anything else in its folder is not part of it."""

MIN_VOCAB = 257  # 256 bytes and the end of text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose <|endoftext|>, id 0, is its bos, eos and pad token.

    The same texts give the same bytes.

    Args:
        texts: what to count pairs in. 2.6 MB take about half a second.
        vocab_size: at least 257. Texts with too few repeated pairs give a smaller vocabulary.

    Raises:
        ConfigError: vocab_size is below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB:
        raise ConfigError(f"model.vocab_size must be at least {MIN_VOCAB} for a byte-level tokenizer, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, bytes]:
    """Write a tokenizer's files into `folder`, and return them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    return _read_files(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a folder on this machine; runs none of its code and asks no network.

    Raises:
        ConfigError: no `tokenizer.json`, one that does not parse, or no end-of-text token.
    """
    from transformers import PreTrainedTokenizerFast

    _read_files(folder)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # the Rust parser raises bare Exception
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {exc}") from exc
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has no eos token, which must part documents: use another one")
    return tokenizer


def tokenizer_sha256(folder: Path) -> str:
    """Hex digest over the names and bytes of a tokenizer's files.

    Raises:
        ConfigError: no `tokenizer.json`, or a file past 64 MiB.
    """
    digest = hashlib.sha256(b"hivetrain-tokenizer/1\n")
    for name, blob in _read_files(folder).items():
        digest.update(f"{name}\n{len(blob)}\n".encode())
        digest.update(blob)
    return digest.hexdigest()


def _read_files(folder: Path) -> dict[str, bytes]:
    """A tokenizer's files by name, in canonical order."""
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if "tokenizer.json" not in present:
        raise ConfigError(
            f"{folder} has no tokenizer.json: name a model with a fast tokenizer, "
            "or save one with transformers' save_pretrained"
        )
    for name in present:
        size_bytes = (folder / name).stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise ConfigError(f"{folder / name}: expected at most {MAX_FILE_BYTES} bytes, got {size_bytes}")
    return {name: (folder / name).read_bytes() for name in present}
