"""Peers of a swarm as a user would write them, each a process of its own.

This process is a nursery: it imports what a peer needs once, which takes most of a peer's life, and forks one peer for
each line of JSON on its input: ``options`` (one training or a list), ``log`` (a file for its output; its exit status
comes to the same path with ``.exit``) and ``peers``. It answers with the peer's process id. With ``script`` and
``arguments`` instead of ``options``, the peer is that script.

A peer prints ``RESULT`` and JSON when a training ended; hivetrain's own lines and the log go where they go for a user.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import runpy
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like as they are imported
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import peft  # noqa: F401
    import transformers.trainer  # noqa: F401

    import hivetrain.trainer.engine
    import hivetrain.trainer.swarm_trainer  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            threading.Thread(target=reap, args=(pid, order["log"] + ".exit"), daemon=True).start()
            print(pid, file=answers, flush=True)
            continue
        become_a_peer(order)
        if "script" in order:
            sys.argv = [order["script"], *order["arguments"]]
            sys.path.insert(0, str(Path(order["script"]).parent))
            runpy.run_path(order["script"], run_name="__main__")
            return
        options = order["options"]
        for scenario in options if isinstance(options, list) else [options]:
            print("RESULT " + json.dumps(run(scenario)), flush=True)
        return  # through the interpreter's own exit, as a script ends


def reap(pid: int, file: str) -> None:
    _, status = os.waitpid(pid, 0)
    Path(file).write_text(str(os.waitstatus_to_exitcode(status)))


def become_a_peer(order: dict[str, Any]) -> None:
    """What makes a forked process look as if it had been started by itself."""
    os.setsid()
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["PEERS"] = order["peers"]
    random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hivetrain").setLevel(logging.INFO)


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train as ``options`` says, and tell how it ended."""
    import torch
    from transformers import TrainerCallback

    from hivetrain import SwarmArguments, SwarmTrainer
    from hivetrain.errors import HivetrainError

    model = build_model(options)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 100_000,
    }  # fmt: skip
    settings.update(options.get("args", {}))
    if settings.pop("swarm", True):
        args: Any = SwarmArguments(output_dir=options["out"], **settings)
        trainer_cls: Any = SwarmTrainer
    else:
        from transformers import Trainer, TrainingArguments

        args, trainer_cls = TrainingArguments(output_dir=options["out"], **settings), Trainer
    pace_s, fail_at = options.get("pace_s", 0.0), options.get("fail_at")

    class Pace(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            time.sleep(pace_s)
            result.setdefault("began_with", digest_of(model))
            if state.global_step == fail_at:
                raise RuntimeError("a bug of the user's")
            if state.global_step == options.get("announce_at"):
                print("TRAINING", flush=True)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            result.setdefault("saved", {})[state.global_step] = digest_of(model)

    result: dict[str, Any] = {}
    trainer = trainer_cls(
        model=model, args=args, train_dataset=dataset(), eval_dataset=dataset()[:32], callbacks=[Pace()]
    )
    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=options.get("resume"))
    except (HivetrainError, RuntimeError) as exc:
        return {"error": type(exc).__name__, "message": str(exc), "seconds": time.monotonic() - began}
    history = trainer.state.log_history
    result["steps"] = trainer.state.global_step
    result["digest"] = digest_of(model)
    result["base_unchanged"] = all(torch.equal(value, dict(model.named_parameters())[n]) for n, value in before.items())
    result["rounds"] = [entry for entry in history if "swarm_epoch" in entry]
    result["rates"] = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    result["eval_loss"] = trainer.evaluate()["eval_loss"]
    result["checkpoints"] = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(options["out"]).glob("checkpoint-*/*model.safetensors"))
    }
    result["trainable"] = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return result


def digest_of(model: Any) -> str:
    """SHA-256 of its parameters."""
    digest = hashlib.sha256()
    for _, value in model.named_parameters():
        digest.update(value.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_model(options: dict[str, Any]) -> Any:
    """A model of a few thousand parameters, with other initial weights in each process where ``seed`` says so."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    kind = options.get("model", "gpt2")
    if kind == "gpt2":
        torch.manual_seed(options.get("seed", 0))
        config = GPT2Config(
            vocab_size=64, n_positions=32, n_embd=options.get("width", 16), n_layer=1, n_head=2, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    if kind == "llama":
        return llama
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options.get("seed", 0))
    return get_peft_model(llama, LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]))


def dataset() -> list[dict[str, Any]]:
    """400 arithmetic sequences of 16 tokens."""
    import torch

    strides = torch.randint(1, 64, (400,), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": (tokens := (torch.arange(16) * stride) % 64), "labels": tokens} for stride in strides]


if __name__ == "__main__":
    main()
