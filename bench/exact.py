"""The ways of averaging DoRA: how far each is from the mean of the weights, what it costs, and the loss it reaches.

    python -m bench.exact [--quick] [--jobs N] [--json FILE]

*Aggregation error.* Members start from one state of a tiny model and take H real AdamW steps, each on its own part of
the embedded corpus. Their vectors are averaged in float32 as a round averages them; the oracle builds every member's
dense W' with matrix products in float64 and averages those. Error of a layer: ``||W'(averaged) - mean_i W'_i|| /
||mean_i W'_i - W'_start||``, Frobenius norms, float64. The table gives that of the whole model and of its worst layer;
the claims are on the worst layer, the strictest way to say it.

*Loss* is that of `bench.loss`'s simulation on the same tiny model, with the rates of `bench.recipes`: 3 miners, H = 50,
600 steps, vector and moments averaged.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import Claim, arguments, at_most, report, table
from bench.loss import Corpus, Simulation, load_corpus, mean
from bench.recipes import PLAIN_DORA, TINY
from hivetrain.data.reader import pack
from hivetrain.model import AdaptedLayer, Assembled, adapted_layers, assemble, base_tensors, fold_residuals
from hivetrain.model.vector import split
from hivetrain.model.weights import Form
from hivetrain.run import Adapter, Recipe
from hivetrain.training import (
    InnerLoop,
    LiveBase,
    RoundWork,
    State,
    genesis_state,
    install_base_,
    merge_into_base,
    outer_step,
    pseudo_gradient,
)

GOAL = 1e-6
START_STEPS = 50
MERGE_EVERY = 4

Bases = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of averaging, as the loss is measured for it."""

    name: str
    adapter: Adapter
    residual: bool = False


PLAIN, LINEAR = Adapter(kind="dora"), Adapter(kind="dora_linear")
WAYS = (
    Way(name="plain", adapter=PLAIN),
    Way(name="linear", adapter=LINEAR),
    Way(name="residual", adapter=PLAIN, residual=True),
    Way(name=f"plain, merged every {MERGE_EVERY}", adapter=dataclasses.replace(PLAIN, merge_every=MERGE_EVERY)),
    Way(name=f"linear, merged every {MERGE_EVERY}", adapter=dataclasses.replace(LINEAR, merge_every=MERGE_EVERY)),
)


# -- the oracle -------------------------------------------------------------------------------------------------


