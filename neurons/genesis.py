"""Genesis of a local run: keys, chain, corpus, tokenizer, recipe and epoch 0, made on this machine.

    python -m neurons.genesis --dir .hivetrain --hub.endpoint http://127.0.0.1:8800 --miners 3 --validators 1

Everything it writes is what production uses: the data set and the model lie on a hub, the run id is on chain.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hivetrain.data.corpus import build_corpus
from hivetrain.data.index import build_index
from hivetrain.data.reader import SegmentReader, load_heldout, load_round
from hivetrain.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_sha256, train_tokenizer
from hivetrain.errors import ConfigError, HivetrainError
from hivetrain.hub.client import HubStore, publish_dataset
from hivetrain.hub.dataset import LocalDataset
from hivetrain.manifest import Manifest
from hivetrain.model.dora import attach_adapter
from hivetrain.model.load import base_files, base_sha256, load_base
from hivetrain.model.vector import FlatVector, schema_hash
from hivetrain.run import Recipe, Schedule, run_id
from hivetrain.training.evaluate import heldout_loss
from hivetrain.training.inner import InnerLoop
from hivetrain.training.state import State, genesis_state, state_files, state_hash
from hivetrain.workbench import BASE_PREFIX, INDEX_NAME, RECIPE_NAME, TOKENIZER_PREFIX
from neurons.main import log_retries
from neurons.plan import local_recipe
from template.anchor import Anchor
from template.chain.client import Chain
from template.chain.keys import WalletIdentity, load_wallet
from template.chain.ledger import create_local_chain
from template.config import read_secrets
from template.leader import MAX_SITTING
from template.validator.publish import file_entries, sign_manifest

logger = logging.getLogger("neurons.genesis")

NETUID = 1
VALIDATOR_STAKE = 10_000.0
MARGIN = 3.0
"""How much longer TRAIN and VERIFY are than what this machine needs."""
CALIBRATION_STEPS = 6
PATIENCE_S = 3.0
"""A leader of this machine's that has not called for so long is silent: it looks for its stand-bys for 2 s at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What genesis makes of the recipe before anything is published."""

    recipe: Recipe
    files: dict[str, bytes]
    state: State
    schema_hash: str
    tokenizer_sha256: str
    val_loss: float


def main(argv: list[str] | None = None) -> int:
    """Run genesis; 0 when it is done, 2 for a setting that cannot work, 1 when a service failed."""
    parser = argparse.ArgumentParser(prog="neurons.genesis", description="Make a local run.")
    parser.add_argument("--dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--hub.endpoint", dest="endpoint", required=True, help="URL of the hub")
    parser.add_argument("--miners", type=int, default=3, help="miners to register")
    parser.add_argument("--validators", type=int, default=1, help="validators to register, with stake and permit")
    parser.add_argument("--recipe", type=Path, help="run.toml to start from; data and schedule are filled in")
    parser.add_argument("--block-time", type=float, default=1.0, help="seconds per block of the local chain")
    parser.add_argument("--neurons-per-core", type=float, default=0.0, help="instead of miners over cores")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logger.setLevel(logging.INFO)
    log_retries()
    try:
        make_run(
            folder=args.dir.resolve(),
            endpoint=args.endpoint,
            num_miners=args.miners,
            num_validators=args.validators,
            recipe_path=args.recipe,
            block_time_s=args.block_time,
            load=args.neurons_per_core or max(1.0, args.miners / (os.cpu_count() or 1)),
            token=read_secrets(os.environ).hub_token,
            say=logger.info,
        )
    except ConfigError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except (HivetrainError, OSError) as exc:
        print(f"error: genesis failed: {exc}", file=sys.stderr)
        return 1
    return 0


def make_run(
    *,
    folder: Path,
    endpoint: str,
    num_miners: int,
    num_validators: int,
    recipe_path: Path | None,
    block_time_s: float,
    load: float,
    token: str | None,
    say: Callable[[str], None],
) -> None:
    """Make everything and write `genesis.json` last: it is the mark of a whole run.

    Args:
        load: neurons that share one core; lengthens the calibrated phases.
        say: told one line per step.

    Raises:
        ConfigError: the recipe cannot be used here.
        ServiceError: hub or chain failed.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe() if recipe_path is None else local_recipe(recipe_path)
    say("genesis: writing the corpus from Python's own documentation")
    corpus = build_corpus(folder / "corpus" / "data", heldout_row_groups=recipe.data.heldout_row_groups)
    revision = publish_dataset(endpoint, recipe.data.repo, {f"data/{p.name}": p for p in corpus}, token=token)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, revision=revision, config=""))
    made = _make(recipe, folder, block_time_s, load, num_validators, say)
    say("genesis: making keys and registering neurons")
    names = [f"miner-{i + 1}" for i in range(num_miners)] + [f"validator-{i + 1}" for i in range(num_validators)]
    chain_endpoint = _make_chain(folder, names, made, block_time_s)
    wallets = [load_wallet(name, "default", folder / "wallets") for name in names]
    say("genesis: publishing epoch 0")
    found = _publish(made, folder, names[num_miners], endpoint, token, chain_endpoint)
    record = {
        "run_id": found,
        "netuid": NETUID,
        "chain_endpoint": chain_endpoint,
        "hub_endpoint": endpoint,
        "hub_repo": made.recipe.hub.repo,
        "block_time_s": block_time_s,
        "wallets": [
            {
                "name": name,
                "hotkey_name": "default",
                "role": "miner" if name.startswith("miner") else "validator",
                "ss58": WalletIdentity(wallet).hotkey,
            }
            for name, wallet in zip(names, wallets, strict=True)
        ],
    }
    temporary = folder / "genesis.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(folder / "genesis.json")
    blocks = made.recipe.schedule
    say(
        f"genesis: run {found[:12]}, val loss {made.val_loss:.3f}, {blocks.round_blocks} blocks of {block_time_s:g} s "
        f"a round, done in {time.perf_counter() - started:.1f} s"
    )


def _publish(made: Made, folder: Path, owner: str, endpoint: str, token: str | None, chain_endpoint: str) -> str:
    """Publish epoch 0 as the wallet ``owner``, anchor it on chain, and return the run's id."""
    wallet = load_wallet(owner, "default", folder / "wallets")
    identity = WalletIdentity(wallet)
    found = run_id(made.recipe, made.tokenizer_sha256, state_hash(made.state))
    manifest = Manifest(
        run_id=found,
        epoch=0,
        round=-1,
        parent="",
        schema_hash=made.schema_hash,
        state_hash=state_hash(made.state),
        files=file_entries(made.files),
        val_loss=made.val_loss,
        block=0,
        nonce=secrets.token_hex(16),
        leader=identity.hotkey,
    )
    repo = made.recipe.hub.repo
    ref = HubStore(endpoint=endpoint, repo=repo, token=token).publish(sign_manifest(manifest, identity), made.files)
    anchor = Anchor(run_id=bytes.fromhex(found), repo=repo, epoch=0, manifest=bytes.fromhex(ref.manifest_sha256))
    with Chain(network="local", netuid=NETUID, wallet=wallet, chain_endpoint=chain_endpoint) as chain:
        chain.commit(anchor.to_bytes())
    return found


