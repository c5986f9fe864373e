"""The base model: drawn from the recipe's seed, or read from a folder of safetensors.

Weights are float32 whatever the folder holds: the trainable ones are averaged and replayed in float32, and two
nodes must not differ by a cast. Dropout is set to zero, since a replayed step cannot draw the same masks on
another device. A node that joins a run reads the base that genesis published; only genesis draws one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hivetrain import run
from hivetrain.errors import ConfigError, IntegrityError
from hivetrain.model.weights import base_tensors, tensors_sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MAX_POSITIONS = 2048
"""Position limit of a model that genesis draws; rotary positions hold no weights, so it costs nothing."""


def load_base(model: run.Model, source: Path | None, vocab_size: int) -> PreTrainedModel:
    """The base model on the CPU: float32, scaled-dot-product attention, no dropout, no key/value cache.

    Args:
        model: the recipe's table. Without ``source``, only ``"genesis"`` can be made, and the same seed gives
            the same weights without moving any global random generator.
        source: a folder with `config.json` and `*.safetensors`, as `base_files` writes it or the hub serves it.
        vocab_size: token ids that the tokenizer can produce.

    Raises:
        ConfigError: an unknown model, a folder that cannot be read as one, or fewer embeddings than token ids.
    """
    if source is None:
        if model.name != run.GENESIS:
            raise ConfigError(
                f'model.name {model.name!r} needs a folder of its files, got none; download it first, or use "genesis"'
            )
        return _draw(model, vocab_size)
    return _read(model, source, vocab_size)


def _draw(model: run.Model, vocab_size: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed every CUDA generator as well, outside the fork.
        torch.default_generator.manual_seed(model.seed)
        drawn: PreTrainedModel = LlamaForCausalLM(config)
    return drawn.float()


def _read(model: run.Model, source: Path, vocab_size: int) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (source / CONFIG_NAME).is_file():
        raise ConfigError(f"model {model.name!r}: {source} holds no {CONFIG_NAME}; expected a folder of a causal LM")
    loaded: PreTrainedModel
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        _disable_dropout(config)
        with _no_progress_bar():
            loaded, report = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        raise ConfigError(f"model {model.name!r} cannot be read from {source}: {exc}") from exc
    # What the files lack, transformers draws at random: every node would hold another base.
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ConfigError(f"model {model.name!r}: the weights in {source} lack {len(lacking)} tensors: {lacking[:3]}")
    num_embeddings = loaded.get_input_embeddings().weight.shape[0]
    if num_embeddings < vocab_size:
        raise ConfigError(
            f"model {model.name!r} has {num_embeddings} embeddings, the tokenizer makes {vocab_size} ids; "
            "choose the tokenizer that belongs to the model"
        )
    return loaded


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _disable_dropout(config: PretrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    config.use_cache = False


def base_sha256(model: PreTrainedModel) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every stored tensor, by sorted name; tied ones count once.

    Raises:
        ValueError: an adapter is attached, which renames the tensors and lets some of them change.
    """
    for name in model.state_dict():
        if ".lora_" in name:
            raise ValueError(f"base_sha256 needs the model before an adapter is attached, found {name}")
    return tensors_sha256(base_tensors(model))


def base_files(model: PreTrainedModel) -> dict[str, bytes]:
    """`config.json` and `model.safetensors` that `load_base` reads back to the same `base_sha256`.

    One file of weights, so that genesis writes two files whatever the size of the model.
    """
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    return {
        CONFIG_NAME: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        WEIGHTS_NAME: weights_file(base_tensors(model)),
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `model.safetensors` that is not ours, by name; of any shape, and maybe not finite.

    Raises:
        IntegrityError: it is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Copied out of the file's mapping, which a later download may replace.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as exc:
        raise IntegrityError(f"{path.name} is not safetensors: {exc}") from exc


def weights_file(tensors: Mapping[str, Tensor]) -> bytes:
    """`model.safetensors` of a base whose tensors these are, by the names of `base_tensors`."""
    from safetensors.torch import save

    raw: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    return raw
