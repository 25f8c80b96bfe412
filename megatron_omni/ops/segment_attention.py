"""Attention by lengths: softmax(scale q k^T) v over the keys that each query sees, and no mask.

    out[i] = sum_j p[i, j] v[j],    p[i, j] = exp(scale q[i] . k[j]) / sum over the keys j' that i sees

q [T, heads, D], k and v [n, groups, D], out [T, heads, D]; ``heads / groups`` neighbouring heads share a group. Who sees
whom is :class:`~megatron_omni.segments.AttentionSegments`; a query of no segment gets zeros, and no gradient passes it.

Three ways, one description:

* CUDA, 16 bits: a variable-length flash kernel, Transformer Engine's where it is there, else PyTorch's. One call for the
  causal segments and one for the full ones, where there are any. Keys that do not lie in order are gathered.
* CPU: the scores of a segment are cut into blocks, rectangles that all count and causal squares; PyTorch's flash kernel
  computes each in place. Blocks of the same queries are joined by their log-sums, s = logaddexp(s1, s2),
  out = exp(s1 - s) out1 + exp(s2 - s) out2, and the kernel's backward is right for each block when it is given the joint
  output and log-sum (the decomposition of ring attention, https://arxiv.org/abs/2310.01889). Nothing is gathered.
* otherwise (dropout, 32 bits on CUDA): PyTorch's product, segment by segment.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_omni.segments import AttentionSegments, Segment

_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the public product hides the log-sum
_FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_LENGTH_STEP = 512


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: AttentionSegments,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[T, heads, D] from ``query`` [T, heads, D], ``key`` and ``value`` [n, groups, D]; ``scale`` None: 1 / sqrt(D).

    ``dropout``: share of the attention weights that is left out, drawn from PyTorch's generator.
    """
    assert len(query) == segments.num_tokens, f"segments of {segments.num_tokens} tokens, {len(query)} queries"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if dropout == 0.0 and query.device.type == "cpu":
        return _Blocks.apply(query, key, value, blocks(segments), scale)
    if dropout == 0.0 and query.itemsize == 2 and query.is_cuda:
        return _varlen(query, key, value, segments, scale)
    return _by_segment(query, key, value, segments, scale, dropout)


# ------------------------------------------------------------------------------------------------------ CPU: blocks


class Block(NamedTuple):
    """A rectangle of scores that all count or, ``causal``, a square of which the lower triangle does."""

    queries: slice
    keys: slice
    causal: bool
    first: bool
    """No block before it has these queries; otherwise its output joins theirs."""


def blocks(segments: AttentionSegments) -> list[Block]:
    """The blocks of all segments. Neighbours that see the same keys, as responses see their prompt, share a rectangle."""
    if "blocks" not in segments.derived:
        segments.derived["blocks"] = list(_blocks(segments.segments))
    return segments.derived["blocks"]


def _blocks(segments: Iterable[Segment]) -> Iterator[Block]:
    shared: list[tuple[range, range]] = []
    for segment in segments:
        queries, keys = segment.queries, segment.keys
        if segment.causal and len(queries) > 1:
            own = segment.own_keys
            yield Block(_slice(queries), _slice(own), causal=True, first=True)
            keys = (*keys[:-1], keys[-1][: -len(own)])
        else:
            yield Block(_slice(queries), _slice(keys[0]), causal=False, first=True)
            keys = keys[1:]
        for part in filter(len, keys):
            if shared and shared[-1][1] == part and shared[-1][0].stop == queries.start:
                shared[-1] = (range(shared[-1][0].start, queries.stop), part)
            else:
                shared.append((queries, part))
    for queries, part in shared:
        yield Block(_slice(queries), _slice(part), causal=False, first=False)


def _slice(tokens: range) -> slice:
    return slice(tokens.start, tokens.stop)