def _make(
    recipe: Recipe,
    folder: Path,
    block_time_s: float,
    load: float,
    num_validators: int,
    say: Callable[[str], None],
) -> Made:
    dataset = LocalDataset(folder / "corpus")
    index = build_index(
        dataset, recipe.data.repo, recipe.data.revision, recipe.data.config, recipe.data.heldout_row_groups
    )
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, index_sha256=index.sha256()))
    reader = SegmentReader(dataset, recipe.data.text_column)
    say("genesis: training the tokenizer")
    texts = [text for group in index.train for text in reader.read(group)]
    save_tokenizer(train_tokenizer(texts, recipe.model.vocab_size), folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    say("genesis: drawing the model and timing this machine")
    base = load_base(recipe.model, None, len(tokenizer))
    published_base = base_files(base)
    base_digest = base_sha256(base)
    model = attach_adapter(base, recipe.adapter, recipe.model.seed)
    flat = FlatVector(model)
    state = genesis_state(flat, base_digest, outer_momentum=recipe.outer.kind == "nesterov")
    data = load_round(reader, index, tokenizer, run_id="0" * 64, round_number=0, rank=0, data=recipe.data)
    work = InnerLoop(model, flat, recipe, "cpu").run(state, data.batch, num_steps=CALIBRATION_STEPS)
    step_s = load * work.compute_seconds / work.num_steps
    recipe = dataclasses.replace(recipe, schedule=_schedule(recipe, step_s, block_time_s, num_validators))
    heldout = load_heldout(reader, index, tokenizer, recipe.data)
    loss = heldout_loss(model, flat, state.vector, heldout, "cpu")
    files = state_files(state, flat)
    files |= {BASE_PREFIX + name: content for name, content in published_base.items()}
    files |= {
        TOKENIZER_PREFIX + path.name: path.read_bytes()
        for path in sorted((folder / "tokenizer").iterdir())
        if path.is_file()
    }
    files[RECIPE_NAME] = recipe.to_toml().encode()
    files[INDEX_NAME] = index.to_json()
    return Made(
        recipe=recipe,
        files=files,
        state=state,
        schema_hash=schema_hash(flat.entries, recipe),
        tokenizer_sha256=tokenizer_sha256(folder / "tokenizer"),
        val_loss=loss,
    )


def _schedule(recipe: Recipe, step_s: float, block_time_s: float, num_validators: int) -> Schedule:
    """Phase lengths for a machine that takes ``step_s`` seconds for an inner step, with a margin.

    With several validators ALL_REDUCE and PUBLISH have room for those that take over from a silent leader.
    """

    def blocks(seconds: float, least: int) -> int:
        return max(least, math.ceil(seconds / block_time_s))

    train_s = MARGIN * step_s * recipe.inner.max_steps
    replay_s = MARGIN * step_s * recipe.inner.snapshot_every * 2 + 2.0
    takeovers_s = PATIENCE_S * (min(num_validators, MAX_SITTING) - 1)
    return Schedule(
        start_block=1,
        block_time_s=block_time_s,
        train=blocks(train_s, 3),
        commit=blocks(3.0, 2),
        verify=blocks(replay_s, 3),
        all_reduce=blocks(8.0 + takeovers_s, 3),
        publish=blocks(5.0 + takeovers_s, 3),
        leader_patience=blocks(PATIENCE_S, 1),
    )


def _make_chain(folder: Path, names: list[str], made: Made, block_time_s: float) -> str:
    path = folder / "chain.db"
    for leftover in folder.glob("chain.db*"):  # of a genesis that was cut short
        leftover.unlink()
    ledger = create_local_chain(path, netuid=NETUID, tempo=made.recipe.schedule.round_blocks, block_time_s=block_time_s)
    for name in names:
        wallet = load_wallet(name, "default", folder / "wallets", create=True)
        hotkey = WalletIdentity(wallet).hotkey
        ledger.register(hotkey, wallet.coldkeypub.ss58_address)
        if name.startswith("validator"):
            ledger.fund(hotkey, VALIDATOR_STAKE)
    ledger.close()
    return f"sqlite://{path}"


if __name__ == "__main__":
    sys.exit(main())
