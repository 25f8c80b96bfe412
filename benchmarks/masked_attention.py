"""The product that attention by lengths replaced: rows of several samples took a dense mask [B, 1, S, S], causal inside
each sample, and the whole square was computed. Kept to compare with; :func:`masked` patches it into whole steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omni.models.attention import CoreAttention
from megatron_omni.segments import AttentionSegments


def packing_mask(segments: AttentionSegments, rows: int) -> Tensor | None:
    """[B, 1, S, S] bool, True where attention is allowed; None where no row holds two samples. Once a micro-batch."""
    if "packing mask" not in segments.derived:
        size = segments.num_tokens // rows
        starts = [segment.queries.start for segment in segments.segments]
        several = any(second // size == first // size for first, second in pairwise(starts))
        ids = torch.full((segments.num_tokens,), -1)
        for i, segment in enumerate(segments.segments):
            ids[segment.queries.start : segment.queries.stop] = i
        ids = ids.view(rows, size)
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        mask = ((ids.unsqueeze(2) == ids.unsqueeze(1)) & causal).unsqueeze(1) if several else None
        segments.derived["packing mask"] = mask
    return segments.derived["packing mask"]


def masked_product(query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments) -> Tensor:
    """[S, B, heads * D] from query [S, B, heads, D], key and value [S, B, groups, D]."""
    mask = packing_mask(segments, query.shape[1])
    output = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.permute(2, 0, 1, 3).flatten(2)


@contextmanager
def masked() -> Iterator[None]:
    """Every attention layer called inside computes :func:`masked_product`."""

    def forward(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionSegments, **_: Any
    ) -> Tensor:
        return masked_product(query, key, value, attention_mask)

    own = CoreAttention.forward
    CoreAttention.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        CoreAttention.forward = own  # type: ignore[method-assign]
