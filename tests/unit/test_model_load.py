"""The base model: drawn deterministically, written and read back, refused when it is not one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hivetrain import run
from hivetrain.errors import ConfigError
from hivetrain.model import attach_adapter, base_files, base_sha256, load_base

TINY = run.Model(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, vocab_size=128)
HUB = dataclasses.replace(TINY, name="someone/model", revision="abc")


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder


def write_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_same_seed_draws_the_same_base_and_another_seed_another() -> None:
    first, again = load_base(TINY, None, 128), load_base(TINY, None, 128)
    other = load_base(dataclasses.replace(TINY, seed=1), None, 128)
    assert base_sha256(first) == base_sha256(again)
    assert base_sha256(first) != base_sha256(other)


def test_drawing_a_base_moves_no_global_generator() -> None:
    before = torch.random.get_rng_state()
    load_base(TINY, None, 128)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_drawn_base_is_float32_tied_and_without_a_cache() -> None:
    model = load_base(TINY, None, 100)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (100, 32)
    assert model(input_ids=torch.zeros(1, 4, dtype=torch.long)).past_key_values is None


def test_written_base_files_read_back_to_the_same_hash(tmp_path: Path) -> None:
    model = load_base(TINY, None, 128)
    files = base_files(model)
    assert set(files) == {"config.json", "model.safetensors"}
    loaded = load_base(TINY, write(tmp_path, files), 128)
    assert base_sha256(loaded) == base_sha256(model)
    assert loaded.config._attn_implementation == "sdpa"


def test_a_half_precision_base_with_dropout_loads_as_float32_without_dropout(tmp_path: Path) -> None:
    model = load_base(HUB, write_gpt2(tmp_path), 128)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.config.attn_pdrop == 0.0


def test_one_changed_weight_changes_the_hash() -> None:
    model = load_base(TINY, None, 128)
    before = base_sha256(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert base_sha256(model) != before


def test_hashing_an_adapted_model_is_refused() -> None:
    model = load_base(TINY, None, 128)
    attach_adapter(model, run.Adapter(), 0)
    with pytest.raises(ValueError, match="before an adapter"):
        base_sha256(model)


def test_a_hub_model_without_its_files_is_refused() -> None:
    with pytest.raises(ConfigError, match="someone/model"):
        load_base(HUB, None, 128)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_base(HUB, tmp_path, 128)


def test_a_folder_of_pickled_weights_is_refused(tmp_path: Path) -> None:
    model = load_base(TINY, None, 128)
    (tmp_path / "config.json").write_bytes(base_files(model)["config.json"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_base(HUB, tmp_path, 128)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    files = base_files(load_base(TINY, None, 128))
    files["model.safetensors"] = files["model.safetensors"][:-100]
    with pytest.raises(ConfigError, match="cannot be read"):
        load_base(HUB, write(tmp_path, files), 128)


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load, save

    files = base_files(load_base(TINY, None, 128))
    tensors = load(files["model.safetensors"])
    del tensors["model.layers.0.mlp.up_proj.weight"]
    files["model.safetensors"] = save(tensors, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj"):
        load_base(HUB, write(tmp_path, files), 128)


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_base(HUB, tmp_path, 128)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(tmp_path: Path) -> None:
    files = base_files(load_base(TINY, None, 128))
    with pytest.raises(ConfigError, match="128 embeddings, the tokenizer makes 129"):
        load_base(HUB, write(tmp_path, files), 129)
