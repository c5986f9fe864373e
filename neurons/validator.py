"""A validator: collects receipts, checks a sample by replaying it, leads the averaging, publishes, pays.

    python neurons/validator.py --netuid 1 --wallet.name validator --wallet.hotkey default --axon.port 8090

One round, as `Validator.round` tells it. Every validator checks and scores for itself; one of them, drawn by
stake from a block hash, leads the all-reduce and publishes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make the checkout importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from hivetrain.errors import ServiceError
from hivetrain.manifest import Ref
from hivetrain.progress import Phase, Position
from hivetrain.scoring import CheckResult, MovingAverage, Score, Unscored
from hivetrain.tracking import metrics
from hivetrain.verification.receipt import Expected, Receipt
from neurons.main import run_neuron
from template.anchor import candidates, parse_anchors
from template.chain.client import NeuronInfo
from template.chain.keys import verify
from template.leader import MAX_SITTING
from template.neuron import Neuron
from template.protocol import IsAlive
from template.validator.collect import Collected, address_of, collect_receipts
from template.validator.lead import Led, call_group, count_signatures, make_plan, make_synapse
from template.validator.publish import NotPublished, check_gates, publish_epoch
from template.validator.reward import round_weights, score_miners
from template.validator.verify import Draw, Verifier, draw
from template.validator.weights import set_weights

logger = logging.getLogger(__name__)

AWAKE_TIMEOUT_S = 2.0
REST_ROUNDS = 3


@dataclass(slots=True, kw_only=True)
class RoundNotes:
    """What one round has given so far."""

    miners: list[NeuronInfo]
    coins: bytes
    collected: Collected = field(default_factory=Collected)
    draws: dict[str, Draw] = field(default_factory=dict)
    checks: dict[str, CheckResult | None] = field(default_factory=dict)
    led: Led | None = None


class Validator(Neuron):
    """Checks, leads, publishes and pays."""

    def run(self) -> None:
        """Round after round, until told to stop."""
        self.average = MovingAverage(self.config.state_dir / "averages.json", self.recipe.scoring)
        self.average.load()
        self._resting: dict[str, int] = {}  # until which round a member reduces nothing, for it left a part undone
        super().run()

    def round(self, position: Position) -> None:
        """One round of this validator."""
        base = self.find_base(position)
        self.adopt(base)
        self.board.begin_round(position.round, base.epoch, base.manifest_sha256)
        self.status.update(round=position.round, epoch=base.epoch, loss=base.manifest.val_loss)
        self._stand_for(base)
        self._anchor_orphan(base)
        notes = RoundNotes(miners=self.miners(position.round_start), coins=secrets.token_bytes(32))
        self._say("waiting", "for receipts")
        if self.wait_for_phase(position, Phase.COMMIT):
            self.collect(position, base, notes)
        if self.wait_for_phase(position, Phase.VERIFY):
            self.verify(position, notes)
        if self.wait_for_phase(position, Phase.ALL_REDUCE):
            self.average_group(position, base, notes)
        if self.stopping.is_set():
            return
        self.score(position, notes)
        if self.wait_for_phase(position, Phase.PUBLISH):
            self._say("waiting", "for the next epoch")
            self.wait_for_epoch(position)

    # -- COMMIT and VERIFY --------------------------------------------------------------------------------

    def collect(self, position: Position, base: Ref, notes: RoundNotes) -> None:
        """Ask for receipts until COMMIT ends."""
        self._say("committing", f"asking {len(notes.miners)} miners")
        end = position.round_start + self.schedule.train + self.schedule.commit

        def keep_waiting() -> bool:
            self.drain_mailbox()
            self.stopping.wait(min(0.5, self.schedule.block_time_s / 2))
            return self.blocks.block < end and not self.stopping.is_set()

        ranks = self.ranks(position.round_start)
        notes.collected = collect_receipts(
            miners=notes.miners,
            expected={n.hotkey: self._expected(position, base, n.hotkey, ranks[n.hotkey]) for n in notes.miners},
            run_id=self.run_id,
            round_number=position.round,
            coins_digest=hashlib.sha256(notes.coins).digest(),
            dendrite=self.dendrite,
            network=self.network,
            verify=verify,
            keep_waiting=keep_waiting,
            time_left_s=lambda: (end - self.blocks.block) * self.schedule.block_time_s,
        )
        receipts, refused = notes.collected.receipts, notes.collected.refused
        logger.info("round %d: %d receipts, %d refused", position.round, len(receipts), len(refused))
        stale = [why for why in refused.values() if "freshness window" in why or "in the future" in why]
        if stale and not receipts:
            logger.error("check your clock: the miners refuse our requests, %s", stale[0])

    def _expected(self, position: Position, base: Ref, hotkey: str, rank: int) -> Expected:
        data, inner = self.recipe.data, self.recipe.inner
        samples = data.batch_size * data.accumulation
        return Expected(
            run_id=self.run_id,
            round=position.round,
            epoch=base.epoch,
            base_manifest=base.manifest_sha256,
            base_state=base.manifest.state_hash,
            schema_hash=self.parts.schema_hash,
            layout_hash=self.parts.layout.layout_hash,
            num_chunks=self.parts.layout.num_chunks,
            rank=rank,
            max_steps=inner.max_steps,
            snapshot_every=inner.snapshot_every,
            samples_per_step=samples,
            tokens_per_step=samples * data.seq_len,
            feeds_back=self.recipe.averaging.feeds_back,
            was_in=hotkey in base.manifest.receipts,
        )

    def verify(self, position: Position, notes: RoundNotes) -> None:
        """Draw, open and replay, as far as VERIFY's time goes."""
        assert self.held is not None
        start = position.round_start + self.schedule.train + self.schedule.commit
        end = start + self.schedule.verify
        self.leaders(position.round)
        block_hash = self.chain.block_hash(start)
        for hotkey, receipt in notes.collected.receipts.items():
            notes.draws[hotkey] = draw(
                block_hash=block_hash,
                validator=self.identity.hotkey,
                miner=hotkey,
                coins=notes.coins,
                num_snapshots=receipt.num_snapshots,
                scoring=self.recipe.scoring,
            )
        addresses = {neuron.hotkey: address_of(neuron) for neuron in notes.miners}
        drawn = sum(1 for one in notes.draws.values() if one.windows)
        self._say("verifying", f"{drawn} of {len(notes.draws)} miners drawn")
        verifier = Verifier(
            parts=self.parts,
            base=self.held.ref,
            state=self.held.state,
            round_number=position.round,
            coins=notes.coins,
            dendrite=self.dendrite,
            network=self.network,
            load_data=lambda rank: self.bench.round_data(self.parts, position.round, rank),
            address=addresses.__getitem__,
            in_time=lambda: self.blocks.block < end - 1 and not self.stopping.is_set(),
        )
        notes.checks = verifier.check(notes.collected.receipts, notes.draws)

    # -- ALL_REDUCE and PUBLISH ---------------------------------------------------------------------------

    def average_group(self, position: Position, base: Ref, notes: RoundNotes) -> None:
        """Lead the all-reduce and publish, or sit in it while another validator leads."""
        order = self.leaders(position.round)
        if not order or order[0] != self.identity.hotkey:
            self._say("all-reduce", "sitting")
            self.wait_for_phase(position, Phase.PUBLISH)
            return
        weights = round_weights(notes.collected.receipts, notes.checks, self.average, position.round)
        plan = make_plan(
            parts=self.parts,
            round_number=position.round,
            attempt=0,
            receipts=notes.collected.receipts,
            weights=weights,
            sitting=self._awake(order[:MAX_SITTING]),
            resting={hotkey for hotkey, until in self._resting.items() if position.round < until},
            anchors={hotkey: anchor for hotkey, (_, anchor) in parse_anchors(self.chain.commitments()).items()},
            duration_s=0.8 * self.schedule.all_reduce * self.schedule.block_time_s,
        )
        if plan is None:
            logger.warning("round %d: nobody has anything to average", position.round)
            self.events.append("round_failed", f"round {position.round}: no receipts", round=position.round)
            return
        self._say("all-reduce", f"leading {len(plan.members) - 1} members")
        neurons = {neuron.hotkey: neuron for neuron in self.metagraph.neurons}
        others = [address_of(neurons[m.hotkey]) for m in plan.members if m.hotkey != self.identity.hotkey]
        calls = self.network.submit(
            call_group(self.dendrite, others, make_synapse(plan, base.manifest_sha256), plan.deadline_s + 12)
        )
        done = self.take_part(plan, None)
        if done.outcome is not None:
            missing = {part.reducer.hotkey for part in plan.parts() if part.index in done.outcome.missing_parts}
            self._resting.update(dict.fromkeys(missing - {self.identity.hotkey}, position.round + 1 + REST_ROUNDS))
        notes.led = count_signatures(plan, done, calls.result(plan.deadline_s + 20), verify)
        self.publish(position, base, notes.led, notes.collected.receipts)

    def _awake(self, sitting: list[str]) -> list[str]:
        """Those of ``sitting`` that answer now: a seat that stays empty would cost the group a part of the mean."""
        neurons = {neuron.hotkey: neuron for neuron in self.metagraph.neurons}
        others = [address_of(neurons[h]) for h in sitting if h in neurons and h != self.identity.hotkey]
        calls = self.dendrite.call_many(others, IsAlive(), timeout_s=AWAKE_TIMEOUT_S)
        awake = {reply.hotkey for reply in self.network.run(calls, AWAKE_TIMEOUT_S + 2) if reply.ok}
        return [hotkey for hotkey in sitting if hotkey == self.identity.hotkey or hotkey in awake]

    def publish(self, position: Position, base: Ref, led: Led, receipts: Mapping[str, Receipt]) -> None:
        """Pass the gates, tag, anchor; a refusal makes no epoch."""
        if led.done.state is None:
            self.events.append("round_failed", f"round {position.round}: {led.done.detail}", round=position.round)
            return
        self._say("publishing", f"epoch {led.done.state.epoch}")
        val_loss = self.bench.heldout_loss(self.parts, led.done.state.vector)
        try:
            check_gates(self.parts, led, val_loss, base.manifest.val_loss)
            ref = publish_epoch(
                store=self.store,
                parts=self.parts,
                base=base,
                led=led,
                val_loss=val_loss,
                block=self.blocks.block,
                identity=self.identity,
                receipts=receipts,
            )
            self.announce(epoch=ref.epoch, manifest=ref.manifest_sha256)
        except (NotPublished, ServiceError) as exc:  # the round is scored all the same
            logger.warning("round %d makes no epoch: %s", position.round, exc)
            self.events.append("round_failed", f"round {position.round}: {exc}", round=position.round)
            return
        self._log_epoch(ref, led)
        try:
            self.store.prune(self.recipe.hub.keep_epochs)
        except ServiceError as exc:
            logger.warning("old epochs stay on the hub for now: %s", exc)

    def _log_epoch(self, ref: Ref, led: Led) -> None:
        outcome = led.done.outcome
        assert outcome is not None
        manifest = ref.manifest
        self.status.update(loss=manifest.val_loss)
        text = f"epoch {ref.epoch}: val loss {manifest.val_loss:.3f}, {len(manifest.members)} members"
        logger.info("published %s", text)
        self.events.append(
            "published", text, epoch=ref.epoch, val_loss=manifest.val_loss, members=len(manifest.members)
        )
        self.tracker.log(
            {
                metrics.GLOBAL_EPOCH: ref.epoch,
                metrics.GLOBAL_SAMPLES: manifest.total_samples,
                metrics.VAL_LOSS: manifest.val_loss,
                metrics.ALLREDUCE_SECONDS: outcome.seconds,
                metrics.ALLREDUCE_BYTES_SENT: outcome.bytes_sent,
                metrics.ALLREDUCE_BYTES_RECEIVED: outcome.bytes_received,
                metrics.ALLREDUCE_FAULTS: len(outcome.faults),
                metrics.ALLREDUCE_MEMBERS: len(manifest.members),
            },
            step=manifest.round,
        )

    def _stand_for(self, base: Ref) -> None:
        """Anchor the base ourselves when its leader did: the run must not hang on one validator's commitment."""
        mine = parse_anchors(self.chain.commitments()).get(self.identity.hotkey)
        if mine is None or mine[1].epoch < base.epoch:
            self.announce(epoch=base.epoch, manifest=base.manifest_sha256)

    def _anchor_orphan(self, base: Ref) -> None:
        """An epoch that was tagged by a leader who died before its hash was on chain: anchor it for the next round."""
        newest = self.store.latest()
        if newest is None or newest.epoch <= base.epoch or newest.manifest.parent != base.manifest_sha256:
            return
        found = candidates(parse_anchors(self.chain.commitments()), set(self.validators()), self.run_id)
        if any(candidate.manifest_sha256 == newest.manifest_sha256 for candidate in found):
            return
        why = self._why_unacceptable(newest.manifest)
        if why is not None:
            logger.error("epoch %d lies on the hub and cannot be accepted: %s", newest.epoch, why)
            self.events.append("orphan_refused", f"epoch {newest.epoch} on the hub: {why}", epoch=newest.epoch)
            return
        logger.info("anchoring epoch %d, which its leader left unanchored", newest.epoch)
        self.announce(epoch=newest.epoch, manifest=newest.manifest_sha256)

    # -- scores -------------------------------------------------------------------------------------------

    def score(self, position: Position, notes: RoundNotes) -> None:
        """Score the round, average, keep, and set weights."""
        self._say("scoring", "")
        hotkeys = [neuron.hotkey for neuron in notes.miners]
        sat = self.sat if self.sat is not None and self.sat[0].round == position.round else None
        scores = score_miners(
            miners=hotkeys,
            collected=notes.collected,
            checks=notes.checks,
            plan=sat[0] if sat is not None else None,
            outcome=sat[1].outcome if sat is not None else None,
            average=self.average,
            round_number=position.round,
            scoring=self.recipe.scoring,
        )
        self.refresh_metagraph()
        registered = {neuron.hotkey for neuron in self.metagraph.neurons}
        self.average.update(position.round, scores, registered)
        shares = self.average.weights()
        self._keep_scores(position, scores, shares)
        if self.config.neuron.disable_set_weights:
            return
        weights = set_weights(self.chain, self.metagraph, self.uid, shares)
        if weights is not None:
            text = " ".join(f"{uid}:{weight:.3f}" for uid, weight in sorted(weights.items()))
            self.events.append("set_weights", f"weights {text}", round=position.round)

    def _keep_scores(self, position: Position, scores: dict[str, Score | Unscored], shares: dict[str, float]) -> None:
        uids = {neuron.hotkey: neuron.uid for neuron in self.metagraph.neurons}
        record: dict[str, object] = {}
        logged: dict[str, float | int | str] = {metrics.ROUND: position.round}
        for hotkey, score in scores.items():
            average = self.average.value(hotkey)
            member = f"uid-{uids.get(hotkey, -1)}"
            logged[metrics.per_member(metrics.WEIGHT, member)] = shares.get(hotkey, 0.0)
            if isinstance(score, Unscored):
                record[hotkey] = {"unscored": score.why, "ema": average}
                continue
            record[hotkey] = {
                "gradient": score.gradient,
                "steps": score.steps,
                "bandwidth": score.bandwidth,
                "score": score.score,
                "ema": average,
                "reasons": dict(score.reasons),
            }
            logged[metrics.per_member(metrics.SCORE, member)] = score.score
            logged[metrics.per_member(metrics.SCORE_GRADIENT, member)] = score.gradient
            logged[metrics.per_member(metrics.SCORE_STEPS, member)] = score.steps
            logged[metrics.per_member(metrics.SCORE_BANDWIDTH, member)] = score.bandwidth
        assert self.held is not None
        content = {"round": position.round, "epoch": self.held.ref.epoch, "scores": record, "weights": shares}
        path = self.config.state_dir / "scores.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)
        self.tracker.log(logged, step=position.round)


def main() -> None:
    """Parse the flags, run, and exit 0 when stopped, 2 for a setting that cannot work, 1 for anything else."""
    sys.exit(run_neuron("validator", Validator))


if __name__ == "__main__":
    main()
