"""Attacks in which there is no work at all: on the hub, on the leader's place, on the group from outside.

Each is one function that does the deed against production code and returns what stops it, in words; an empty string
means that nothing did.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.attacks.rounds import HonestRound
from bench.attacks.world import VALIDATOR, World
from bench.inmemory import Key, verify
from hivetrain.averaging.group import GroupPlan
from hivetrain.errors import HivetrainError
from hivetrain.hub.memory import MemoryStore
from hivetrain.manifest import Manifest, Ref, state_message
from hivetrain.workbench import RECIPE_NAME, TOKENIZER_PREFIX, Workbench
from template.acceptance import why_unacceptable
from template.access import AccessPolicy, NeuronFacts
from template.anchor import Anchor, candidates, find_base
from template.axon import Caller
from template.board import Board
from template.handlers import Handlers
from template.leader import Leaders
from template.protocol import AllReduce
from template.validator.lead import make_synapse
from template.validator.publish import file_entries, put_epoch, sign_manifest

Deed = Callable[[World, "list[HonestRound]"], str]
THIEF = Key(999)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """One such attack.

    Attributes:
        what: what it does, in one sentence.
        do: does it, and says what stops it.
    """

    name: str
    what: str
    do: Deed


def call_without_permit(world: World, rounds: list[HonestRound]) -> str:
    """A registered hotkey without a permit calls a group together."""
    now = rounds[-1]
    facts = {THIEF.hotkey: NeuronFacts(uid=9, stake=0.0, validator_permit=False)}
    decision = AccessPolicy(registry=facts.get).check(THIEF.hotkey, AllReduce.route)
    reply = asyncio.run(
        _handlers(world, now).all_reduce(
            make_synapse(now.seen[0], now.base.manifest_sha256),
            Caller(hotkey=THIEF.hotkey, host="127.0.0.1", uid=9, stake=0.0, validator_permit=False),
        )
    )
    if decision.allowed or reply.accepted:
        return ""
    return f"{decision.status} {decision.reason}; behind that: {reply.detail}"


def _handlers(world: World, now: HonestRound) -> Handlers:
    board = Board()
    board.begin_round(now.number, now.base.epoch, now.base.manifest_sha256)
    leaders = Leaders(world.parts.recipe.schedule)
    leaders.learn(now.number, "seed", {VALIDATOR.hotkey: 1.0})
    block = leaders.draw_block(now.number) + world.parts.recipe.schedule.verify
    return Handlers(
        role="miner",
        run_id=world.parts.run_id,
        identity=now.keys[0],
        board=board,
        layout=world.parts.layout,
        averaging=world.parts.recipe.averaging,
        why_not_leader=lambda hotkey, number, attempt, want: leaders.why_not(hotkey, number, attempt, want, block),
    )


def invent_a_state(world: World, rounds: list[HonestRound]) -> str:
    """The rightful leader publishes a state that nobody computed, under signatures of keys that it made up."""
    plan = rounds[-1].seen[0]
    made_up = [Key(5000 + place) for place in range(3)]
    why = _why_refused(world, _invented_manifest(world, rounds[-1], plan, made_up), plan)
    if not why:
        return ""
    alone = _why_refused(world, _invented_manifest(world, rounds[-1], plan, ()), plan)
    return f"{why}; without them: {alone}" if alone else ""


def _invented_manifest(
    world: World, now: HonestRound, plan: GroupPlan, signers: tuple[Key, ...] | list[Key]
) -> Manifest:
    digest = "5" * 64
    message = state_message(plan.run_id, plan.round, plan.attempt, digest)
    weights = {key.hotkey: 40.0 for key in (signers or now.keys)}
    manifest = now.base.manifest.model_copy(
        update={
            "epoch": now.base.epoch + 1,
            "round": plan.round,
            "parent": now.base.manifest_sha256,
            "state_hash": digest,
            "weights": weights,
            "members": tuple(sorted(weights)),
            "signatures": {key.hotkey: key.sign(message).hex() for key in signers},
            "leader": VALIDATOR.hotkey,
        }
    )
    return sign_manifest(manifest, VALIDATOR)


def _why_refused(world: World, manifest: Manifest, plan: GroupPlan) -> str:
    registered = {member.hotkey for member in plan.members}
    return (
        why_unacceptable(
            manifest,
            run_id=world.parts.run_id,
            schema_hash=world.parts.schema_hash,
            quorum=world.parts.recipe.gates.quorum,
            registered=registered.__contains__,
            base_epoch=world.parts.recipe.adapter.base_epoch,
            why_no_publisher=lambda hotkey, number, attempt: None if hotkey == VALIDATOR.hotkey else "not its turn",
            verify=verify,
        )
        or ""
    )


def steal_the_token(world: World, rounds: list[HonestRound]) -> str:
    """A thief with the hub's token tags the next epoch first and one far ahead, and puts other bytes under one."""
    now = rounds[-1]
    store, true = _copy_of(world, now), world.store.resolve(now.base.epoch + 1)
    assert true is not None
    false_state = {name: b"\0" * entry.size_bytes for name, entry in now.base.manifest.files.items()}
    false = now.base.manifest.model_copy(update={"files": file_entries(false_state), "leader": THIEF.hotkey})
    for epoch in (true.epoch, true.epoch + 900):
        store.publish(sign_manifest(false.model_copy(update={"epoch": epoch}), THIEF), false_state)
    if _base_of(world, store, now.base).manifest_sha256 != now.base.manifest_sha256:
        return ""
    files = {name: world.store.read(true, name) for name in true.manifest.files}
    put_epoch(store, true.manifest, files, why_refused=lambda one: _why_refused(world, one, now.seen[0]) or None)
    if store.latest() != true or _base_of(world, store, true) != true:
        return ""
    store.corrupt(true, "adapter.safetensors")
    try:
        with tempfile.TemporaryDirectory() as folder:
            _bench(store, Path(folder), world).load_state(true, world.parts)
    except HivetrainError as exc:
        return f"what is not anchored is no base; the leader removes what nobody may follow, and publishes; {exc}"
    return ""


