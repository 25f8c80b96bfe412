"""Attention of single tokens over a cache: each sees a run of positions, and all are computed in one pass (CPU).

    out[t, g, h] = sum_j p[j] values[j, g],   p[j] = exp(scale query[t, g, h] . keys[j, g]) / sum over the run,
    j from places[t] - counts[t] + 1 to places[t];   of no positions: 0

Unlike padding the runs to one length, or one product for each, this takes the time of the keys that are seen and no
more, whatever their lengths and wherever they lie; and the bits of a token depend on nothing beside it. bf16 and fp16 are
computed in fp32 and rounded once.

T tokens, G groups of n query heads, D width, N positions of the cache.
"""

import torch
from torch import Tensor

from megatron_omni.ops import extension


def cached_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, counts: Tensor, scale: float
) -> Tensor:
    """:func:`cached_attention` in plain torch."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for t, (place, count) in enumerate(zip(places.tolist(), counts.tolist(), strict=True)):
        if count:
            run = slice(place + 1 - count, place + 1)
            scores = scale * torch.einsum("ghd,jgd->ghj", query[t], keys[run])
            out[t] = torch.einsum("ghj,jgd->ghd", scores.softmax(-1), values[run])
    return out


_cached_attention = extension.op("cached_attention")


@extension.register_fake("cached_attention")
def _(query: Tensor, keys: Tensor, values: Tensor, places: Tensor, counts: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def is_available(device: torch.device) -> bool:
    """Whether tensors there can be given to :func:`cached_attention`."""
    return device.type == "cpu" and extension.missing("cached_attention") is None


def cached_attention(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, counts: Tensor, *, scale: float | None = None
) -> Tensor:
    """[T, G, n, D] of ``query`` [T, G, n, D], ``keys`` and ``values`` [N, G, D] of one dtype, float32, bfloat16, float16 or
    float64; ``places`` and ``counts`` int64 of the first tokens, [at most T]: those after them see nothing. ``scale``
    None: 1 / sqrt(D). Without gradients. ValueError names an argument that does not fit, and positions out of bounds."""
    return _cached_attention(query, keys, values, places, counts, query.shape[-1] ** -0.5 if scale is None else scale)
