"""Text from the newest published model: what a newcomer sees of the run's result.

Whoever holds the hub's token can tag what it likes, so the newest tag is not followed: the epoch is the one that a
miner would start from, anchored on chain and signed. Without the chain that cannot be told, and is said.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from hivetrain.contribution import Terms
from hivetrain.errors import ChainError, ConfigError, HubNotFound, IntegrityError
from hivetrain.hub.client import HubDataset, HubStore
from hivetrain.hub.dataset import DatasetFiles
from hivetrain.hub.store import ModelStore
from hivetrain.manifest import Manifest, Ref
from hivetrain.workbench import Workbench
from neurons.main import log_retries
from neurons.report import read_genesis
from template.acceptance import why_unacceptable
from template.anchor import candidates, find_base, parse_anchors
from template.chain.client import Chain
from template.chain.keys import verify
from template.leader import Leaders

MAX_TAGS = 64
"""Tags that are looked at for an epoch of the run where the chain names none."""


def generate(prompt: str, *, dir: Path, max_tokens: int, token: str | None = None, seed: int = 0) -> str:
    """Load the newest epoch of the local run in ``dir`` and complete ``prompt``.

    Returns:
        The prompt and up to ``max_tokens`` sampled tokens.

    Raises:
        ConfigError: there is no run in ``dir``, or an empty prompt.
        IntegrityError: no epoch that the validators anchored can be verified.
        ServiceError: its hub does not answer.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to go on from")
    log_retries()
    path = dir / "genesis.json"
    if not path.is_file():
        raise ConfigError(f"no run in {dir}; start one with `hivetrain up --dir {dir}`")
    run = read_genesis(dir)
    endpoint = run.hub_endpoint

    def open_dataset(repo: str, revision: str) -> DatasetFiles:
        return HubDataset(endpoint=endpoint, repo=repo, revision=revision, token=token)

    store = HubStore(endpoint=endpoint, repo=run.hub_repo, token=token)
    bench = Workbench(store=store, open_dataset=open_dataset, cache=dir / "generate-cache", device=torch.device("cpu"))
    parts = bench.open(run.run_id)
    newest, doubt = newest_epoch(
        store, parts, lambda: Chain(network="local", netuid=run.netuid, chain_endpoint=run.chain_endpoint)
    )
    if doubt:
        print(f"UNVERIFIED: {doubt}", file=sys.stderr)
    print(f"epoch {newest.epoch}, held-out loss {newest.manifest.val_loss:.3f}", file=sys.stderr)
    parts.flat.load_(parts.base.adopt_(bench.load_state(newest, parts)).vector)
    ids = parts.tokenizer(prompt, return_tensors="pt").input_ids
    generator = torch.Generator().manual_seed(seed)
    return str(parts.tokenizer.decode(_sample(parts.model, ids, max_tokens, generator)[0]))


def newest_epoch(store: ModelStore, terms: Terms, open_chain: Callable[[], Chain]) -> tuple[Ref, str]:
    """The newest epoch that a miner would start from, and ""; without a chain the newest tag, and why it is in doubt.

    Raises:
        IntegrityError: nothing that is anchored can be verified; without a chain, no tag holds an epoch of the run.
        ServiceError: the hub does not answer.
    """
    try:
        with open_chain() as chain:
            metagraph, anchors = chain.metagraph(), parse_anchors(chain.commitments())
    except (ChainError, ConfigError) as exc:
        newest = _newest_tag(store, terms.run_id)
        return (
            newest,
            f"the chain does not say which epoch is anchored, so epoch {newest.epoch} may be anybody's: {exc}",
        )
    permitted = {neuron.hotkey for neuron in metagraph.neurons if neuron.validator_permit}
    leaders = Leaders(terms.recipe.schedule)

    def acceptable(manifest: Manifest) -> str | None:
        return why_unacceptable(
            manifest,
            run_id=terms.run_id,
            schema_hash=terms.schema_hash,
            quorum=terms.recipe.gates.quorum,
            registered=lambda hotkey: metagraph.by_hotkey(hotkey) is not None,
            base_epoch=terms.recipe.adapter.base_epoch,
            why_no_publisher=lambda hotkey, round_number, attempt: leaders.why_no_publisher(
                hotkey, round_number, attempt, permitted
            ),
            verify=verify,
        )

    found = candidates(anchors, permitted, terms.run_id)
    after_all = max((one.block for one in found), default=0) + 1
    return find_base(found, after_all, store.resolve, acceptable), ""


def _newest_tag(store: ModelStore, run_id: str) -> Ref:
    """The newest tag that holds a manifest of the run: anybody with the hub's token can tag anything."""
    for epoch in reversed(store.epochs()[-MAX_TAGS:]):
        try:
            ref = store.resolve(epoch)
        except (HubNotFound, IntegrityError):
            continue
        if ref is not None and ref.manifest.run_id == run_id:
            return ref
    raise IntegrityError(f"none of the newest {MAX_TAGS} tags on the hub holds an epoch of run {run_id[:12]}")


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