def dense_weight(layer: AdaptedLayer, base: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
    """W' [out, in] by its definition, with matrix products in float64: shares no arithmetic with the library."""
    base, b, a = base.double(), trained[layer.b_name].double(), layer.a(trained).double()
    if layer.form is Form.LORA:
        return base + layer.scaling * b @ a
    assert layer.magnitude_name is not None
    magnitude = trained[layer.magnitude_name].double()
    if layer.form is Form.LINEAR:
        return torch.diag(magnitude / torch.linalg.norm(base, dim=1)) @ base + b @ a
    direction = base + layer.scaling * b @ a
    return torch.diag(magnitude / torch.linalg.norm(direction, dim=1)) @ direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Relative aggregation error."""

    whole: float
    worst_layer: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """A model, the state from which members start, and the base under it.

    Attributes:
        starts: the vector that each member starts from; one for all, unless their A's differ.
    """

    model: Assembled
    recipe: Recipe
    state: State
    base: Bases
    starts: tuple[Tensor, ...]

    @property
    def layers(self) -> tuple[AdaptedLayer, ...]:
        return adapted_layers(self.model.module)

    def weights(self, vector: Tensor, base: Bases | None = None) -> list[Tensor]:
        """W' of every layer, float64."""
        named, base = split(vector, self.model.flat.entries), base or self.base
        return [dense_weight(layer, layer.oriented(base[layer.weight_name]), named) for layer in self.layers]


def aggregation_error(stage: Stage, finals: Sequence[Tensor], averaged: Tensor, base: Bases | None = None) -> Error:
    """How far ``averaged`` on ``base`` is from the mean of the members' dense weights."""
    members = [stage.weights(final) for final in finals]
    target = [torch.stack(layer).mean(dim=0) for layer in zip(*members, strict=True)]
    errors = [float(torch.norm(t - w)) for t, w in zip(target, stage.weights(averaged, base), strict=True)]
    updates = [float(torch.norm(t - w)) for t, w in zip(target, stage.weights(stage.starts[0]), strict=True)]
    return Error(
        whole=sum(e * e for e in errors) ** 0.5 / sum(u * u for u in updates) ** 0.5,
        worst_layer=max(e / u for e, u in zip(errors, updates, strict=True)),
    )


def averaged_vector(stage: Stage, finals: Sequence[Tensor]) -> Tensor:
    """The mean as a round makes it: pseudo-gradients in float32, their mean, and the outer step."""
    mean_start = mean(list(stage.starts[: len(finals)])) if len(stage.starts) > 1 else stage.starts[0]
    state, zeros = dataclasses.replace(stage.state, vector=mean_start), torch.zeros_like(mean_start)
    starts = [stage.starts[place % len(stage.starts)] for place in range(len(finals))]
    deltas = [pseudo_gradient(start, final) for start, final in zip(starts, finals, strict=True)]
    return outer_step(state, mean(deltas), zeros, zeros, stage.recipe.outer, 1).vector


# -- members ----------------------------------------------------------------------------------------------------


def set_stage(adapter: Adapter, windows: Tensor, num_own: int) -> Stage:
    """A tiny model after `START_STEPS` steps; with ``num_own``, merged and with an A for each member of its own."""
    recipe = dataclasses.replace(PLAIN_DORA, model=TINY, adapter=adapter)
    model = assemble(recipe, None, TINY.vocab_size, "cpu")
    layers, entries = adapted_layers(model.module), model.flat.entries
    loop = InnerLoop(model.module, model.flat, recipe, "cpu")
    genesis = genesis_state(model.flat, model.base_sha256)
    work = loop.run(genesis, batches(windows, 0), num_steps=START_STEPS)
    state = dataclasses.replace(
        genesis, step=START_STEPS, vector=work.vector, exp_avg=work.exp_avg, exp_avg_sq=work.exp_avg_sq
    )
    base: Bases = {name: tensor.clone() for name, tensor in base_tensors(model.module).items()}
    if not num_own:
        return Stage(model=model, recipe=recipe, state=state, base=base, starts=(state.vector,))
    merged = [merge_into_base(state, base, layers, entries, seed) for seed in range(num_own)]
    new_base = merged[0].base
    assert new_base is not None
    install_base_(layers, new_base, 0, 0)
    starts = tuple(one.vector for one in merged)
    return Stage(model=model, recipe=recipe, state=merged[0], base=new_base, starts=starts)


def batches(windows: Tensor, member: int) -> Callable[[int], Tensor]:
    """Batches [1, 4, seq] of one member's own windows."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(member))
    return lambda step: windows[order[4 * step : 4 * step + 4]].unsqueeze(0)


def member_vectors(stage: Stage, windows: Tensor, num_members: int, horizons: Sequence[int]) -> list[list[Tensor]]:
    """Every member's vector after each of the ``horizons``."""
    loop = InnerLoop(stage.model.module, stage.model.flat, stage.recipe, "cpu")
    share = len(windows) // num_members
    found = []
    for member in range(num_members):
        own = batches(windows[member * share : (member + 1) * share], member)
        state = dataclasses.replace(stage.state, vector=stage.starts[member % len(stage.starts)])
        work = loop.run(state, own, num_steps=max(horizons))
        found.append([snapshot.vector for snapshot in work.snapshots if snapshot.step in horizons])
    return found


def measure_errors(corpus: Corpus, sizes: Sequence[int], horizons: Sequence[int]) -> list[Claim]:
    """The table of aggregation errors, and the claims of the exact ways."""
    reader, tokenizer, seq_len = corpus.reader, corpus.tokenizer, PLAIN_DORA.data.seq_len
    windows = torch.cat([pack(reader.read(group), tokenizer, seq_len) for group in corpus.index.train])
    cases = {
        "plain, one A": (set_stage(PLAIN, windows, 0), False),
        "plain, own A's": (set_stage(PLAIN, windows, max(sizes)), False),
        "linear": (set_stage(LINEAR, windows, 0), False),
    }
    cases |= {f"residual, {a}": (cases[f"plain, {a}"][0], True) for a in ("one A", "own A's")}
    vectors = {
        name: member_vectors(case[0], windows, max(sizes), horizons) for name, case in cases.items() if not case[1]
    }
    rows, worst = [], dict.fromkeys(((way, size) for way in ("linear", "residual") for size in sizes), 0.0)
    for name, (stage, fold) in cases.items():
        way = name.partition(",")[0]
        for place, horizon in enumerate(horizons):
            cells = [name, str(horizon)]
            for size in sizes:
                finals = [v[place] for v in vectors[name.replace("residual", "plain")][:size]]
                averaged, base = averaged_vector(stage, finals), None
                if fold:
                    entries = stage.model.flat.entries
                    base, averaged = fold_residuals(stage.layers, stage.base, finals, [1.0] * size, averaged, entries)
                error = aggregation_error(stage, finals, averaged, base)
                cells.append(f"{error.whole:.1e} / {error.worst_layer:.1e}")
                if way != "plain":
                    worst[way, size] = max(worst[way, size], error.worst_layer)
            rows.append(cells)
    title = "Aggregation error, relative to the mean update: whole model / worst layer"
    table(title, ["way", "H", *(f"{size} members" for size in sizes)], rows)
    name = "{} form, {} members: aggregation error of the worst layer, relative to its update"
    return [at_most(name.format(*key), value, GOAL) for key, value in worst.items()]


# -- bytes ------------------------------------------------------------------------------------------------------


def measure_bytes() -> None:
    """Bytes that one member sends in a round of the embedded model, vector and moments in fp32."""
    rows = []
    for way in WAYS:
        model = assemble(dataclasses.replace(PLAIN_DORA, adapter=way.adapter), None, PLAIN_DORA.model.vocab_size, "cpu")
        layers, flat = adapted_layers(model.module), model.flat
        shapes = dict(flat.entries)
        factors = 4 * sum(torch.Size(shapes[name]).numel() for layer in layers for name in layer.trained_names())
        base = 4 * sum(base_tensors(model.module)[layer.weight_name].numel() for layer in layers)
        sent, fetched = 12 * flat.size, 0
        if way.residual:
            sent, fetched = sent + factors, base
        rows.append([way.name, f"{flat.size:,}", f"{factors // 4:,}", f"{sent:,}", f"{fetched:,}"])
    columns = ["way", "trainable", "of them adapters", "sent to the mean, and factors", "base fetched"]
    table("Bytes of one member in one round, fp32", columns, rows)


# -- loss -------------------------------------------------------------------------------------------------------


class WaySimulation(Simulation):
    """`Simulation` with merges and residuals."""

    def __init__(self, corpus: Corpus, recipe: Recipe, num_rounds: int, *, residual: bool) -> None:
        super().__init__(corpus, recipe, num_rounds)
        self._residual = residual
        self._layers = adapted_layers(self._model.module)
        self._base = LiveBase(self._model.module, self._model.flat, recipe, self._model.base_sha256)

    def _combine(self, state: State, works: list[RoundWork]) -> State:
        after = super()._combine(state, works)
        entries, seed = self._model.flat.entries, self._recipe.model.seed
        if self._residual:
            vectors, base = [work.vector for work in works], base_tensors(self._model.module)
            base, vector = fold_residuals(self._layers, base, vectors, [1.0] * len(works), after.vector, entries)
            install_base_(self._layers, base, seed, 0)
            return dataclasses.replace(after, vector=vector)
        return self._base.adopt_(self._base.advance(after))


_corpora: dict[Path, Corpus] = {}


def way_curve(folder: Path, way: Way, seed: int, num_rounds: int) -> list[float]:
    """Held-out loss after every round; runs in a process of its own."""
    torch.set_num_threads(1)
    recipe = dataclasses.replace(PLAIN_DORA, adapter=way.adapter, model=dataclasses.replace(TINY, seed=seed))
    if folder not in _corpora:
        _corpora[folder] = load_corpus(folder / str(os.getpid()), recipe)
    return WaySimulation(_corpora[folder], recipe, num_rounds, residual=way.residual).together()


def measure_losses(folder: Path, ways: Sequence[Way], num_rounds: int, seeds: Sequence[int], jobs: int) -> None:
    """Train every way with every seed in so many processes."""
    cases = [(way, seed) for way in ways for seed in seeds]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(way_curve, folder, way, seed, num_rounds) for way, seed in cases]
        show_losses({case: future.result() for case, future in zip(cases, futures, strict=True)})


