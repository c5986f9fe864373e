"""One peer of `bench.swarm_agreement`, and the one process that it is compared with: same model, data and settings."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY, LENGTH, BATCH = 64, 16, 8
FOLLOWS = 0.8  # a model that knows what follows what has 1.3 nats per token left
BARRIER_S = 180.0

# What a checkpoint holds of its peer alone: its own steps and draws, where it writes to, and a text about its versions.
OF_ONE_PEER = ("trainer_state.json", "rng_state.pth", "training_args.bin", "README.md")


def main() -> None:
    options = json.loads(sys.argv[1])
    quiet()
    result = ROLES[options.get("role", "peer")](options)
    print("RESULT " + json.dumps(result), flush=True)


def quiet() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def train_in_swarm(options: dict[str, Any]) -> dict[str, Any]:
    """Train with ``options["peers"]`` others, all of whom are there from the first step on.

    Leaves the samples of each round beside the checkpoint.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    from hivetrain import SwarmArguments, SwarmTrainer

    folder, rank = Path(options["folder"]), options["rank"]
    pending: list[Any] = []
    brought: dict[int, Any] = {}

    class Recorder(SwarmTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            pending.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    class Together(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                (folder / f"ready-{rank}").touch()
                until = time.monotonic() + BARRIER_S
                while len(list(folder.glob("ready-*"))) < options["peers"]:
                    if time.monotonic() > until:
                        raise RuntimeError(f"not all {options['peers']} peers came within {BARRIER_S} s")
                    time.sleep(0.05)
            time.sleep(options["pace_s"])  # stands for a GPU's work: the peers share this machine's cores

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.rounds and trainer.rounds[-1].epoch not in brought:
                brought[trainer.rounds[-1].epoch] = torch.cat(pending)
                pending.clear()

    opt = {"run_id": "agreement", "target_batch_size": options["target"], "matchmaking_time": 1.0,
           "averaging_timeout": 30.0}  # fmt: skip
    config = {"dht": {"initial_peers": options["initial_peers"]}, "opt": opt}
    args = SwarmArguments(
        **shared(folder / f"out-{rank}"), per_device_train_batch_size=BATCH, save_strategy="steps", save_steps=100_000,
        hivemind_config=config, swarm_epochs=options["epochs"],
    )  # fmt: skip
    trainer = Recorder(
        model=build(options["model"], options["kind"], rank, folder), train_dataset=draws(4096, 0), args=args,
        callbacks=[Together()],
    )  # fmt: skip
    trainer.train()
    save_file({str(epoch): rows for epoch, rows in brought.items()}, folder / f"brought-{rank}.safetensors")
    last = max(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    files = sorted(path for path in last.iterdir() if path.name not in OF_ONE_PEER)
    return {
        "loss": eval_loss(trainer),
        "files": {path.name: digest_of(path) for path in files},
        "rounds": [[report.epoch, report.peers, report.samples] for report in trainer.rounds],
    }


def digest_of(path: Path) -> str:
    """SHA-256 of its bytes; of a JSON file, of what it says: peft writes a set in the order of a process's hashes."""
    if path.suffix != ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    said = {name: sorted(v) if isinstance(v, list) else v for name, v in json.loads(path.read_bytes()).items()}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def samples_of_rounds(options: dict[str, Any]) -> list[Any]:
    """What all peers brought to each round, one after another: input ids, shape [samples, LENGTH]."""
    import torch
    from safetensors.torch import load_file

    folder = Path(options["folder"])
    brought = [load_file(folder / f"brought-{rank}.safetensors") for rank in range(options["peers"])]
    epochs = sorted({epoch for one in brought for epoch in one}, key=int)
    return [torch.cat([one[epoch] for one in brought if epoch in one]) for epoch in epochs]


def train_alone(options: dict[str, Any], batches: list[Any], seed: int | None = None) -> tuple[float, float]:
    """A stock `Trainer` that takes one step with each of ``batches``, or with as many samples in an order by ``seed``.

    Returns:
        The held-out loss before and after training.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    if seed is not None:
        rows = torch.stack([one["input_ids"] for one in draws(4096, 0)])
        order = torch.cat([torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) for _ in range(9)])
        batches = [rows[part] for part in torch.split(order[: sum(map(len, batches))], [len(one) for one in batches])]

    class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(batches)

    folder = Path(options["folder"])
    args = TrainingArguments(
        **shared(folder / "alone"), per_device_train_batch_size=1, save_strategy="no", max_steps=len(batches)
    )
    trainer = Trainer(
        model=build(options["model"], options["kind"], 0, folder), train_dataset=Batches(), args=args,
        data_collator=collate,
    )  # fmt: skip
    before = eval_loss(trainer)
    trainer.train()
    return before, eval_loss(trainer)


def collate(items: list[Any]) -> dict[str, Any]:
    """Batches as they are, rows and dicts of rows as one batch."""
    import torch

    rows = items[0] if len(items) == 1 else torch.stack([item["input_ids"] for item in items])
    return {"input_ids": rows, "labels": rows}


def eval_loss(trainer: Any) -> float:
    """Of sequences that are not trained on, in nats per token."""
    return float(trainer.evaluate(draws(512, 1))["eval_loss"])


def shared(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
        "learning_rate": 1e-2, "warmup_steps": 2, "lr_scheduler_type": "cosine", "per_device_eval_batch_size": 64,
    }  # fmt: skip


def build(model: str, kind: str, seed: int, folder: Path) -> Any:
    """Without dropout: new weights of some 20,000 parameters by ``seed``, or new adapters on the base in ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if kind == "full":
        return new_model(model)
    from peft import LoraConfig, get_peft_model

    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    return get_peft_model(base, LoraConfig(r=8, use_dora=True, target_modules="all-linear"))


def save_base(options: dict[str, Any]) -> None:
    """What DoRA adapts: a model of other data, so that there is something to adapt."""
    import torch
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    folder = Path(options["folder"])
    args = TrainingArguments(
        **shared(folder / "old"), per_device_train_batch_size=96, save_strategy="no",
        max_steps=options["base_steps"], data_seed=0,
    )  # fmt: skip
    trainer = Trainer(model=new_model(options["model"]), train_dataset=draws(4096, seed=0, table=1), args=args)
    trainer.train()
    trainer.save_model(str(folder / "base"))


def new_model(model: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if model == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def draws(num: int, seed: int, table: int = 0) -> list[dict[str, Any]]:
    """Sequences in which a token is followed by the one that ``table`` says four times in five, else by any."""
    import torch

    follower = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1000 + table))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCABULARY, (num, LENGTH), generator=generator)
    follows = torch.rand((num, LENGTH), generator=generator) < FOLLOWS
    for place in range(1, LENGTH):
        rows[:, place] = torch.where(follows[:, place], follower[rows[:, place - 1]], rows[:, place])
    return [{"input_ids": row, "labels": row} for row in rows]


ROLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "peer": train_in_swarm,
    "base": save_base,
    "alone": lambda options: train_alone(options, samples_of_rounds(options)),
}


if __name__ == "__main__":
    main()
