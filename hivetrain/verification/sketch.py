"""CountSketch of a displacement: 256 floats in the receipt by which anybody who replays can judge it without openings.

Every element is added with a drawn sign into a drawn one of 256 buckets. Inner products survive in expectation, so the
distance of two sketches estimates the distance of the vectors, with a relative error near sqrt(2 / 256), 9%. Norms,
top values, SimHash and the loss alone can be fooled; a sketch whose draws are not known before the round's number is
cannot be met without the displacement itself.

Source: Charikar, Chen and Farach-Colton, Finding frequent items in data streams, https://doi.org/10.1007/3-540-45465-9_59
Shapes: P = trainable parameters.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

NUM_BUCKETS = 256
SKETCH_HEX_CHARS = 2 * 4 * NUM_BUCKETS

_BLOCK = 1 << 20  # elements hashed at once: bounds the memory of a sketch
_GAMMA = 0x9E3779B97F4A7C15


def sketch_seed(run_id: str, round_number: int) -> int:
    """The seed of one round's draws."""
    text = f"hivetrain-sketch/1\n{run_id}\n{round_number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def count_sketch(values: Tensor, seed: int) -> npt.NDArray[np.float32]:
    """The sketch of ``values`` (float32 [P]): float32 [256].

    Added up in float64, in order within each 2^20 elements, whose sums are then added in order. A bucket that is not
    finite is 0: what is wrong with such values is for replay to say.
    """
    flat = values.detach().cpu().numpy()
    sums = np.zeros(NUM_BUCKETS, dtype=np.float64)
    for start in range(0, len(flat), _BLOCK):
        piece = flat[start : start + _BLOCK]
        words = _splitmix64(np.arange(start + 1, start + 1 + len(piece), dtype=np.uint64), seed)
        signs = 1.0 - 2.0 * ((words >> np.uint64(8)) & np.uint64(1)).astype(np.float64)
        buckets = (words & np.uint64(NUM_BUCKETS - 1)).astype(np.int64)
        sums += np.bincount(buckets, weights=signs * piece, minlength=NUM_BUCKETS)
    with np.errstate(over="ignore"):
        sketch = sums.astype(np.float32)
    return np.where(np.isfinite(sketch), sketch, np.float32(0))


def _splitmix64(counters: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = counters * np.uint64(_GAMMA) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def to_hex(sketch: npt.NDArray[np.float32]) -> str:
    """As it stands in a receipt: little-endian float32, lowercase hex."""
    return sketch.astype("<f4").tobytes().hex()


def from_hex(text: str) -> npt.NDArray[np.float32]:
    """The inverse of `to_hex`.

    Raises:
        ValueError: not 256 finite float32 in hex.
    """
    raw = bytes.fromhex(text)
    if len(raw) != 4 * NUM_BUCKETS:
        raise ValueError(f"a sketch has {4 * NUM_BUCKETS} bytes, got {len(raw)}")
    found = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("a sketch holds a value that is not finite")
    return found


def sketch_distance(replayed: npt.NDArray[np.float32], claimed: npt.NDArray[np.float32]) -> float:
    """``||replayed - claimed|| / ||claimed||``: an estimate of the relative L2 distance of the displacements."""
    error = float(np.linalg.norm(replayed.astype(np.float64) - claimed))
    size = float(np.linalg.norm(claimed.astype(np.float64)))
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size
