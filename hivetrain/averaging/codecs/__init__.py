"""How float32 values become bytes on the wire: pure functions with a fixed size per chunk.

| name | bits per value | what it keeps of a block | rounding |
|---|---|---|---|
| fp32 | 32 | everything | none |
| fp16 | 16 | itself | to nearest |
| int8, int4 | 8.25, 4.25 | 255 or 15 even levels up to the largest of 64 | stochastic |
| int2 | 2.0625 | ±1/3 and ±1 times the lesser of largest and twice the mean magnitude of 256 | to nearest |
| sign | 1.0625 | signs, and the mean magnitude of 256 | none |
| topk-1%, topk-10% | 0.32, 3.2 | the largest of each chunk | the values to nearest |
| log8, log4 | 8.25, 4.25 | 255 or 15 even levels of the logarithm between least and largest of 128 | stochastic |

The last two are for what is never negative and of a huge range: AdamW's second moments. Rounding is stochastic where a
level is finer than the values: what changes by less than a level then moves on average, where rounding to nearest would
hold it for ever. At two bits and below the noise would exceed the values themselves, and error feedback carries what
is lost (`hivetrain.averaging.feedback`).

The same values, seed and name give the same bytes on every processor: every operation is an integer's, or one float32
multiply, add, divide or comparison of its own; sums are trees of pairwise adds. `python -m bench.codecs` measures.

Sources: blockwise scales: https://arxiv.org/abs/2110.02861; signs with a scale, under error feedback:
https://arxiv.org/abs/1901.09847.
"""

from __future__ import annotations

from hivetrain.averaging.codecs.blockwise import MeanScaled, TopScaled
from hivetrain.averaging.codecs.casts import Cast
from hivetrain.averaging.codecs.logarithmic import Logarithmic
from hivetrain.averaging.codecs.protocol import Bytes, Codec, require_size
from hivetrain.averaging.codecs.topk import TopK

_ALL: tuple[Codec, ...] = (
    Cast("fp32", lossless=True),
    Cast("fp16", lossless=False),
    TopScaled("int8", bits=8),
    TopScaled("int4", bits=4),
    MeanScaled("int2", bits=2),
    MeanScaled("sign", bits=1),
    TopK("topk-1%", percent=1),
    TopK("topk-10%", percent=10),
    Logarithmic("log8", bits=8, octaves=32),
    Logarithmic("log4", bits=4, octaves=14),
)
_CODECS = {codec.name: codec for codec in _ALL}
CODEC_NAMES = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ValueError: there is none; names those that exist.
    """
    if name not in _CODECS:
        raise ValueError(f"codec must be one of {', '.join(_CODECS)}, got {name!r}")
    return _CODECS[name]


__all__ = ["CODEC_NAMES", "Bytes", "Codec", "get_codec", "require_size"]
