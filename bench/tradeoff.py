"""Bytes against loss: local rounds under lossy codecs, moments included, against fp32 gradients every step.

    python -m bench.tradeoff [--quick] [--jobs N] [--json FILE]

Three miners train a DoRA adapter for 600 inner steps on a pretrained base and on data that the base never saw
(`bench.adapting`). In the reference arm they exchange fp32 gradients every step: one process with the three batches
joined takes the very same steps. In the other arms they exchange after every H steps, through the real butterfly over
memory: the pseudo-gradient with error feedback, and AdamW's two moments, each under a codec of its own. The mean comes
back encoded again by its reducer, without feedback, as on the network. All arms take the same windows at the same
steps. The reference is tried at every peak rate in `RATES` with one seed and goes on with two more at the best of them;
so do the two settings that claims are made of, at one rate, which can only widen their gap. The same rounds in fp32 run
once, to tell what the codecs cost from what the rounds do.

Bytes are what one peer sends and receives, vectors and means, as the all-reduce accounts for them; the reference is
charged one butterfly of the fp32 gradient per step in the same group. What does not grow with the model (handshakes,
proofs, signatures) is left out of both arms. "Kept" is the share of the reference's gain over the untrained adapter:
1% of the loss is a good part of what adapters win, so the gap alone flatters.

A quick run shows one arm and its reference after a sixth of the steps and claims bytes alone, those of the other from
one exchange.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from bench.adapting import BASE_STEPS, Adaptation, Means, adapter_recipe, pretrain
from bench.harness import Claim, arguments, at_least, at_most, report, table
from bench.inmemory import butterfly, mean_traffic
from bench.loss import Corpus, load_corpus
from bench.recipes import PLAIN_DORA
from hivetrain.averaging.layout import PayloadLayout, Section
from hivetrain.run import Averaging, DeltaCodec, MomentsCodec, SecondMomentsCodec
from hivetrain.training import RoundWork, State, pseudo_gradient
from hivetrain.workbench import DELTA, EXP_AVG, EXP_AVG_SQ, make_layout

NUM_MINERS = 3
NUM_STEPS = 600
QUICK_STEPS = 100
RATES = (4e-3, 8e-3, 1.6e-2)
USUAL_RATE = 8e-3
NUM_SEEDS = 3
NUM_PARAMS = 80_896  # of the adapter; shares hardly depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How often a group exchanges, and what under which codec."""

    inner_steps: int
    delta: DeltaCodec
    exp_avg: MomentsCodec
    exp_avg_sq: SecondMomentsCodec

    def __str__(self) -> str:
        return f"H = {self.inner_steps}, {self.delta} + {self.exp_avg} + {self.exp_avg_sq}"

    def layout(self, num_params: int) -> PayloadLayout:
        """Of what one member sends, as a recipe makes it."""
        codecs = Averaging(codec=self.delta, moments_codec=self.exp_avg, second_moments_codec=self.exp_avg_sq)
        return make_layout(num_params, codecs)


