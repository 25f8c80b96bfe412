"""A prompt and its responses as rows of a batch: the prompt once and every response behind it, or a row for each.

    prompt p_1 .. p_n, responses y^1 .. y^G (the token that ends one included)

    shared     p_1 .. p_{n-1} | p_n y^1_1 .. y^1_{m-1} | p_n y^2_1 .. | ..         one sample, a branch for each response
    labels           -          y^1_1 .. y^1_m           y^2_1 ..
    separate   p_1 .. p_{n-1} | p_n y^g_1 .. y^g_{m-1}                             a sample for each response

The last token of the prompt begins every branch: each response's first token needs a place that predicts it. A branch
sees the prompt and itself (segments.shared_prompt), and its positions, in 3D and in the sample, continue from the
prompt; so it computes what a row of its own would, and the prompt with its media is computed once. Where a row would
grow beyond ``capacity`` the rest of the responses goes on in a second row, with the prompt again.

The segments of the batch say where the responses are: those that see keys before their own are one response each, and
every token of one has a label. :func:`responses_of` reads them from there, on any rank and without asking the device.

Shapes: N responses of a micro-batch, T tokens of the longest; B rows, S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, NO_RECORD, Modality, OmniBatch
from megatron_omni.data.sample import Sample
from megatron_omni.platform.device import pinned
from megatron_omni.segments import AttentionSegments, Segment, causal, shared_prompt


@dataclass(frozen=True)
class Group:
    """A prompt and responses to it as one sample."""

    sample: Sample
    spans: tuple[range, ...]
    """Tokens of the sample whose labels are a response, for each in its order."""


def group_sample(prompt: Sample, responses: Sequence[Sequence[int]]) -> Group:
    """One sample of ``prompt``, which ends with text (SampleBuilder.build_prompt), and of the ids of each response.

    ValueError for a prompt of a single token, which leaves nothing to be shared, and a response without any.
    """
    if prompt.length < 2 or not responses or not all(map(len, responses)):
        raise ValueError(
            f"a prompt of {prompt.length} tokens and responses of {[*map(len, responses)]}: needs two tokens or more of a "
            "prompt and one or more of each response"
        )
    assert prompt.modality[-1] == Modality.TEXT, "the last token is repeated in each branch: it takes no encoder row"
    lengths = [*map(len, responses)]
    ids, labels = [prompt.input_ids[:-1]], [torch.full((prompt.length - 1,), IGNORE_LABEL)]
    positions, spans, start = [prompt.position_ids[:, :-1]], list[range](), prompt.length - 1
    for response in responses:
        told = torch.tensor(response, dtype=torch.int64)
        ids += [prompt.input_ids[-1:], told[:-1]]
        labels.append(told)
        following = torch.arange(prompt.next_position, prompt.next_position + len(told) - 1)
        positions += [prompt.position_ids[:, -1:], following.expand(3, -1)]
        spans.append(range(start, start + len(told)))
        start += len(told)
    text = torch.full((sum(lengths),), int(Modality.TEXT))  # also a placeholder's id that a response holds
    sample = replace(
        prompt,
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        position_ids=torch.cat(positions, dim=1),
        next_position=prompt.next_position + max(lengths) - 1,
        modality=torch.cat([prompt.modality[:-1], text]),
        attention=shared_prompt(prompt.length - 1, lengths),
    )
    return Group(sample, tuple(spans))


def group_samples(prompt: Sample, responses: Sequence[Sequence[int]], *, capacity: int) -> list[Group]:
    """:func:`group_sample` in as few samples of ``capacity`` tokens as hold the responses in their order.

    ValueError where the prompt and one response are longer than that.
    """
    parts: list[list[Sequence[int]]] = []
    filled = capacity
    for response in responses:
        if prompt.length - 1 + len(response) > capacity:
            raise ValueError(
                f"a prompt of {prompt.length} tokens and a response of {len(response)}: longer than data.seq_length = "
                f"{capacity}; raise it, or allow fewer new tokens"
            )
        if filled + len(response) > capacity:
            parts.append([])
            filled = prompt.length - 1
        parts[-1].append(response)
        filled += len(response)
    return [group_sample(prompt, part) for part in parts]


def separate_samples(prompt: Sample, responses: Sequence[Sequence[int]]) -> list[Group]:
    """A sample for each response, each with the prompt."""
    return [group_sample(prompt, [response]) for response in responses]


def joined(groups: Sequence[Group]) -> Group:
    """Groups one behind the other as one sample, in which none sees another."""
    samples = [group.sample for group in groups]
    starts = [*accumulate((sample.length for sample in samples[:-1]), initial=0)]
    tiles = [sample.tiles for sample in samples if sample.tiles is not None]
    chunks = [sample.chunks for sample in samples if sample.chunks is not None]
    sample = Sample(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        position_ids=torch.cat([sample.position_ids for sample in samples], dim=1),
        next_position=max(sample.next_position for sample in samples),
        modality=torch.cat([sample.modality for sample in samples]),
        tiles=torch.cat(tiles) if tiles else None,
        chunks=torch.cat(chunks) if chunks else None,
        attention=tuple(
            segment.shifted(start)
            for start, sample in zip(starts, samples)
            for segment in sample.attention or causal(sample.length)
        ),
    )
    spans = (
        range(span.start + start, span.stop + start) for start, group in zip(starts, groups) for span in group.spans
    )
    return Group(sample, tuple(spans))


class Responses(NamedTuple):
    """Where the responses of a micro-batch are, in the order of its rows."""

    places: Tensor
    """[N, T] int64 places in the flattened [B, S] grid; behind the end of a response, that of its first token."""
    valid: Tensor
    """[N, T] bool: the response has so many tokens; none of a sample that only fills a step (``without_labels``)."""

    def of(self, per_token: Tensor) -> Tensor:
        """[N, T] of ``per_token`` [B, S], zero behind the end of a response."""
        # Places are unique but for those masked here, so the sum in the backward has one order.
        picked = per_token.reshape(-1).index_select(0, self.places.flatten()).view_as(self.places)
        return picked.masked_fill(~self.valid, 0)

    def facts(self, grid: Tensor) -> Tensor:
        """[N] of ``grid`` [B, S], which is the same for all tokens of a sample: sources, modalities, sample ids."""
        return grid.reshape(-1).index_select(0, self.places[:, 0])

    @property
    def lengths(self) -> Tensor:
        """[N] int64 tokens of each."""
        return self.valid.sum(1)


def responses_of(batch: OmniBatch) -> Responses:
    """The responses of a batch that holds nothing but groups, on its device."""
    spans = response_spans(batch.attention)
    longest = max(map(len, spans), default=0)
    within, lengths = torch.arange(longest), torch.tensor([*map(len, spans)], dtype=torch.int64)
    starts = torch.tensor([span.start for span in spans], dtype=torch.int64)
    valid = within < lengths[:, None]
    places = starts[:, None] + within * valid
    device = batch.labels.device
    places, valid = (pinned(t).to(device, non_blocking=True) for t in (places, valid))
    learned = batch.labels.reshape(-1).index_select(0, places.flatten()).view_as(places) != IGNORE_LABEL
    return Responses(places, valid & learned)


def response_spans(attention: AttentionSegments) -> list[range]:
    """Tokens of the flattened [B, S] grid that are a response, for each in the order of rows."""
    return [segment.queries for segment in attention.segments if segment.first_position > 0]


def replaying(groups: Sequence[Group], routes: Sequence[Tensor]) -> list[Group]:
    """The groups with routes (``Sample.routes``): of each of their responses in order those of prompt and response but its
    last token, [L, W] uint8, as the engine tells them."""
    left, found = iter(routes), []
    for group in groups:
        sample = group.sample
        assert sample.attention is not None
        own = [(_seen(segment), next(left)) for segment in sample.attention if segment.first_position > 0]
        whole = own[0][1].new_full((sample.length, own[0][1].shape[1]), NO_RECORD)
        for places, told in own:
            whole[places] = told
        found.append(replace(group, sample=replace(sample, routes=whole)))
    return found


def routes_of_responses(attention: AttentionSegments, routes: Tensor) -> list[Tensor]:
    """Of each response in the order of rows what :func:`replaying` takes, from ``routes`` [B, S, W] of a batch."""
    flat = routes.flatten(0, 1)
    return [flat[_seen(segment)] for segment in attention.segments if segment.first_position > 0]


def _seen(segment: Segment) -> Tensor:
    """[L] places of the tokens of a response's prompt and of its own, in their order."""
    return torch.cat([torch.arange(keys.start, keys.stop) for keys in segment.keys])
