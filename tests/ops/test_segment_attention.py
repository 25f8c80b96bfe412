"""Attention by lengths against the masked formula in float64, forward and every gradient, for each use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_omni.ops import segment_attention as ops
from megatron_omni.ops.segment_attention import segment_attention
from megatron_omni.segments import AttentionSegments, Segment, causal, packed, prefix, row_parts, shared_prompt
from tests.attention import drawn_segments, reference, visible

CAPACITY = 32
USES = {
    "packed": packed([[9, 1, 14], [20], []], 24),
    "one sample": packed([[24]], 24),
    "nothing": packed([[], []], 5),
    "long": packed([[700, 3, 90]], 800),
    "shared prompt": AttentionSegments(shared_prompt(7, [5, 1, 8]), 24),
    "no prompt": AttentionSegments(shared_prompt(0, [5, 6]), 11),
    "two groups": AttentionSegments(
        (*shared_prompt(4, [3, 6]), *(s.shifted(13) for s in shared_prompt(2, [1, 1, 7]))), 26
    ),
    "prefix": AttentionSegments(prefix(6, 9), 16),
    "prefix alone": AttentionSegments(prefix(6, 0), 6),
    "cache": AttentionSegments(
        tuple(
            Segment(range(start, start + length), (range(slot * CAPACITY, slot * CAPACITY + before + length),))
            for slot, start, length, before in ((2, 0, 1, 17), (0, 1, 1, 0), (3, 2, 6, 5), (1, 9, 4, 0))
        ),
        14,
    ),
}


def problem(
    segments: AttentionSegments, num_keys: int | None = None, *, heads: int = 6, groups: int = 2, dtype=torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_keys = segments.num_tokens if num_keys is None else num_keys
    sizes = [(segments.num_tokens, heads, 8), (num_keys, groups, 8), (num_keys, groups, 8)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def keys_of(name: str) -> int | None:
    return 4 * CAPACITY if name == "cache" else None


def results(function, inputs: list[Tensor], *args, **settings) -> list[Tensor]:
    """Output and the gradients of every input, for a drawn gradient of the output."""
    output = function(*inputs, *args, **settings)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, inputs, grad.to(output.dtype), materialize_grads=True)]


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_equal_the_formula(name, dtype):
    segments = USES[name]
    inputs = problem(segments, keys_of(name), dtype=dtype)
    expected = results(reference, [x.detach().double().requires_grad_() for x in inputs], segments, 0.3)
    got = results(segment_attention, inputs, segments, scale=0.3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("way", ["varlen", "by segment"])
def test_the_other_ways_equal_the_formula(name, way, monkeypatch):
    """The path of a GPU but for its kernel, which the formula over gathered tokens and cu_seqlens stands for."""
    segments = USES[name]

    def kernel(query, key, value, call, scale):
        parts = []
        for i in range(len(call.cu_seqlens_q) - 1):
            (q0, q1), (k0, k1) = call.cu_seqlens_q[i : i + 2].tolist(), call.cu_seqlens_k[i : i + 2].tolist()
            assert q1 - q0 <= call.max_seqlen_q and k1 - k0 <= call.max_seqlen_k
            alone = AttentionSegments((Segment(range(q1 - q0), (range(k1 - k0),), call.causal),), q1 - q0)
            parts.append(reference(query[q0:q1], key[k0:k1], value[k0:k1], alone, scale))
        return torch.cat(parts)

    monkeypatch.setattr(ops, "varlen_kernel", kernel)
    ways = {
        "varlen": lambda *args: ops._varlen(*args, 0.3),
        "by segment": lambda *args: ops._by_segment(*args, 0.3, 0.0),
    }
    inputs = problem(segments, keys_of(name))
    expected = results(reference, inputs, segments, 0.3)
    for a, b in zip(results(ways[way], inputs, segments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 90), st.sampled_from([(1, 1), (3, 3), (4, 2), (7, 1)]))
def test_any_lengths(seed, length, heads_and_groups):
    segments = drawn_segments(torch.Generator().manual_seed(seed), length)
    assert AttentionSegments.from_numbers(segments.numbers()) == segments
    assert segments.num_pairs == int(visible(segments, length).sum())
    heads, groups = heads_and_groups
    inputs = problem(segments, heads=heads, groups=groups)
    expected = results(reference, inputs, segments, 8**-0.5)
    for a, b in zip(results(segment_attention, inputs, segments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9))
def test_the_queries_of_a_rank_see_what_they_saw(seed, ranks, size):
    """Two rows cut over context-parallel ranks: each query is one rank's, and its output that of the whole rows."""
    length, generator = 2 * ranks * size, torch.Generator().manual_seed(seed)
    rows = [drawn_segments(generator, length) for _ in range(2)]
    moved = (segment.shifted(row * length) for row, one in enumerate(rows) for segment in one.segments)
    whole = AttentionSegments(tuple(moved), 2 * length)
    query, key, value, *_ = problem(whole)
    expected, mask = reference(query, key, value, whole, 8**-0.5), visible(whole, 2 * length)
    places = []
    for rank in range(ranks):
        own = whole.of_rank(rank, ranks, length=length)
        tokens = [row * length + i for row in range(2) for part in row_parts(length, rank, ranks) for i in part]
        assert own.key_ranks == ranks and torch.equal(visible(own, 2 * length), mask[tokens])
        torch.testing.assert_close(segment_attention(query[tokens], key, value, own), expected[tokens])
        places += tokens
    assert sorted(places) == list(range(2 * length))