def _setting(inner_steps: int, delta: DeltaCodec, exp_avg: MomentsCodec, exp_avg_sq: SecondMomentsCodec) -> Setting:
    return Setting(inner_steps=inner_steps, delta=delta, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


FOR_150 = _setting(50, "int4", "none", "log4")
FOR_600 = _setting(200, "int4", "none", "log4")
LOSSLESS = _setting(50, "fp32", "fp32", "fp32")


class LossyExchange:
    """What a group holds after each round under a setting's codecs. Keeps the members' remainders, and counts bytes.

    Attributes:
        traffic: bytes of one peer so far, both ways.
    """

    def __init__(self, setting: Setting, num_params: int) -> None:
        self.traffic = 0.0
        self._layout = setting.layout(num_params)
        self._remainders = [torch.zeros(num_params) for _ in range(NUM_MINERS)]

    def __call__(self, number: int, start: State, works: Sequence[RoundWork]) -> Means:
        payloads = [self._encode(number, place, start, work) for place, work in enumerate(works)]
        outcomes = butterfly(self._layout, payloads, number)
        if not all(outcome.complete for outcome in outcomes):
            raise RuntimeError(f"round {number} is not complete: {[outcome.faults for outcome in outcomes]}")
        self.traffic += mean_traffic(outcomes)
        mean = outcomes[0].vectors
        exp_avg = mean.get(EXP_AVG, torch.zeros_like(start.exp_avg))  # not sent: zero
        return Means(delta=mean[DELTA], exp_avg=exp_avg, exp_avg_sq=mean[EXP_AVG_SQ])

    def _encode(self, number: int, place: int, start: State, work: RoundWork) -> bytes:
        delta = pseudo_gradient(start.vector, work.vector) + self._remainders[place]
        vectors: dict[str, Tensor] = {DELTA: delta, EXP_AVG: work.exp_avg, EXP_AVG_SQ: work.exp_avg_sq}
        sent = {section.name: vectors[section.name] for section in self._layout.sections}
        payload = self._layout.encode(sent, seed=(number * NUM_MINERS + place) << 20)
        self._remainders[place] = delta - self._layout.decode(payload)[DELTA]
        return payload


def butterfly_traffic(size_bytes: int, num_members: int) -> float:
    """Bytes of one peer, both ways: all but its own part out, its part's mean out to the others, and as much in."""
    return 4 * (num_members - 1) / num_members * size_bytes


def gradient_traffic(num_params: int) -> float:
    """The same of a real exchange of fp32 gradients, as it accounts for them."""
    return one_exchange(PayloadLayout([Section(name="gradient", num_elements=num_params, codec="fp32")]))


def one_exchange(layout: PayloadLayout) -> float:
    """Bytes of one peer, both ways, in one real exchange of zeros: no codec's size depends on the values."""
    vectors = {section.name: torch.zeros(section.num_elements) for section in layout.sections}
    return mean_traffic(butterfly(layout, [layout.encode(vectors, seed=0)] * NUM_MINERS, 0))


def share_of_bytes(setting: Setting, num_params: int) -> float:
    """Of the reference's bytes, those of a setting."""
    return one_exchange(setting.layout(num_params)) / (setting.inner_steps * gradient_traffic(num_params))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One arm with one seed and rate. No setting: the reference."""

    folder: Path
    seed: int
    lr: float
    setting: Setting | None
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What a job came to. ``traffic``: bytes of one peer, both ways, over the whole run."""

    job: Job
    loss: float
    untrained: float
    traffic: float
    num_tokens: int


@lru_cache(maxsize=1)
def _corpus(folder: Path) -> Corpus:
    recipe = PLAIN_DORA
    whole = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, heldout_batches=64))  # all there are
    return load_corpus(folder / f"corpus-{os.getpid()}", whole)


def pretrain_base(folder: Path, seed: int, num_steps: int) -> None:
    """Leave the seed's base in ``folder``."""
    torch.set_num_threads(1)  # the model is too small to be worth a second one
    pretrain(_corpus(folder), seed, folder / f"base-{seed}", num_steps)


