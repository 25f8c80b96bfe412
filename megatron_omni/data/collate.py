"""Samples -> one ``OmniBatch``, one or several samples a row, padded to a common length.

Samples that share a row follow each other as segments 0, 1, .. Padding stands at the end and carries segment -1, sample
-1, no label, position 0 and the pad id; the length is the longest row rounded up to ``multiple_of``. Tiles and chunks
are joined in row order, which is the order of their placeholders in the [B, S] grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, NO_RECORD, Modality, OmniBatch
from megatron_omni.data.sample import Sample
from megatron_omni.drawn import Drawn
from megatron_omni.positions import PositionRule
from megatron_omni.segments import AttentionSegments, Segment, causal


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    sample_ids: Sequence[int] | None = None,
    source_ids: Sequence[int] | None = None,
    row_of: Sequence[int] | None = None,
    multiple_of: int = 1,
    rule: PositionRule | None = None,
) -> OmniBatch:
    """One micro-batch. ``sample_ids`` are places in the global order (default: the sample's number here),
    ``source_ids`` sources, ``row_of`` each sample's row, ascending (default: a row of its own). With the model's
    ``rule``: ValueError unless its encoders give a row for every placeholder. On a device, and with other ranks waiting,
    it would be too late to find out.
    """
    if not samples:
        raise ValueError("collate needs at least one sample")
    sample_ids = range(len(samples)) if sample_ids is None else sample_ids
    source_ids = [0] * len(samples) if source_ids is None else source_ids
    row_of = range(len(samples)) if row_of is None else row_of
    assert len(samples) == len(sample_ids) == len(source_ids) == len(row_of)
    assert list(row_of) == sorted(row_of), "tiles and chunks are joined in row order: samples must come row by row"
    filled = [0] * (row_of[-1] + 1)
    starts, segments, used = [], [], list(filled)
    for row, sample in zip(row_of, samples):
        starts.append(filled[row])
        segments.append(used[row])
        filled[row] += sample.length
        used[row] += 1
    length = -(-max(filled) // multiple_of) * multiple_of
    attention = (
        segment.shifted(row * length + start)
        for row, start, sample in zip(row_of, starts, samples)
        for segment in _segments(sample)
    )

    def padded(parts: Sequence[Tensor | int], value: int) -> Tensor:
        """[.., B, S] of the samples' [.., L] tensors or constants."""
        leading = parts[0].shape[:-1] if isinstance(parts[0], Tensor) else ()
        out = torch.full((*leading, len(filled), length), value, dtype=torch.int64)
        for row, start, sample, part in zip(row_of, starts, samples, parts):
            out[..., row, start : start + sample.length] = part
        return out

    tiles = [sample.tiles for sample in samples if sample.tiles is not None]
    chunks = [sample.chunks for sample in samples if sample.chunks is not None]
    batch = OmniBatch.of(
        input_ids=padded([s.input_ids for s in samples], pad_id),
        labels=padded([s.labels for s in samples], IGNORE_LABEL),
        position_ids=padded([s.position_ids for s in samples], 0),
        segment_ids=padded(segments, -1),
        sample_ids=padded(sample_ids, -1),
        sample_positions=padded([_positions(s) for s in samples], 0),
        modality=padded([s.modality for s in samples], int(Modality.TEXT)),
        source_ids=padded(source_ids, -1),
        attention=AttentionSegments(tuple(attention), len(filled) * length),
        pixel_values=torch.cat(tiles) if tiles else None,
        audio_features=torch.cat(chunks) if chunks else None,
        routes=_routes(samples, list(zip(row_of, starts)), (len(filled), length)),
        drawn=Drawn.of(
            [sample.drawn for sample in samples],
            sample_ids=sample_ids,
            places=list(zip(row_of, starts)),
            vision_starts=_vision_starts(samples),
            num_rows=len(filled),
        ),
    )
    if rule is not None:
        _check_placeholders(batch, rule)
    return batch


def _segments(sample: Sample) -> tuple[Segment, ...]:
    return sample.attention or causal(sample.length)


def _positions(sample: Sample) -> Tensor:
    """[L] place of each token in its sample: as many as it sees before it."""
    positions = torch.zeros(sample.length, dtype=torch.int64)
    for segment in _segments(sample):
        queries, first = segment.queries, segment.first_position
        positions[queries.start : queries.stop] = torch.arange(first, first + len(queries))
    return positions


def _vision_starts(samples: Sequence[Sample]) -> list[int]:
    """Number of each sample's first row among the vision encoder's, which come in the order of the samples."""
    counts = [int(((s.modality == Modality.IMAGE) | (s.modality == Modality.VIDEO)).sum()) for s in samples]
    return [sum(counts[:index]) for index in range(len(samples))]


def _routes(samples: Sequence[Sample], places: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Tensor | None:
    """[B, S, W] uint8 of the samples' routes, whose (row, start) are ``places``; samples without have no record."""
    width = next((sample.routes.shape[1] for sample in samples if sample.routes is not None), None)
    if width is None:
        return None
    out = torch.full((*grid, width), NO_RECORD, dtype=torch.uint8)
    for (row, start), sample in zip(places, samples):
        if sample.routes is not None:
            out[row, start : start + sample.length] = sample.routes
    return out


def _check_placeholders(batch: OmniBatch, rule: PositionRule) -> None:
    for names, places, inputs, rows_each, config in (
        ("IMAGE/VIDEO", batch.picture_places, batch.pixel_values, rule.pooled_side**2, "model.vision"),
        ("AUDIO", batch.sound_places, batch.audio_features, rule.num_query_tokens, "model.audio"),
    ):
        num_inputs = 0 if inputs is None else len(inputs)
        found = f"the batch has {len(places)} {names} placeholders"
        if not rows_each and (len(places) or num_inputs):
            raise ValueError(f"{found} but {config} is null; drop those samples or give the model the encoder")
        if len(places) and not num_inputs:
            raise ValueError(f"{found} and nothing for the encoder to read")
        if len(places) != num_inputs * rows_each:
            raise ValueError(
                f"{found} but its {num_inputs} encoder inputs give {num_inputs * rows_each} rows; the sample builder and "
                f"{config} disagree"
            )
