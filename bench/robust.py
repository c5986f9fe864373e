"""What a bad minority does to each of the group's means: one member in four, and three in ten.

    python -m bench.robust [--quick] [--json FILE]

The honest train a DoRA adapter on a pretrained base (`bench.adapting`). The bad send, every round, what they make of
the honest members' mean, which they know. The first table compares vectors: how far a mean of the whole group ends from
the plain mean of the honest, relative to it, on the first round's pseudo-gradients. The second compares what counts:
held-out loss after a few rounds of training through that mean, AdamW's moments included, against the honest alone.
Means are taken per reducer's part, as in a butterfly. Contributions are fp32 here, and no replay protects anybody.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.adapting import Adaptation, Means, adapter_recipe, pretrain
from bench.harness import Claim, arguments, at_least, at_most, report, table
from bench.loss import Corpus, load_corpus
from hivetrain.averaging.robust import MEAN_NAMES, Mean, get_mean
from hivetrain.run import Recipe
from hivetrain.training import RoundWork, State, pseudo_gradient

RATE = 8e-3
HONEST = "none: honest members only"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How many members, of whom how many are bad, and how long they train."""

    size: int
    num_bad: int
    inner_steps: int
    num_rounds: int

    @property
    def num_honest(self) -> int:
        return self.size - self.num_bad

    def __str__(self) -> str:
        return f"{self.num_bad} bad of {self.size}"


GROUPS: tuple[Group, ...] = (
    Group(size=4, num_bad=1, inner_steps=20, num_rounds=4),
    Group(size=10, num_bad=3, inner_steps=10, num_rounds=4),
)

Attack = Callable[[Means, Means, int], Means]
"""``attack(mean of the honest, their standard deviation per coordinate, seed)``: what one bad member sends."""


def _scaled(delta: float, moments: float) -> Attack:
    def attack(mean: Means, _deviation: Means, _seed: int) -> Means:
        return Means(delta=delta * mean.delta, exp_avg=delta * mean.exp_avg, exp_avg_sq=moments * mean.exp_avg_sq)

    return attack


def _noise(mean: Means, _deviation: Means, seed: int) -> Means:
    generator = torch.Generator().manual_seed(seed)

    def like(vector: Tensor) -> Tensor:
        noise = torch.randn(vector.shape, generator=generator)
        return noise.mul_(float(vector.norm() / noise.norm()))

    return Means(delta=like(mean.delta), exp_avg=like(mean.exp_avg), exp_avg_sq=mean.exp_avg_sq)


def _inlier(mean: Means, deviation: Means, _seed: int) -> Means:
    """A little is enough (https://arxiv.org/abs/1902.06156): one standard deviation off, the same way everywhere."""
    return Means(
        delta=mean.delta - deviation.delta,
        exp_avg=mean.exp_avg - deviation.exp_avg,
        exp_avg_sq=mean.exp_avg_sq,
    )


ATTACKS: Mapping[str, Attack] = {
    "sign flipped": _scaled(-1.0, 1.0),
    "sign flipped, 10 times": _scaled(-10.0, 10.0),
    "10 times": _scaled(10.0, 10.0),
    "noise of the same norm": _noise,
    "zeros": _scaled(0.0, 0.0),
    "1 deviation off everywhere": _inlier,
}


def contributions(start: State, works: Sequence[RoundWork]) -> list[Means]:
    """What honest members send."""
    return [
        Means(delta=pseudo_gradient(start.vector, work.vector), exp_avg=work.exp_avg, exp_avg_sq=work.exp_avg_sq)
        for work in works
    ]


def joined(mean: Mean, sent: Sequence[Means], num_reducers: int) -> Means:
    """``mean`` over all that was sent, in as many parts as there are reducers; everyone weighs the same."""
    weights = [1.0] * len(sent)

    def section(name: str) -> Tensor:
        parts = zip(*(getattr(one, name).tensor_split(num_reducers) for one in sent), strict=True)
        return torch.cat([mean(part, weights) for part in parts])

    return Means(**{field.name: section(field.name) for field in dataclasses.fields(Means)})


