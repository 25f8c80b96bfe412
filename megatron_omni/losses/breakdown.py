"""Means of a report, over everything, by modality and by source: sums and counts that add up over micro-batches and ranks.

    row 0                 every item
    rows 1..4             items of samples that contain the modality         ``{text,image,video,audio}``
    rows 5..5+sources     items of samples from one source of the mixture

A sample with a picture and a sound counts in ``image`` and in ``audio``; ``text`` is the samples without any media. An item
is a token, or a whole response, or a pair. Float64, divided only where it is printed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.batch import Modality

NUM_MODALITIES = len(Modality)


def membership(sample_modalities: Tensor, source_ids: Tensor, *, num_sources: int) -> Tensor:
    """[n, 1 + 4 + num_sources] float64: 1 where an item counts in a row, from the facts [n] of its sample (batch.py)."""
    bit = torch.arange(NUM_MODALITIES, device=source_ids.device)
    by_modality = sample_modalities.unsqueeze(1).bitwise_right_shift(bit).bitwise_and(1).double()
    source = torch.arange(num_sources, device=source_ids.device)
    by_source = (source_ids.unsqueeze(1) == source).double()
    everything = torch.ones(len(source_ids), 1, dtype=torch.float64, device=source_ids.device)
    return torch.cat([everything, by_modality, by_source], dim=1)


def sums_and_counts(values: Tensor, members: Tensor) -> Tensor:
    """[rows, 2] float64 of ``values`` [n] float64 and ``members`` [n, rows]: sum of each row, and items in it."""
    return torch.stack([values @ members, members.sum(dim=0)], dim=1)


def row_names(source_names: Sequence[str], prefix: str) -> list[str]:
    """Of all rows but the first."""
    modalities = [f"{prefix}/modality/{modality.name.lower()}" for modality in Modality]
    return [*modalities, *(f"{prefix}/source/{name}" for name in source_names)]
