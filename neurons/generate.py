"""Text from the newest published model: what a newcomer sees of the run's result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hivetrain.errors import ConfigError
from hivetrain.hub.client import HubDataset, HubStore
from hivetrain.hub.dataset import DatasetFiles
from hivetrain.workbench import Workbench
from neurons.main import log_retries


def generate(prompt: str, *, dir: Path, max_tokens: int, token: str | None = None, seed: int = 0) -> str:
    """Load the newest epoch of the local run in ``dir`` and complete ``prompt``.

    Returns:
        The prompt and up to ``max_tokens`` sampled tokens.

    Raises:
        ConfigError: there is no run in ``dir``, or an empty prompt.
        ServiceError: its hub does not answer.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to go on from")
    log_retries()
    path = dir / "genesis.json"
    if not path.is_file():
        raise ConfigError(f"no run in {dir}; start one with `hivetrain up --dir {dir}`")
    run = json.loads(path.read_text())
    endpoint = str(run["hub_endpoint"])

    def open_dataset(repo: str, revision: str) -> DatasetFiles:
        return HubDataset(endpoint=endpoint, repo=repo, revision=revision, token=token)

    store = HubStore(endpoint=endpoint, repo=str(run["hub_repo"]), token=token)
    bench = Workbench(store=store, open_dataset=open_dataset, cache=dir / "generate-cache", device=torch.device("cpu"))
    parts = bench.open(str(run["run_id"]))
    newest = store.latest()
    assert newest is not None  # `open` has read epoch 0
    print(f"epoch {newest.epoch}, held-out loss {newest.manifest.val_loss:.3f}", file=sys.stderr)
    parts.flat.load_(parts.base.adopt_(bench.load_state(newest, parts)).vector)
    ids = parts.tokenizer(prompt, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(seed)
    return str(parts.tokenizer.decode(_sample(parts.model, ids, max_tokens, generator)[0]))


@torch.no_grad()
def _sample(
    model: torch.nn.Module, ids: torch.Tensor, max_tokens: int, generator: torch.Generator, temperature: float = 0.8
) -> torch.Tensor:
    """``ids`` [1, n] and up to ``max_tokens`` more."""
    for _ in range(max_tokens):
        logits = model(input_ids=ids[:, -512:]).logits[:, -1] / temperature
        top, index = logits.topk(min(40, logits.shape[-1]))
        choice = torch.multinomial(torch.softmax(top, -1), 1, generator=generator)
        ids = torch.cat((ids, index.gather(1, choice)), dim=1)
    return ids