def run_job(job: Job) -> Arm:
    """Train one arm."""
    torch.set_num_threads(1)
    ground = Adaptation(
        _corpus(job.folder),
        adapter_recipe(job.seed),
        base=job.folder / f"base-{job.seed}",
        num_miners=NUM_MINERS,
        num_steps=job.num_steps,
    )
    untrained = ground.heldout(ground.start.vector)
    if job.setting is None:
        loss, traffic = ground.every_step(job.lr), job.num_steps * gradient_traffic(ground.num_params)
    else:
        exchange = LossyExchange(job.setting, ground.num_params)
        loss = ground.local(job.lr, job.setting.inner_steps, exchange)
        traffic = exchange.traffic
    num_tokens = job.num_steps * ground.tokens_per_step
    return Arm(job=job, loss=loss, untrained=untrained, traffic=traffic, num_tokens=num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A setting over its seeds, at its best rate, against the reference over the same seeds at the reference's.

    Attributes:
        share: of the reference's bytes.
        gap: relative loss above the reference's mean.
        kept: share of the reference's gain over the untrained start.
    """

    setting: Setting | None
    lr: float
    losses: tuple[float, ...]
    bytes_per_token: float
    share: float
    gap: float
    kept: float

    def cells(self) -> list[str]:
        """As a row of the table."""
        return [
            "fp32 gradients every step" if self.setting is None else str(self.setting),
            f"{self.lr:g}",
            " ".join(f"{loss:.3f}" for loss in self.losses),
            f"{self.gap:+.2%}",
            f"{self.kept:.0%}",
            f"{self.bytes_per_token:,.1f}",
            f"1/{1 / self.share:,.0f}",
        ]


COLUMNS = ("exchange", "peak rate", "held-out loss per seed", "gap", "kept", "bytes/peer/token", "of the bytes")


def at_best_rate(arms: Iterable[Arm], setting: Setting | None, seeds: Sequence[int]) -> list[Arm]:
    """A setting's arms with these seeds, at the rate at which their mean loss is least among rates that all have."""
    rates: dict[float, dict[int, Arm]] = {}
    for arm in arms:
        if arm.job.setting == setting:
            rates.setdefault(arm.job.lr, {})[arm.job.seed] = arm
    whole = [[by_seed[seed] for seed in seeds] for by_seed in rates.values() if set(seeds) <= set(by_seed)]
    return min(whole, key=lambda found: statistics.fmean(arm.loss for arm in found))


def line(arms: Sequence[Arm], setting: Setting | None) -> Line:
    """What the arms say of one setting."""
    seeds = sorted({arm.job.seed for arm in arms if arm.job.setting == setting})
    ours, reference = at_best_rate(arms, setting, seeds), at_best_rate(arms, None, seeds)
    loss, least = (statistics.fmean(arm.loss for arm in side) for side in (ours, reference))
    untrained = statistics.fmean(arm.untrained for arm in ours)
    return Line(
        setting=setting,
        lr=ours[0].job.lr,
        losses=tuple(arm.loss for arm in ours),
        bytes_per_token=ours[0].traffic / ours[0].num_tokens,
        share=ours[0].traffic / reference[0].traffic,
        gap=loss / least - 1,
        kept=(untrained - loss) / (untrained - least),
    )


RunJobs = Callable[[Sequence[Job]], list[Arm]]


def full_arms(folder: Path, run_jobs: RunJobs) -> list[Arm]:
    """Every arm."""

    def job(setting: Setting | None, lr: float = USUAL_RATE, seed: int = 0) -> Job:
        return Job(folder=folder, seed=seed, lr=lr, setting=setting, num_steps=NUM_STEPS)

    claimed = (FOR_150, FOR_600)
    arms = run_jobs([job(None, lr) for lr in RATES] + [job(setting) for setting in (*claimed, LOSSLESS)])
    best = at_best_rate(arms, None, [0])[0].job.lr
    rest = [[job(None, best, seed), *(job(setting, seed=seed) for setting in claimed)] for seed in range(1, NUM_SEEDS)]
    return arms + run_jobs([one for jobs in rest for one in jobs])


def quick_arms(folder: Path, run_jobs: RunJobs) -> list[Arm]:
    """One setting and the reference: one seed, one rate, a sixth of the steps."""
    return run_jobs(
        [Job(folder=folder, seed=0, lr=USUAL_RATE, setting=s, num_steps=QUICK_STEPS) for s in (FOR_150, None)]
    )


def show(title: str, arms: Sequence[Arm]) -> list[Line]:
    """Print one line per setting, the reference first."""
    settings = sorted({arm.job.setting for arm in arms} - {None}, key=lambda s: -line(arms, s).share)
    lines = [line(arms, setting) for setting in (None, *settings)]
    table(title, COLUMNS, [one.cells() for one in lines])
    return lines


def fewer_bytes(setting: Setting, fewer: float, goal: float) -> Claim:
    """What a setting saves."""
    return at_least(f"{setting}: times fewer bytes than fp32 every step", fewer, goal)


def claims(arms: Sequence[Arm], quick: bool = False) -> list[Claim]:
    """Bytes and loss of the two settings; of a quick run, bytes."""
    found = []
    for setting, goal, gap in ((FOR_150, 150, 0.01), (FOR_600, 600, 0.02)):
        if not any(arm.job.setting == setting for arm in arms):
            found.append(fewer_bytes(setting, 1 / share_of_bytes(setting, NUM_PARAMS), goal))
            continue
        one = line(arms, setting)
        found.append(fewer_bytes(setting, 1 / one.share, goal))
        if not quick:
            found.append(at_most(f"{setting}: loss gap, seeds: {len(one.losses)}, relative", one.gap, gap))
    return found


def run(quick: bool, jobs: int | None = None) -> list[Claim]:
    """Train every arm, print the table, and say what it shows. ``jobs``: processes, one per core and two at most."""
    with (
        tempfile.TemporaryDirectory(prefix="hivetrain-tradeoff-") as name,
        ProcessPoolExecutor(jobs or min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool,
    ):
        folder, seeds, base_steps = Path(name), 1 if quick else NUM_SEEDS, QUICK_STEPS if quick else BASE_STEPS
        list(pool.map(pretrain_base, [folder] * seeds, range(seeds), [base_steps] * seeds))

        def run_jobs(jobs: Sequence[Job]) -> list[Arm]:
            arms = []
            for arm in pool.map(run_job, jobs):
                print(
                    f"{arm.job.setting or 'reference'}, seed {arm.job.seed}, rate {arm.job.lr:g}: {arm.loss:.4f}",
                    flush=True,
                )
                arms.append(arm)
            return arms

        arms = (quick_arms if quick else full_arms)(folder, run_jobs)
    show("Adapters on a pretrained base", arms)
    return claims(arms, quick)


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "", jobs=True)
    return report(run(options.quick, options.jobs), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