class _Blocks(torch.autograd.Function):
    """Flash attention over blocks."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float) -> Tensor:
        result = torch.zeros_like(query, memory_format=torch.contiguous_format)
        q, k, v, output = map(_heads, (query, key, value, result))
        # The kernel gives log-sums in single precision, in double for double.
        log_sum = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, columns, causal, first in blocks:
            part, part_sum = _FLASH_CPU(q[:, :, rows], k[:, :, columns], v[:, :, columns], 0.0, causal, scale=scale)
            out, total = output[:, :, rows], log_sum[:, :, rows]
            if not first:
                joint = torch.logaddexp(total, part_sum)
                part = out * (total - joint).exp().unsqueeze(-1) + part * (part_sum - joint).exp().unsqueeze(-1)
                part_sum = joint
            out.copy_(part)
            total.copy_(part_sum)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.blocks, ctx.scale = blocks, scale
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, result, log_sum = ctx.saved_tensors
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
        g, q, k, v, output, dq, dk, dv = map(_heads, (grad, *inputs, result, *grads))
        for rows, columns, causal, first in ctx.blocks:
            dq_part, dk_part, dv_part = _FLASH_CPU_BACKWARD(
                g[:, :, rows],
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                output[:, :, rows],
                log_sum[:, :, rows],
                0.0,
                causal,
                scale=ctx.scale,
            )
            if first:
                dq[:, :, rows] = dq_part
            else:
                dq[:, :, rows] += dq_part
            dk[:, :, columns] += dk_part
            dv[:, :, columns] += dv_part
        return (*grads, None, None)


def _heads(x: Tensor) -> Tensor:
    """[1, heads, T, D] view of [T, heads, D]."""
    return x.transpose(0, 1).unsqueeze(0)


# ----------------------------------------------------------------------------------- CUDA: a variable-length kernel


class VarlenCall(NamedTuple):
    """What one call of a variable-length kernel is given for n segments."""

    causal: bool
    """Aligned at the end."""
    queries: Tensor | None
    """[sum of lengths] int64: tokens of the queries, segment by segment; None where that is all of them, in order."""
    keys: Tensor | None
    """The same of the keys."""
    cu_seqlens_q: Tensor
    """[n + 1] int32: where the queries of each segment begin."""
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    """At least the longest: a multiple of ``_LENGTH_STEP``, so that kernels built for a length are built for few."""
    max_seqlen_k: int


def varlen_calls(segments: AttentionSegments, num_keys: int, device: torch.device) -> list[VarlenCall]:
    """The calls that compute all segments over ``num_keys`` keys: one for the causal ones and one for the others."""
    name = ("varlen", num_keys, device)
    if name not in segments.derived:
        kinds = [[s for s in segments.segments if s.causal == is_causal] for is_causal in (True, False)]
        segments.derived[name] = [
            VarlenCall(
                causal=kind[0].causal,
                queries=_tokens((s.queries for s in kind), segments.num_tokens, device),
                keys=_tokens((keys for s in kind for keys in s.keys), num_keys, device),
                cu_seqlens_q=_cumulated((len(s.queries) for s in kind), device),
                cu_seqlens_k=_cumulated((s.num_keys for s in kind), device),
                max_seqlen_q=_bound(len(s.queries) for s in kind),
                max_seqlen_k=_bound(s.num_keys for s in kind),
            )
            for kind in kinds
            if kind
        ]
    return segments.derived[name]


def _joined(ranges: Iterable[range]) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop) for r in ranges] or [torch.arange(0)])


def _bound(lengths: Iterable[int]) -> int:
    return -(-max(lengths) // _LENGTH_STEP) * _LENGTH_STEP


def _tokens(ranges: Iterable[range], number: int, device: torch.device) -> Tensor | None:
    tokens = _joined(ranges)
    return None if torch.equal(tokens, torch.arange(number)) else _sent(tokens, device)


def _cumulated(lengths: Iterable[int], device: torch.device) -> Tensor:
    return _sent(F.pad(torch.tensor(list(lengths)).cumsum(0), (1, 0)).int(), device)


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers on a device, which reads them by itself where it can."""
    return (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, scale: float) -> Tensor:
    output = None
    for call in varlen_calls(segments, len(key), query.device):
        part = varlen_kernel(
            _gathered(query, call.queries), _gathered(key, call.keys), _gathered(value, call.keys), call, scale
        )
        if call.queries is None:
            return part
        output = torch.zeros_like(query) if output is None else output
        output = output.index_copy(0, call.queries, part)
    return output if output is not None else torch.cat([query[:0], torch.zeros_like(query)])  # part of the graph


def _gathered(x: Tensor, tokens: Tensor | None) -> Tensor:
    return x if tokens is None else x.index_select(0, tokens)


def varlen_kernel(query: Tensor, key: Tensor, value: Tensor, call: VarlenCall, scale: float) -> Tensor:
    """[Tq, heads, D]: the product of each segment, from queries [Tq, heads, D] and keys [Tk, groups, D] one segment
    behind the other."""
    attention = _transformer_engine(query.shape[1], key.shape[1], query.shape[2], scale)
    if attention is not None:
        mask = "padding_causal_bottom_right" if call.causal else "padding"
        output = attention(
            query,
            key,
            value,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_kv=call.cu_seqlens_k,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_kv=call.max_seqlen_k,
            attn_mask_type=mask,
        )
        return output.view_as(query)
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        scale=scale,
        window_size=(-1, 0) if call.causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


@functools.cache
def _transformer_engine(heads: int, groups: int, channels: int, scale: float) -> Any:
    """Transformer Engine's attention, None without it. Shared by all layers: it has no parameters."""
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError:
        return None
    return DotProductAttention(
        heads, channels, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="thd", softmax_scale=scale
    )


# ------------------------------------------------------------------------------------------------- segment by segment


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, scale: float, dropout: float
) -> Tensor:
    parts, end = [query[:0]], 0  # part of the graph, also without segments
    for segment in segments.segments:
        queries, keys = segment.queries, [_slice(keys) for keys in segment.keys]
        square = len(queries) == segment.num_keys
        parts += [
            query.new_zeros(queries.start - end, *query.shape[1:]),
            F.scaled_dot_product_attention(
                _heads(query[_slice(queries)]),
                _heads(torch.cat([key[part] for part in keys])),
                _heads(torch.cat([value[part] for part in keys])),
                attn_mask=causal_lower_right(len(queries), segment.num_keys) if segment.causal and not square else None,
                is_causal=segment.causal and square,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            .squeeze(0)
            .transpose(0, 1),
        ]
        end = queries.stop
    return torch.cat([*parts, query.new_zeros(len(query) - end, *query.shape[1:])])
