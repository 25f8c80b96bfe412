"""Core attention: scaled dot products of rotated queries and keys, for training and for cached decoding.

Megatron's attention module projects, applies rotary angles and hands over query [S, B, heads, D], key and value [S,
B, groups, D] (this tensor-parallel rank's share); the output is [S, B, heads * D]. Where Megatron has a mask, it hands
on the batch's ``AttentionSegments``, which say who sees whom (segments.py); ops/segment_attention.py computes. Under
context parallelism S are this rank's tokens: keys and values of the others are gathered first (context_parallel.py).

Decoding: inside ``kv_cache(cache)`` the cache computes, over the keys and values that it keeps (generation/cache.py), in
layers that have only what that needs (decoding.py). This sits below everything that a layout changes. The rotation of
queries and keys is computed once for all layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_omni.models.context_parallel import gathered_keys
from megatron_omni.ops.segment_attention import segment_attention
from megatron_omni.segments import AttentionSegments


class Cache(Protocol):
    """What attention asks of a cache."""

    rotation: tuple[Tensor, Tensor] | None
    """Of the new tokens (rope.py), the same in every layer; set by :class:`~.language.LanguageModel`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[T, groups, n, D] of ``query`` [T, groups, n, D], the n heads of a group, and ``key`` and ``value`` [T, groups, D]
        of the T new tokens: store their keys and values, and let each see those of its own sequence up to itself."""
        ...


_CACHE: ContextVar[Cache | None] = ContextVar("kv_cache", default=None)


@contextmanager
def kv_cache(cache: Cache) -> Iterator[None]:
    """Make every attention layer called inside compute with ``cache``. Without gradients."""
    token = _CACHE.set(cache)
    try:
        with torch.no_grad():
            yield
    finally:
        _CACHE.reset(token)


def current_cache() -> Cache | None:
    """The cache that attention computes with, inside :func:`kv_cache`."""
    return _CACHE.get()


class CoreAttention(MegatronModule):
    """Scaled dot-product attention with grouped keys and values, built by Megatron's ``SelfAttention``."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp_group = None if pg_collection is None else pg_collection.cp
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionSegments, **_: Any) -> Tensor:
        """[S, B, heads * D] from query [S, B, heads, D], key and value [S, B, groups, D]; zeros at padding."""
        size, rows = query.shape[:2]
        if attention_mask.key_ranks > 1:
            assert self.cp_group is not None
            both = gathered_keys(torch.stack([key, value], dim=2), self.cp_group)
            key, value = both.unbind(2)
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        dropout = self.config.attention_dropout if self.training else 0.0
        # Heads are split over tensor-parallel ranks: each must drop its own.
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            output = segment_attention(query, key, value, attention_mask, scale=self.softmax_scale, dropout=dropout)
        return output.reshape(rows, size, -1).transpose(0, 1).contiguous()
