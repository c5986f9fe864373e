"""A miner that cheats, in the real network: `neurons/miner.py` with the hooks of a `Cheat` in it.

    python -m bench.attacks.miner --attack NAME --netuid 1 --wallet.name miner ...
    python -m bench.attacks.miner --names

All flags but ``--attack`` are a miner's. `hivetrain up --attack NAME` starts one beside two honest ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make the checkout importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.attacks.catalogue import CATALOGUE
from bench.attacks.catalogue import make_cheat as make_listed
from bench.attacks.cheat import Cheat, Scene
from hivetrain.averaging.group import GroupPlan
from hivetrain.averaging.transport import Transport
from hivetrain.contribution import Contribution
from hivetrain.data.reader import RoundData
from hivetrain.errors import HivetrainError, ServiceError
from hivetrain.manifest import Ref
from hivetrain.progress import Position
from hivetrain.training.inner import Batches, RoundWork, StepReport
from hivetrain.training.state import State
from neurons.main import run_neuron
from neurons.miner import Miner
from template.anchor import parse_anchors
from template.axon import Caller
from template.chain.keys import verify
from template.handlers import Handlers
from template.participant import Participation
from template.protocol import AllReduce, Train, TrainReply
from template.validator.collect import address_of
from template.validator.publish import file_entries, sign_manifest

logger = logging.getLogger(__name__)

MEDDLE_TIMEOUT_S = 3.0


class CallsWithoutPermit(Cheat):
    """Honest work; calls every miner to an all-reduce of its own in every round."""

    def meddle(self, miner: CheatingMiner) -> None:
        """Say what the others answer."""
        others = [address_of(one) for one in miner.miners(miner.position.round_start) if one.uid != miner.uid]
        report = miner.board.report
        synapse = AllReduce(
            run_id=miner.run_id, round=report.round, attempt=0, plan=b"", base_manifest=report.base_manifest
        )
        calls = miner.dendrite.call_many(others, synapse, timeout_s=MEDDLE_TIMEOUT_S)
        for reply in miner.network.run(calls, MEDDLE_TIMEOUT_S + 5):
            logger.info("called %s to an all-reduce: %s", reply.hotkey[:8], reply.detail or reply.reply)


class TagsTheNextEpoch(Cheat):
    """Honest work; tags the next epoch at the hub before its leader does, and stands for it on chain."""

    def meddle(self, miner: CheatingMiner) -> None:
        """Publish what nobody computed."""
        assert miner.held is not None
        base = miner.held.ref
        files = {"adapter.safetensors": b"nobody computed this"}
        manifest = base.manifest.model_copy(
            update={"epoch": base.epoch + 1, "files": file_entries(files), "leader": miner.identity.hotkey}
        )
        ref = miner.store.publish(sign_manifest(manifest, miner.identity), files)
        miner.announce(ref.epoch, ref.manifest_sha256)
        logger.info("tagged epoch %d", ref.epoch)


IN_THE_NETWORK: dict[str, Callable[[str], CallsWithoutPermit | TagsTheNextEpoch]] = {
    "no-permit": lambda name: CallsWithoutPermit(name, "calls every miner to an all-reduce without a permit"),
    "stolen-token": lambda name: TagsTheNextEpoch(name, "tags the next epoch at the hub before its leader does"),
}
"""What a miner can do only where there is a hub and a chain."""


def make_cheat(name: str) -> Cheat:
    """A fresh cheat of that name, of the catalogue or of the network; raises as `catalogue.make_cheat`."""
    return IN_THE_NETWORK[name](name) if name in IN_THE_NETWORK else make_listed(name)


class BentHandlers(Handlers):
    """The miner's handlers, whose answers to Train pass through the cheat: receipts, and what is opened with one."""

    def __init__(self, real: Handlers, cheat: Cheat, late_s: float) -> None:
        self.__dict__.update(real.__dict__)
        self._cheat = cheat
        self._late_s = late_s
        self._asked = 0

    async def train(self, synapse: Train, caller: Caller) -> TrainReply:
        reply = await super().train(synapse, caller)
        if reply.receipt is not None:
            self._asked += 1
            reply = reply.model_copy(update={"receipt": self._cheat.receipt(self._asked - 1, reply.receipt)})
        if reply.status != "opened":
            return reply
        answer = await asyncio.to_thread(self._cheat.answer, synapse, reply)
        if answer is None:
            await asyncio.sleep(self._late_s)
        return answer or reply