def test_ranks_have_the_same_work_of_a_row_that_one_sample_fills():
    assert {packed([[48]], 48).of_rank(rank, 4, length=48).num_pairs for rank in range(4)} == {48 * 49 // 8}


def test_padding_is_harmless():
    """Whatever padding holds: its outputs are zeros, nothing of it reaches others, and no gradient passes it."""
    segments = packed([[5, 2], [3]], 9)
    inputs = problem(segments, dtype=torch.float32)
    clean = results(segment_attention, inputs, segments)
    padding = ~visible(segments, segments.num_tokens).any(dim=1)
    assert padding.sum() == 8
    dirty = [x.detach().masked_fill(padding[:, None, None], torch.nan).requires_grad_() for x in inputs]
    got = results(segment_attention, dirty, segments)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a, b) and (a[padding] == 0).all()


def test_a_prompt_is_multiplied_once_with_all_of_its_responses():
    blocks = ops.blocks(AttentionSegments(shared_prompt(7, [5, 2, 8]), 22))
    assert [(b.queries, b.keys) for b in blocks if not b.first] == [(slice(7, 22), slice(0, 7))]
    assert sum(b.first for b in blocks) == 4


def test_dropout_leaves_out_weights_and_keeps_the_mean():
    segments = AttentionSegments((*causal(6), *(s.shifted(6) for s in prefix(4, 5))), 16)
    query, key, value = problem(segments, heads=2, groups=1)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = segment_attention(query, key, value, segments)
        drawn = torch.stack([segment_attention(query, key, value, segments, dropout=0.4) for _ in range(2000)])
    assert (drawn[0] != drawn[1]).any() and (drawn[:, 15] == 0).all()
    error = (drawn.mean(0) - plain) / (drawn.std(0) / 2000**0.5).clamp_min(1e-9)
    assert error.abs().max() < 5  # standard errors, of 256 values


def test_a_query_and_its_keys_are_checked():
    with pytest.raises(AssertionError, match="not the last"):
        AttentionSegments((Segment(range(4), (range(9), range(3))),), 4)
    with pytest.raises(AssertionError, match="after 4"):
        AttentionSegments((*causal(4), *causal(5)), 9)
    with pytest.raises(AssertionError, match="4 queries"):
        segment_attention(*(x[:4] for x in problem(USES["prefix"])), USES["prefix"])
