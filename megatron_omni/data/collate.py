"""Samples -> one ``OmniBatch``, one sample a row, padded to a common length.

Padding carries segment -1, sample -1, no label, position 0 and the pad id; the length is the longest row rounded up to
``multiple_of``. Tiles and chunks are joined in row order, which is the order of their placeholders in the [B, S] grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.data.sample import Sample


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    sample_ids: Sequence[int] | None = None,
    source_ids: Sequence[int] | None = None,
    multiple_of: int = 1,
) -> OmniBatch:
    """One micro-batch. ``sample_ids`` are places in the global order (default: the row), ``source_ids`` sources."""
    if not samples:
        raise ValueError("collate needs at least one sample")
    sample_ids = range(len(samples)) if sample_ids is None else sample_ids
    source_ids = [0] * len(samples) if source_ids is None else source_ids
    assert len(samples) == len(sample_ids) == len(source_ids)
    longest = max(sample.length for sample in samples)
    length = -(-longest // multiple_of) * multiple_of

    def padded(rows: Sequence[Tensor], value: int) -> Tensor:
        out = torch.full((*rows[0].shape[:-1], len(rows), length), value, dtype=torch.int64)
        for i, row in enumerate(rows):
            out[..., i, : row.shape[-1]] = row
        return out

    def constant(values: Sequence[int], padding: int) -> Tensor:
        return padded([torch.full((s.length,), v, dtype=torch.int64) for s, v in zip(samples, values)], padding)

    tiles = [sample.tiles for sample in samples if sample.tiles is not None]
    chunks = [sample.chunks for sample in samples if sample.chunks is not None]
    return OmniBatch(
        input_ids=padded([s.input_ids for s in samples], pad_id),
        labels=padded([s.labels for s in samples], IGNORE_LABEL),
        position_ids=padded([s.position_ids for s in samples], 0),
        segment_ids=constant([0] * len(samples), -1),
        sample_ids=constant(sample_ids, -1),
        sample_positions=padded([torch.arange(s.length) for s in samples], 0),
        modality=padded([s.modality for s in samples], int(Modality.TEXT)),
        source_ids=constant(source_ids, -1),
        pixel_values=torch.cat(tiles) if tiles else None,
        audio_features=torch.cat(chunks) if chunks else None,
    )