class CheatingMiner(Miner):
    """Does what its `cheat` says."""

    cheat: Cheat

    def start(self) -> None:
        """Open everything, and run the cheat's own code from here on."""
        for patch in self.cheat.patches():
            real = getattr(patch.module, patch.name)

            def bad(*args: Any, _real: Any = real, _bad: Any = patch.bad, **kwargs: Any) -> Any:
                return _bad(_real, *args, **kwargs)

            setattr(patch.module, patch.name, bad)
        self._seen: list[State] = []
        super().start()
        logger.info("this miner cheats: %s (%s)", self.cheat.what, self.cheat.name)

    def begin_round(self, position: Position, base: Ref) -> None:
        """As every neuron does; then whatever the cheat does to the run itself."""
        super().begin_round(position, base)
        self._announce_another()  # when we started, the others may not have been there
        if isinstance(self.cheat, CallsWithoutPermit | TagsTheNextEpoch):
            try:
                self.cheat.meddle(self)
            except HivetrainError as exc:
                logger.info("the attack failed: %s", exc)

    def make_handlers(self) -> Handlers:
        """Handlers that answer as the cheat does."""
        late_s = self.schedule.verify * self.schedule.block_time_s
        return BentHandlers(super().make_handlers(), self.cheat, late_s)

    def load_data(self, round_number: int, rank: int) -> RoundData:
        """The assigned tokens; and a note of who we are in this round."""
        self._place = round_number, rank
        return super().load_data(round_number, rank)

    def do_steps(
        self,
        state: State,
        data: RoundData,
        num_steps: int,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepReport], None],
    ) -> RoundWork:
        """What the cheat has to show."""
        if not self._seen or self._seen[-1] is not state:
            self._seen = [*self._seen[-1:], state]
        self._scene = self._make_scene(state, data, num_steps)
        self._tokens = 0
        work = self.cheat.train(self._scene)
        whole = num_steps * self.parts.recipe.data.batch_size * self.parts.recipe.data.seq_len
        logger.info("worked %d of %d tokens", self._tokens, whole)  # `bench.attacks.network` reads it
        return work

    def contribute(self, round_number: int, rank: int, data: RoundData, work: RoundWork) -> Contribution:
        """What the cheat commits to."""
        return self.cheat.commit(self._scene, work)

    def _make_scene(self, state: State, data: RoundData, num_steps: int) -> Scene:
        assert self.held is not None
        round_number, rank = self._place
        victim = next(
            (place for n in self.miners(self.position.round_start) if (place := self._rank_of(n.hotkey)) != rank), rank
        )

        def run(state: State, batches: Batches, *, num_steps: int, first_step: int = 0) -> RoundWork:
            work = self.parts.loop.run(
                state, batches, num_steps=num_steps, first_step=first_step, should_stop=self.stopping.is_set
            )
            self._tokens += work.num_tokens
            return work

        def stolen() -> RoundWork:  # nobody leaks here: computed, which gives the same bytes
            theirs = self.bench.round_data(self.parts, round_number, victim)
            return self.parts.loop.run(state, theirs.batch, num_steps=num_steps)

        return Scene(
            parts=self.parts,
            base=self.held.ref,
            state=state,
            previous=self._seen[0] if len(self._seen) > 1 else None,
            data=data,
            round_number=round_number,
            rank=rank,
            num_steps=num_steps,
            identity=self.identity,
            remainder=self.feedback.remainder(self.held.ref.manifest),
            run=run,
            load_data=lambda other: self.bench.round_data(self.parts, round_number, other),
            victim=victim,
            stolen=stolen,
        )

    def _rank_of(self, hotkey: str) -> int:
        return self.ranks(self.position.round_start).get(hotkey, -1)

    def transport(self, plan: GroupPlan) -> Transport:
        """The cheat's."""
        return self.cheat.transport(super().transport(plan), plan)

    def take_part(self, plan: GroupPlan, contribution: Contribution | None) -> Participation:
        """The all-reduce, with what the cheat brings to it and does beside it."""
        if contribution is not None:
            contribution = replace(contribution, payload=self.cheat.bring(contribution))
        beside = self.network.submit(self.cheat.beside(plan, self.identity, super().transport(plan), verify))
        try:
            return super().take_part(plan, contribution)
        finally:
            beside.cancel()

    def announce(self, epoch: int | None = None, manifest: str | None = None) -> None:
        """Announce ourselves, and then whoever the cheat says that we are."""
        super().announce(epoch, manifest)
        self._announce_another()

    def _announce_another(self) -> None:
        with contextlib.suppress(ServiceError):  # there is another round
            anchors = parse_anchors(self.chain.commitments())
            if self.identity.hotkey not in anchors:
                return
            mine, permitted = anchors[self.identity.hotkey][1], set(self.validators())
            others = [
                anchor.peer_id
                for hotkey, (_, anchor) in sorted(anchors.items())
                if hotkey != self.identity.hotkey and hotkey not in permitted and anchor.peer_id
            ]
            said = self.cheat.peer_id(mine.peer_id, others)
            if said != mine.peer_id:
                self.chain.commit(mine.model_copy(update={"peer_id": said}).to_bytes())


def main(argv: list[str] | None = None) -> int:
    """``--names`` lists the attacks; ``--attack NAME`` and a miner's flags run one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--names" in arguments:
        print("\n".join(f"{name}\t{make_cheat(name).what}" for name in (*CATALOGUE, *IN_THE_NETWORK)))
        return 0
    try:
        place = arguments.index("--attack")
        name = arguments[place + 1]
    except (ValueError, IndexError):
        print("error: --attack NAME is missing; --names lists them", file=sys.stderr)
        return 2
    del arguments[place : place + 2]
    try:
        cheat = make_cheat(name)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return run_neuron("miner", type("CheatingMiner", (CheatingMiner,), {"cheat": cheat}), arguments)


if __name__ == "__main__":
    sys.exit(main())
