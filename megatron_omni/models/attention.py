"""Core attention: scaled dot products of rotated queries and keys, for training and for cached decoding.

Megatron's attention module projects, applies rotary angles and hands over query [S, B, heads, D], key and value [S,
B, groups, D] (this tensor-parallel rank's share); the output is [S, B, heads * D]. Where Megatron has a mask, it hands
on the batch's ``AttentionSegments``, which say who sees whom (segments.py); ops/segment_attention.py computes.

Decoding: inside ``kv_cache(cache)`` each call first writes its keys and values into the cache, and the segments' keys
are the cache's. This sits below Megatron's attention module, so it is the same on every layout.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_omni.ops.segment_attention import new_keys, segment_attention
from megatron_omni.segments import AttentionSegments, Cached, cached


class Cache(Protocol):
    """What attention asks of a cache."""

    def append(self, layer: int, key: Tensor, value: Tensor, segments: AttentionSegments) -> tuple[Tensor, Tensor]:
        """Store the grid's ``key`` and ``value`` [B x S, groups, D]; all keys and values [n, groups, D] that
        ``segments`` count in."""
        ...


class KVCache:
    """Keys (after rotary) and values of every attention layer, in slots: [slots, capacity, groups, D].

    Each slot holds one sequence and has a length of its own. Call :meth:`extend` before each forward and give the batch
    the segments that it returns. Padding of a shorter prompt and fill-up to a multiple of the tensor-parallel size are
    in no segment and never stored. Slots grow together, by doubling.
    """

    def __init__(self, num_slots: int) -> None:
        self.lengths = [0] * num_slots
        """Tokens that each slot holds, those of the current forward included."""
        self.capacity = 64
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, new: Iterable[tuple[int, int, int]], num_tokens: int) -> AttentionSegments:
        """Announce the tokens of the next forward: (slot, first of them in the grid of ``num_tokens``, how many)."""
        segments = [Cached(slot, start, length, self.lengths[slot]) for slot, start, length in new]
        for slot, _, length, before in segments:
            self.lengths[slot] = before + length
        while self.capacity < max(self.lengths):
            self.capacity *= 2
        return AttentionSegments(cached(segments, self.capacity), num_tokens)

    def append(self, layer: int, key: Tensor, value: Tensor, segments: AttentionSegments) -> tuple[Tensor, Tensor]:
        """As :class:`Cache` says."""
        buffers = self._buffers.get(layer)
        if buffers is None or buffers[0].shape[1] < self.capacity:
            shape = (len(self.lengths), self.capacity, *key.shape[1:])
            grown = (key.new_zeros(shape), value.new_zeros(shape))
            for old, larger in zip(buffers or (), grown):
                larger[:, : old.shape[1]] = old
            buffers = self._buffers[layer] = grown
        tokens, places = new_keys(segments, key.device)
        keys, values = (buffer.flatten(0, 1) for buffer in buffers)
        keys[places], values[places] = key[tokens], value[tokens]
        return keys, values


_CACHE: ContextVar[Cache | None] = ContextVar("kv_cache", default=None)


@contextmanager
def kv_cache[C: Cache](cache: C) -> Iterator[C]:
    """Make every attention layer called inside read and extend ``cache``. Without gradients."""
    token = _CACHE.set(cache)
    try:
        with torch.no_grad():
            yield cache
    finally:
        _CACHE.reset(token)


class CoreAttention(MegatronModule):
    """Scaled dot-product attention with grouped keys and values, built by Megatron's ``SelfAttention``."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionSegments, **_: Any) -> Tensor:
        """[S, B, heads * D] from query [S, B, heads, D], key and value [S, B, groups, D]; zeros at padding."""
        size, rows = query.shape[:2]
        query, key, value = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        cache = _CACHE.get()
        if cache is not None:
            key, value = cache.append(self.layer_number, key, value, attention_mask)
        dropout = self.config.attention_dropout if self.training else 0.0
        # Heads are split over tensor-parallel ranks: each must drop its own.
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            output = segment_attention(query, key, value, attention_mask, scale=self.softmax_scale, dropout=dropout)
        return output.reshape(rows, size, -1).transpose(0, 1).contiguous()
