"""A validator: collects receipts, checks a sample by replaying it, leads the averaging, publishes, pays.

    python neurons/validator.py --netuid 1 --wallet.name validator --wallet.hotkey default --axon.port 8090

One round, as `Validator.round` tells it. Every validator checks and scores for itself; one of them, drawn by
stake from a block hash, leads the all-reduce and publishes. Up to two others sit in it, and take over where the leader
is silent.
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

from hivetrain.contribution import expected_receipt
from hivetrain.errors import ServiceError
from hivetrain.manifest import Ref
from hivetrain.progress import Phase, Position, phase_window
from hivetrain.scoring import AverageState, MovingAverage, RoundFacts, Score, Unscored, score_facts
from hivetrain.scoring.record import RoundRecord
from hivetrain.tracking import metrics
from hivetrain.verification.receipt import Expected
from hivetrain.verification.worker import ReplayProcess, WorkerSpec
from neurons.leading import LeadingNeuron, RoundNotes
from neurons.main import run_neuron
from template.chain.keys import verify
from template.validator.collect import address_of, collect_receipts
from template.validator.records import RecordsThread, build_record, proven_averages
from template.validator.reward import gather_facts
from template.validator.verify import Verifier, draw
from template.validator.weights import set_weights

logger = logging.getLogger(__name__)

MIN_ANSWER_S = 2.0


class Validator(LeadingNeuron):
    """Checks, leads, publishes and pays."""

    def start(self) -> None:
        """Open everything, as `LeadingNeuron.start`, the process that replays, and the thread that publishes checks."""
        super().start()
        repo = self.config.hub.repo or self._repo
        self._last_record: RoundRecord | None = None
        folder, me = self.config.state_dir / "checks", self.identity.hotkey
        self.records = RecordsThread(self.store, repo, folder, me, verify, self.validators)
        now = self.position.round
        fix = f"check --hub.endpoint {self.hub_endpoint}"
        found = self._patiently(lambda: self.records.recover(self.run_id, now), fix)
        if found is not None:
            self.average.catch_up(found)
        self.records.start()
        spec = WorkerSpec(
            endpoint=self.hub_endpoint,
            repo=repo,
            token=self.secrets.hub_token,
            run_id=self.run_id,
            cache=self.config.cache_dir / "replay",
            device=str(self.bench.device),
        )
        self.replay = ReplayProcess(spec, on_wait=self.drain_mailbox)
        try:
            self.replay.start()
        except ServiceError as exc:  # tried again in every round; until then nobody is checked, and nobody pays for it
            logger.error("%s", exc)

    def close(self) -> None:
        """Take down what `start` opened."""
        if hasattr(self, "replay"):
            self.replay.close()
        if hasattr(self, "records"):
            self.records.close()
        super().close()

    def round(self, position: Position) -> None:
        """One round of this validator."""
        base = self.find_base(position)
        self.adopt(base)
        self.begin_round(position, base)
        self.status.update(round=position.round, epoch=base.epoch, loss=base.manifest.val_loss)
        self._stand_for(base)
        self._anchor_orphan(base)
        self.records.look_at(position.round - 1)
        start = position.round_start
        notes = RoundNotes(miners=self.miners(start), coins=secrets.token_bytes(32), ranks=self.ranks(start))
        self._prepare_replay(position, base)
        self._say("waiting", "for receipts")
        if self.wait_for_phase(position, Phase.COMMIT):
            self.collect(position, base, notes)
        if self.wait_for_phase(position, Phase.VERIFY):
            self.verify(position, notes)
        if self.wait_for_phase(position, Phase.ALL_REDUCE):
            self.average_group(position, base, notes)
        if self.stopping.is_set():
            return
        self.score(position, base, notes)
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

        notes.collected = collect_receipts(
            miners=notes.miners,
            expected={n.hotkey: self._expected(position, base, n.hotkey, notes.ranks[n.hotkey]) for n in notes.miners},
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
        return expected_receipt(self.parts, base, position.round, hotkey, rank)

    def _may_check(self, end: int) -> bool:
        """Whether there is time for another check before block ``end``."""
        return self.blocks.block < end - 1 and not self.stopping.is_set()

    def _prepare_replay(self, position: Position, base: Ref) -> None:
        """Let the process that replays load the round's state while the miners train."""
        end = phase_window(position.round, Phase.VERIFY, self.schedule)[1]
        try:
            self.replay.begin_round(base, position.round, lambda: self._may_check(end))
        except ServiceError as exc:  # nobody is checked, which is our own failure
            logger.error("round %d: %s", position.round, exc)

    def verify(self, position: Position, notes: RoundNotes) -> None:
        """Draw, open and replay, as far as VERIFY's time goes."""
        assert self.held is not None
        start = position.round_start + self.schedule.train + self.schedule.commit
        end = start + self.schedule.verify
        self.leader_order(position.round)
        notes.block_hash = self.chain.block_hash(start)
        notes.owed = frozenset(neuron.hotkey for neuron in notes.miners if self.average.owes(neuron.hotkey))
        for hotkey, receipt in notes.collected.receipts.items():
            notes.draws[hotkey] = draw(
                block_hash=notes.block_hash,
                validator=self.identity.hotkey,
                miner=hotkey,
                coins=notes.coins,
                num_snapshots=receipt.num_snapshots,
                scoring=self.recipe.scoring,
                owes=hotkey in notes.owed,
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
            in_time=lambda: self._may_check(end),
            answer_s=max(MIN_ANSWER_S, 0.5 * (end - self.blocks.block) * self.schedule.block_time_s),
            judging=self.replay,
            on_wait=self.drain_mailbox,
        )
        notes.checks = verifier.check(notes.collected.receipts, notes.draws)

    # -- scores -------------------------------------------------------------------------------------------

    def score(self, position: Position, base: Ref, notes: RoundNotes) -> None:
        """Score the round, average, keep, and set weights."""
        self._say("scoring", "")
        hotkeys = [neuron.hotkey for neuron in notes.miners]
        seen = [(one.plan, one.done.outcome) for one in self.exchanges if one.done.outcome is not None]
        facts = gather_facts(
            miners=hotkeys,
            collected=notes.collected,
            checks=notes.checks,
            seen=seen,
            average=self.average,
            round_number=position.round,
            proven=proven_averages(seen, verify) | self.records.double_commits(self._last_record),
            measures=self.records.measures(position.round - 1, self._last_record),
        )
        sources = self.records.sources(position.round - 1, self._last_record)
        self._last_record = None  # a second receipt is counted once
        scores = score_facts(facts, self.recipe.scoring)
        self.refresh_metagraph()
        registered = {neuron.hotkey for neuron in self.metagraph.neurons}
        before = self.average.state
        if before.last_round < position.round:  # else this round was scored before a restart
            counted = MovingAverage(None, self.recipe.scoring, before)
            counted.update(position.round, scores, registered)
            if self._publish_checks(position, base, notes, facts, scores, before, counted, registered, sources):
                self.average.update(position.round, scores, registered)
            else:
                logger.error("round %d is not counted: what cannot be published changes nobody's pay", position.round)
        self._links.forget(registered)
        shares = self.average.weights()
        self._keep_scores(position, scores, shares)
        if self.config.neuron.disable_set_weights:
            return
        weights = set_weights(self.chain, self.metagraph, self.uid, shares)
        if weights is not None:
            text = " ".join(f"{uid}:{weight:.3f}" for uid, weight in sorted(weights.items()))
            self.events.append("set_weights", f"weights {text}", round=position.round)

    def _publish_checks(
        self,
        position: Position,
        base: Ref,
        notes: RoundNotes,
        facts: dict[str, RoundFacts | Unscored],
        scores: dict[str, Score | Unscored],
        before: AverageState,
        counted: MovingAverage,
        registered: set[str],
        sources: dict[str, str],
    ) -> bool:
        """Hand the round's record to the thread that uploads it; False where that cannot keep it."""
        try:
            record, files = build_record(
                identity=self.identity,
                run_id=self.run_id,
                round_number=position.round,
                base=base,
                block_hash=notes.block_hash,
                coins=notes.coins,
                scoring=self.recipe.scoring,
                facts=facts,
                scores=scores,
                receipts=notes.collected.receipts,
                ranks=notes.ranks,
                draws=notes.draws,
                owed=notes.owed,
                before=before,
                after=counted.state,
                registered=registered,
                shares=counted.weights(),
                previous=self.records.previous(before.last_round),
                sources=sources,
            )
        except ValueError as exc:  # something past the bounds of a record
            logger.exception("the checks of round %d cannot be published: %s", position.round, exc)
            return False
        kept = self.records.put(record, files)
        if kept:
            self._last_record = record
        return kept

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