def show_losses(curves: Mapping[tuple[Way, int], Sequence[float]]) -> None:
    """The table of losses; no claim: which way trains best is for the reader to see."""
    ways, seeds = dict.fromkeys(way for way, _ in curves), dict.fromkeys(seed for _, seed in curves)
    num_rounds, rows = len(next(iter(curves.values()))) - 1, []
    for way in ways:
        mine = [curves[way, seed] for seed in seeds]
        middle = statistics.fmean(curve[num_rounds // 2] for curve in mine)
        ends = [curve[-1] for curve in mine]
        rows.append([way.name, f"{middle:.3f}", f"{statistics.fmean(ends):.3f}", *(f"{end:.3f}" for end in ends)])
    steps = num_rounds * PLAIN_DORA.inner.max_steps
    columns = ["way", f"{steps // 2} steps", f"{steps} steps", *(f"seed {seed}" for seed in seeds)]
    table("Held-out loss of 3 miners, nats per token", columns, rows)


def run(quick: bool, jobs: int | None = None) -> list[Claim]:
    """Print the tables and return the claims; a quick run trains nothing for its loss, of which nothing is claimed."""
    torch.set_num_threads(1)
    recipe = PLAIN_DORA
    sizes, horizons = [2, 8] if quick else [2, 8, 32], [20] if quick else [20, 50, 100]
    with tempfile.TemporaryDirectory(prefix="hivetrain-exact-") as folder:
        claims = measure_errors(load_corpus(Path(folder) / "errors", recipe), sizes, horizons)
        measure_bytes()
        if not quick:
            num_rounds = recipe.inner.total_steps // recipe.inner.max_steps
            measure_losses(Path(folder), WAYS, num_rounds, [0, 1, 2], jobs or min(2, os.cpu_count() or 1))
    return claims


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "", jobs=True)
    return report(run(options.quick, options.jobs), options.json)


if __name__ == "__main__":
    sys.exit(main())
