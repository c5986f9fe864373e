"""Fine-tune DoRA adapters with friends: the base stays as it is, only the adapters' gradients travel.

    python examples/dora.py --run_id spanish_dora --min_peers 2
    PEERS=/ip4/... python examples/dora.py --run_id spanish_dora --min_peers 2 --output_dir outputs/friend

Everyone has to load the same base (name and revision) and the same LoraConfig: a difference is refused by name.
"""

from __future__ import annotations

import argparse
import logging

from causal_lm import tokenized
from peft import LoraConfig, get_peft_model
from tiny import load_model_and_tokenizer, read_texts
from transformers import DataCollatorForLanguageModeling

from hivetrain import SwarmArguments, SwarmTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_id", required=True, help="whoever gives the same one trains together")
    parser.add_argument("--model", help="name or folder of a causal language model; default: a tiny one")
    parser.add_argument("--data", help="a text file, one document a line; default: made-up text")
    parser.add_argument("--output_dir", default="outputs/dora")
    parser.add_argument("--min_peers", type=int, default=1, help="how many wait for each other after one step")
    parser.add_argument("--swarm_epochs", type=int, default=0, help="steps of the swarm; 12 without max_steps")
    parser.add_argument("--max_steps", type=int, default=-1, help="of this peer, at most")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hivetrain").setLevel(logging.INFO)

    base, tokenizer = load_model_and_tokenizer(options.model)
    model = get_peft_model(base, LoraConfig(r=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    trainer = SwarmTrainer(
        model=model,
        train_dataset=tokenized(read_texts(options.data), tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        args=SwarmArguments(
            output_dir=options.output_dir,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=options.max_steps,
            swarm_epochs=options.swarm_epochs or (12 if options.max_steps < 0 else 0),
            min_peers=options.min_peers,
            dataloader_pin_memory=False,
            learning_rate=2e-3 if options.model is None else 2e-4,
            warmup_steps=2,
            logging_steps=10,
            report_to=[],
            hivemind_config={
                "dht": {},
                # Tiny models end an epoch sooner than peers between continents find each other.
                "opt": {"run_id": options.run_id, "target_batch_size": 64, "matchmaking_time": 2.0},
            },
        ),
    )
    trainer.train()
    trainer.save_model()
    print(f"adapters saved to {options.output_dir}")


if __name__ == "__main__":
    main()