def with_bad(honest: Sequence[Means], attack: Attack, num_bad: int, seed: int) -> list[Means]:
    """The honest, then the bad."""

    def over(reduce: Callable[[Tensor], Tensor]) -> Means:
        names = [field.name for field in dataclasses.fields(Means)]
        return Means(**{name: reduce(torch.stack([getattr(one, name) for one in honest])) for name in names})

    mean, deviation = over(lambda rows: rows.mean(dim=0)), over(lambda rows: rows.std(dim=0))
    return [*honest, *(attack(mean, deviation, seed + place) for place in range(num_bad))]


def distances(adaptation: Adaptation, group: Group, attacks: Sequence[str], means: Sequence[str]) -> list[list[float]]:
    """Relative distance of each mean from the honest members' plain one, per attack, on the first round."""
    works = adaptation.works(adaptation.start, RATE, group.inner_steps, range(group.num_honest))
    honest = contributions(adaptation.start, works)
    wanted = joined(get_mean("mean"), honest, group.size).delta
    rows = []
    for attack in attacks:
        sent = honest if attack == HONEST else with_bad(honest, ATTACKS[attack], group.num_bad, 0)
        found = [joined(get_mean(name), sent, group.size).delta for name in means]
        rows.append([float((one - wanted).norm() / wanted.norm()) for one in found])
    return rows


def loss(adaptation: Adaptation, group: Group, attack: str, name: str) -> float:
    """Held-out loss after the group's rounds through that mean."""

    def exchange(number: int, start: State, works: Sequence[RoundWork]) -> Means:
        sent = contributions(start, works)
        if attack != HONEST:
            sent = with_bad(sent, ATTACKS[attack], group.num_bad, number * group.size)
        return joined(get_mean(name), sent, group.size)

    return adaptation.local(RATE, group.inner_steps, exchange, range(group.num_honest))[-1]


def measure(corpus: Corpus, base: Path, group: Group, attacks: Sequence[str], means: Sequence[str]) -> list[Claim]:
    """Print both tables of one group, and claim what they show."""
    adaptation = Adaptation(
        corpus,
        adapter_recipe(0),
        base=base,
        num_miners=group.size,
        num_steps=group.inner_steps * group.num_rounds,
        warmup_steps=5,
    )
    cases = [HONEST, *attacks]
    rows = distances(adaptation, group, cases, means)
    title = f"{group}: distance from the honest mean, relative, {group.inner_steps} inner steps"
    table(title, ("what the bad send", *means), _rows(cases, rows))
    losses = [[loss(adaptation, group, attack, name) for name in means] for attack in cases]
    untrained = adaptation.heldout(adaptation.start.vector)
    title = f"{group}: held-out loss after {group.num_rounds} rounds of {group.inner_steps}; before: {untrained:.3f}"
    table(title, ("what the bad send", *means), _rows(cases, losses))
    honest = losses[0][means.index("mean")]
    worst = {name: max(row[place] for row in losses[1:]) / honest - 1 for place, name in enumerate(means)}
    return claims(group, worst)


def claims(group: Group, worst: Mapping[str, float]) -> list[Claim]:
    """What is promised of each mean's worst case, as the relative loss above honest members alone."""
    found = [at_least(f"{group}: worst loss through the plain mean, relative", worst["mean"], 0.1)]
    for name in ("trimmed_mean", "median", "centered_clip"):
        if name in worst:
            found.append(at_most(f"{group}: worst loss through {name}, relative", worst[name], 0.02))
    return found


def _rows(cases: Sequence[str], values: Sequence[Sequence[float]]) -> list[list[str]]:
    return [[case, *(f"{value:.3f}" for value in row)] for case, row in zip(cases, values, strict=True)]


def run(quick: bool) -> list[Claim]:
    """Every group, attack and mean; with ``quick`` one group and half of them on a base trained less."""
    torch.set_num_threads(1)  # the model is too small to be worth a second one
    groups, attacks, means, base_steps = GROUPS, tuple(ATTACKS), MEAN_NAMES, 600
    if quick:
        groups = (dataclasses.replace(GROUPS[0], num_rounds=2),)
        attacks, means, base_steps = ("sign flipped, 10 times", "10 times"), ("mean", "norm_bound", "trimmed_mean"), 200
    with tempfile.TemporaryDirectory(prefix="hivetrain-robust-") as folder:
        corpus = load_corpus(Path(folder) / "corpus", Recipe())
        base = pretrain(corpus, 0, Path(folder) / "base", base_steps)
        return [claim for group in groups for claim in measure(corpus, base, group, attacks, means)]


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    return report(run(options.quick), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
