"""Every codec: bytes per value, error, and speed.

    python -m bench.codecs [--quick] [--json FILE]

Errors are relative L2, on normal values, on heavy tails (Student's t with five degrees of freedom) and on what one
miner of the embedded model really sends after a round: pseudo-gradient and first moment, and for the codecs
without a sign the second moment (of the made vectors, the squares). "AdamW's step" is the error of m / (sqrt(v) + eps)
with the decoded second moment: what it does to training. Speeds are of float32 bytes per second of CPU time,
on one thread.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import Claim, arguments, at_most, report, table
from bench.loss import load_corpus
from bench.recipes import PLAIN_DORA
from hivetrain.averaging.codecs import CODEC_NAMES, Codec, get_codec
from hivetrain.data.reader import load_round
from hivetrain.model import assemble
from hivetrain.training import InnerLoop, State, genesis_state, pseudo_gradient

UNSIGNED = ("log8", "log4")
BOUNDS = {
    "fp32": 0.0,
    "fp16": 0.001,
    "int8": 0.013,
    "int4": 0.23,
    "int2": 0.48,
    "sign": 0.72,
    "topk-1%": 0.98,
    "topk-10%": 0.82,
    "log8": 0.03,
    "log4": 0.30,
}
"""The largest error on any of the vectors here."""
STEP_BOUNDS = {"log8": 0.01, "log4": 0.10}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What is encoded, each float32 [n]: made, then real."""

    normal: Tensor
    heavy: Tensor
    delta: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def train(num_steps: int) -> tuple[State, Tensor, Tensor, Tensor]:
    """One miner's round of the embedded model: state, vector and both moments at its end."""
    recipe = PLAIN_DORA
    with tempfile.TemporaryDirectory(prefix="hivetrain-codecs-") as folder:
        corpus = load_corpus(Path(folder), recipe)
        model = assemble(recipe, None, len(corpus.tokenizer), "cpu")
        state = genesis_state(model.flat, model.base_sha256)
        batches = load_round(
            corpus.reader,
            corpus.index,
            corpus.tokenizer,
            run_id="00" * 32,
            round_number=0,
            rank=0,
            data=recipe.data,
        )
        work = InnerLoop(model.module, model.flat, recipe, "cpu").run(state, batches.batch, num_steps=num_steps)
    return state, work.vector, work.exp_avg, work.exp_avg_sq


def make_vectors(num_elements: int, num_steps: int) -> Vectors:
    """Made vectors of that length, and those of a round of so many steps."""
    torch.manual_seed(0)
    heavy = torch.distributions.StudentT(torch.tensor(5.0)).sample((num_elements,))
    state, vector, exp_avg, exp_avg_sq = train(num_steps)
    return Vectors(
        normal=torch.randn(num_elements),
        heavy=heavy,
        delta=pseudo_gradient(state.vector, vector),
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
    )


def relative(found: Tensor, true: Tensor) -> float:
    """Relative L2 error."""
    return float((found - true).norm() / true.norm())


def errors(codec: Codec, vectors: Vectors) -> dict[str, float]:
    """Relative L2 per kind of vector; "step" where the codec is for second moments."""

    def round_trip(values: Tensor) -> Tensor:
        return codec.decode(codec.encode(values, 1), values.numel())

    if codec.name not in UNSIGNED:
        kinds = {"normal": vectors.normal, "heavy": vectors.heavy, "delta": vectors.delta, "exp_avg": vectors.exp_avg}
        return {kind: relative(round_trip(values), values) for kind, values in kinds.items()}
    squares = {"normal": vectors.normal**2, "heavy": vectors.heavy**2, "exp_avg_sq": vectors.exp_avg_sq}
    found = {kind: relative(round_trip(values), values) for kind, values in squares.items()}

    def step(second: Tensor) -> Tensor:
        return vectors.exp_avg / (second.sqrt() + PLAIN_DORA.inner.eps)

    found["step"] = relative(step(round_trip(vectors.exp_avg_sq)), step(vectors.exp_avg_sq))
    return found


def speeds(codec: Codec, values: Tensor, repeats: int) -> tuple[float, float]:
    """Median MB of float32 per second of CPU time, of encode and decode."""
    encode, decode = [], []
    for _ in range(repeats + 1):
        began = time.thread_time()
        data = codec.encode(values, 1)
        between = time.thread_time()
        codec.decode(data, values.numel())
        encode.append(between - began)
        decode.append(time.thread_time() - between)
    megabytes = 4 * values.numel() / 1e6
    return megabytes / statistics.median(encode[1:]), megabytes / statistics.median(decode[1:])


def measure(vectors: Vectors, repeats: int) -> list[Claim]:
    """Print the table; one claim per codec, and one per codec of second moments on the step."""
    kinds = ("normal", "heavy", "delta", "exp_avg", "exp_avg_sq", "step")
    rows, claims = [], []
    for name in CODEC_NAMES:
        codec = get_codec(name)
        values = vectors.normal**2 if name in UNSIGNED else vectors.normal
        encode, decode = speeds(codec, values, repeats)
        found = errors(codec, vectors)
        size = codec.encoded_size(1 << 20) / (1 << 20)
        cells = [f"{found[kind]:.4f}" if kind in found else "" for kind in kinds]
        rows.append([name, f"{size:.4f}", *cells, f"{encode:.0f}", f"{decode:.0f}"])
        if name in STEP_BOUNDS:
            claims.append(at_most(f"{name}: error of AdamW's step", found.pop("step"), STEP_BOUNDS[name]))
        claims.append(at_most(f"{name}: largest relative L2 error", max(found.values()), BOUNDS[name]))
    headings = ("normal", "heavy tails", "pseudo-gradient", "exp_avg", "exp_avg_sq", "AdamW's step")
    table("Codecs", ("codec", "bytes/value", *headings, "encode MB/s", "decode MB/s"), rows)
    return claims


def main() -> int:
    """Entry point."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    num_elements, repeats = (1 << 20, 3) if options.quick else (1 << 23, 7)
    vectors = make_vectors(num_elements, num_steps=50)
    return report(measure(vectors, repeats), options.json)


if __name__ == "__main__":
    raise SystemExit(main())
