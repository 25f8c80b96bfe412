"""Core attention: scaled dot products of rotated queries and keys, for training and for cached decoding.

Megatron's attention module projects, applies rotary angles and hands over query [S, B, heads, D], key and value [S,
B, groups, D] (this tensor-parallel rank's share); the output is [S, B, heads * D]. Who may attend to whom:

* training: causal; rows that hold several samples get a block-diagonal causal mask (:func:`packing_mask`). Padding
  stands at the
  end of a row, where causality already hides it from every real token.
* decoding: inside ``kv_cache(cache)`` each call appends its keys and values to the cache and attends to all valid
  ones. This
  sits below Megatron's attention module, so it is the same on every layout.

Masks are boolean, True where attention is allowed (torch's convention, not Megatron's).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor


class KVCache:
    """Keys (after rotary) and values of the positions decoded so far, per attention layer, and which of them are valid.

    Call :meth:`extend` once before each forward, with the validity of the tokens that it feeds; invalid ones (padding
    of a shorter prompt, fill-up to a multiple of the tensor-parallel size) are never attended to. ``truncate``
    forgets the newest.
    """

    def __init__(self) -> None:
        self.valid: Tensor | None = None
        """[B, n] bool: positions fed so far, those of the current forward included."""
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._mask: Tensor | None = None

    @property
    def length(self) -> int:
        """n: positions fed so far."""
        return 0 if self.valid is None else self.valid.shape[1]

    def extend(self, valid: Tensor) -> None:
        """Announce the tokens of the next forward: ``valid`` [B, s] bool."""
        self.valid = valid if self.valid is None else torch.cat([self.valid, valid], dim=1)
        # Query i of the new tokens sees valid keys up to its own position; its own key always, so that no row is empty.
        new, total = valid.shape[1], self.valid.shape[1]
        query = torch.arange(total - new, total, device=valid.device).unsqueeze(1)
        key = torch.arange(total, device=valid.device).unsqueeze(0)
        self._mask = ((key <= query) & self.valid.unsqueeze(1) | (key == query)).unsqueeze(1)

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        assert self.valid is not None and length <= self.length
        self.valid, self._mask = self.valid[:, :length], None

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store the new ``key`` and ``value`` [B, s, groups, D] of a layer; all keys, all values [B, n, groups, D],
        mask [B, 1, s, n].
        """
        assert self._mask is not None and self._mask.shape[2] == key.shape[1], (
            "call extend() before each cached forward"
        )
        total = self.length
        start = total - key.shape[1]
        buffers = self._buffers.get(layer)
        if buffers is None or buffers[0].shape[1] < total:
            capacity = max(2 * total, 64)
            grown = tuple(new.new_zeros(new.shape[0], capacity, *new.shape[2:]) for new in (key, value))
            if buffers is not None:
                for old, new in zip(buffers, grown):
                    new[:, :start] = old[:, :start]
            buffers = self._buffers[layer] = (grown[0], grown[1])
        for buffer, new in zip(buffers, (key, value)):
            buffer[:, start:total] = new
        return buffers[0][:, :total], buffers[1][:, :total], self._mask


_CACHE: ContextVar[KVCache | None] = ContextVar("kv_cache", default=None)


@contextmanager
def kv_cache(cache: KVCache) -> Iterator[KVCache]:
    """Make every attention layer called inside read and extend ``cache``. Without gradients."""
    token = _CACHE.set(cache)
    try:
        with torch.no_grad():
            yield cache
    finally:
        _CACHE.reset(token)


def packing_mask(segment_ids: Tensor) -> Tensor | None:
    """Block-diagonal causal mask [B, 1, S, S] of ``segment_ids`` [B, S]; None when no row holds two samples (plain
    causal).
    """
    if not bool((segment_ids > 0).any()):
        return None
    size = segment_ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment_ids.device).tril()
    return ((segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)) & causal).unsqueeze(1)


class CoreAttention(MegatronModule):
    """Scaled dot-product attention with grouped keys and values, built by Megatron's ``SelfAttention``."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[S, B, heads * D] from query [S, B, heads, D], key and value [S, B, groups, D], mask as in the file's
        docstring.
        """
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        cache = _CACHE.get()
        if cache is not None:
            key, value, attention_mask = cache.append(self.layer_number, key, value)
        dropout = self.config.attention_dropout if self.training else 0.0
        # Heads are split over tensor-parallel ranks: each must drop its own.
        with get_cuda_rng_tracker().fork() if dropout > 0.0 else nullcontext():
            output = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=attention_mask,
                is_causal=attention_mask is None,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return output.permute(2, 0, 1, 3).flatten(2)
