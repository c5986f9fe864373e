"""Arguments of a Trainer that joins a swarm: `TrainingArguments` and one dict.

They print, pickle, save and load like any `TrainingArguments`: `hivemind_config` is kept as a plain dict of JSON
values, however it was given.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hivetrain.errors import ConfigError
from hivetrain.trainer.config import as_dict, read_config


@dataclass
class SwarmArguments(TrainingArguments):  # type: ignore[misc]  # transformers has no types here
    """`TrainingArguments` of one peer of a swarm.

    Steps of the learning rate's schedule, warm-up included, are the swarm's: one for each `target_batch_size` samples
    over all peers. `max_steps`, `save_steps`, `eval_steps` and `logging_steps` count this peer's own steps.

    Raises:
        ConfigError: `hivemind_config` cannot work.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "hivemind_config"]  # noqa: RUF012  # as in its base

    hivemind_config: dict | str | None = field(  # type: ignore[type-arg]  # read by HfArgumentParser
        default=None,
        metadata={
            "help": "Keyword arguments of hivemind.DHT ('dht') and hivemind.Optimizer ('opt': run_id and "
            "target_batch_size are required), as a dict, a JSON object, or the path of a JSON file."
        },
    )
    swarm_epochs: int = field(
        default=0,
        metadata={
            "help": "Steps of the whole swarm after which training ends; the schedule's length. 0: as the swarm that "
            "is joined says; for its first peer, the samples of its own max_steps over target_batch_size."
        },
    )
    min_peers: int = field(
        default=1,
        metadata={"help": "How many peers, this one included, have to train before this one takes its second step."},
    )
    peers_file: str | None = field(
        default=None, metadata={"help": "A file with initial peers, one multiaddress a line; '#' begins a comment."}
    )

    def __post_init__(self) -> None:
        if self.hivemind_config is not None:
            config: dict[str, Any] = as_dict(self.hivemind_config)
            read_config(config)
            # The base would turn a run_id of digits into a number if it parsed the string itself.
            self.hivemind_config = config
            if self.data_seed is None:  # type: ignore[has-type]
                # Peers that run one script with one seed would draw the same batches and learn nothing from each other.
                self.data_seed = secrets.randbelow(1 << 31)
        if self.swarm_epochs < 0:
            raise ConfigError(f"swarm_epochs must be 0 or more, got {self.swarm_epochs}")
        if self.min_peers < 1:
            raise ConfigError(f"min_peers must be 1 or more, got {self.min_peers}: this peer is one of them")
        super().__post_init__()