def _base_of(world: World, store: MemoryStore, anchored: Ref) -> Ref:
    """What a node starts from where a validator anchored ``anchored``."""
    anchor = Anchor(
        peer_id="validator",
        run_id=bytes.fromhex(world.parts.run_id),
        repo="bench/attacks",
        epoch=anchored.epoch,
        manifest=bytes.fromhex(anchored.manifest_sha256),
    )
    found = candidates({VALIDATOR.hotkey: (1, anchor)}, {VALIDATOR.hotkey}, world.parts.run_id)
    return find_base(found, 100, store.resolve, lambda _: None)


def _copy_of(world: World, now: HonestRound) -> MemoryStore:
    store = MemoryStore()
    for epoch in {0, now.base.epoch}:
        ref = world.store.resolve(epoch)
        assert ref is not None
        store.publish(ref.manifest, {name: world.store.read(ref, name) for name in ref.manifest.files})
    return store


def _bench(store: MemoryStore, folder: Path, world: World) -> Workbench:
    def no_dataset(repo: str, revision: str) -> object:
        raise AssertionError("a poisoned run must be refused before its data is read")

    return Workbench(store=store, open_dataset=no_dataset, cache=folder, device=torch.device("cpu"))  # type: ignore[arg-type]


def poison_the_recipe(world: World, rounds: list[HonestRound]) -> str:
    """The hub serves another learning rate in epoch 0."""
    raw = world.store.read(world.genesis, RECIPE_NAME)
    return _poisoned(world, {RECIPE_NAME: raw.replace(b"\nlr = 0.01\n", b"\nlr = 10.0\n")})


def poison_the_tokenizer(world: World, rounds: list[HonestRound]) -> str:
    """The hub serves another tokenizer in epoch 0."""
    name = TOKENIZER_PREFIX + "tokenizer.json"
    raw = world.store.read(world.genesis, name)
    return _poisoned(world, {name: raw.replace(b'"a"', b'"A"', 1)})


def _poisoned(world: World, changed: Mapping[str, bytes]) -> str:
    """Open a genesis with other files and a manifest that agrees with them, against the run id on chain."""
    manifest = world.genesis.manifest
    files = {name: world.store.read(world.genesis, name) for name in manifest.files}
    assert all(files[name] != content for name, content in changed.items())
    files |= changed
    poisoned = manifest.model_copy(update={"files": file_entries(files), "leader": THIEF.hotkey})
    store = MemoryStore()
    store.publish(sign_manifest(poisoned, THIEF), files)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _bench(store, Path(folder), world).open(world.parts.run_id)
    except HivetrainError as exc:
        return str(exc)
    return ""


OUTSIDE: tuple[Outside, ...] = (
    Outside(
        name="no-permit",
        what="a validator that is not permitted calls AllReduce",
        do=call_without_permit,
    ),
    Outside(
        name="invented-state",
        what="a leader publishes a state that nobody computed",
        do=invent_a_state,
    ),
    Outside(
        name="stolen-token",
        what="a stolen hub token tags the next epoch first, and replaces a file of another",
        do=steal_the_token,
    ),
    Outside(name="poisoned-recipe", what="the hub serves another recipe", do=poison_the_recipe),
    Outside(name="poisoned-tokenizer", what="the hub serves another tokenizer", do=poison_the_tokenizer),
)
