"""Train a causal language model with friends: a Trainer script as any other, and one dict.

    python examples/causal_lm.py --run_id spanish                      # the first; prints the line for the others
    PEERS=/ip4/... python examples/causal_lm.py --run_id spanish       # everyone else

Without --model and --data it trains a model of a few thousand parameters on made-up text: no account, no network.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from tiny import load_model_and_tokenizer, read_texts
from transformers import DataCollatorForLanguageModeling

from hivetrain import SwarmArguments, SwarmTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_id", required=True, help="whoever gives the same one trains together")
    parser.add_argument("--model", help="name or folder of a causal language model; default: a tiny one")
    parser.add_argument("--data", help="a text file, one document a line; default: made-up text")
    parser.add_argument("--output_dir", default="outputs/causal_lm")
    parser.add_argument("--target_batch_size", type=int, default=64, help="samples, over all peers, of one step")
    parser.add_argument("--min_peers", type=int, default=1, help="how many wait for each other after one step")
    parser.add_argument("--swarm_epochs", type=int, default=0, help="steps of the swarm; 0: as its first peer says")
    parser.add_argument("--max_steps", type=int, default=200, help="of this peer, at most")
    parser.add_argument("--listen", help="such as /ip4/0.0.0.0/tcp/4001, for others than this machine")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("hivetrain").setLevel(logging.INFO)

    model, tokenizer = load_model_and_tokenizer(options.model)
    trainer = SwarmTrainer(
        model=model,
        train_dataset=tokenized(read_texts(options.data), tokenizer),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        args=SwarmArguments(
            output_dir=options.output_dir,
            per_device_train_batch_size=8,
            max_steps=options.max_steps,
            swarm_epochs=options.swarm_epochs,
            min_peers=options.min_peers,
            dataloader_pin_memory=False,
            learning_rate=1e-2 if options.model is None else 5e-5,
            logging_steps=10,
            report_to=[],
            hivemind_config={
                "dht": {"host_maddrs": [options.listen]} if options.listen else {},
                "opt": {"run_id": options.run_id, "target_batch_size": options.target_batch_size},
            },
        ),
    )
    trainer.train()
    trainer.save_model()
    print(f"saved to {options.output_dir}")


def tokenized(texts: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Each text cut to 64 tokens."""
    return [{"input_ids": tokenizer(text, truncation=True, max_length=64)["input_ids"]} for text in texts]


if __name__ == "__main__":
    main()
