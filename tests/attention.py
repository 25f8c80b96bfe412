"""The reference of attention, straight from the formula, and segments at random."""

from itertools import pairwise

import torch
from torch import Tensor

from megatron_omni.segments import AttentionSegments, Segment, causal, prefix, shared_prompt


def visible(segments: AttentionSegments, num_keys: int) -> Tensor:
    """[T, n] bool: query i sees key j. One query at a time, from the definition."""
    mask = torch.zeros(segments.num_tokens, num_keys, dtype=torch.bool)
    for segment in segments.segments:
        keys = [key for part in segment.keys for key in part]
        for i, query in enumerate(segment.queries):
            mask[query, keys[: len(keys) - len(segment.queries) + 1 + i] if segment.causal else keys] = True
    return mask


def reference(query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys that each query sees, zeros for queries that see none."""
    mask = visible(segments, len(key))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = scale * torch.einsum("ihd,jhd->hij", query, key)
    weights = torch.where(mask, scores, -torch.inf).softmax(dim=-1)
    weights = torch.where(mask.any(dim=1)[:, None], weights, 0.0)
    return torch.einsum("hij,jhd->ihd", weights, value)


def segments_of(segment_ids: Tensor) -> AttentionSegments:
    """Causal samples of ``segment_ids`` [B, S], -1 for padding."""
    flat = [(b, s) for b, row in enumerate(segment_ids.tolist()) for s in row]
    starts = [i for i, name in enumerate(flat) if i == 0 or flat[i - 1] != name]
    runs = [(start, stop) for start, stop in pairwise([*starts, len(flat)]) if flat[start][1] >= 0]
    samples = (segment.shifted(start) for start, stop in runs for segment in causal(stop - start))
    return AttentionSegments(tuple(samples), len(flat))


def drawn_segments(generator: torch.Generator, length: int) -> AttentionSegments:
    """Samples of all kinds in a row of ``length`` tokens, with padding between and after them."""

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    segments: list[Segment] = []
    start = draw(0, 3)
    while start < length:
        left = length - start
        kind = draw(0, 2)
        if kind == 0:
            sample = causal(draw(1, left))
        elif kind == 1:
            prompt = draw(0, left)
            responses, left = [], left - prompt
            while left and len(responses) < 4:
                responses.append(draw(1, left))
                left -= responses[-1]
            sample = shared_prompt(prompt, responses)
        else:
            condition = draw(0, left)
            sample = prefix(condition, draw(0, left - condition))
        segments += (segment.shifted(start) for segment in sample)
        start = (segments[-1].queries.stop if sample else start) + draw(0, 4)
    return AttentionSegments(tuple(segments), length)
