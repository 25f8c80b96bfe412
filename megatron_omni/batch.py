"""The one data type that data, tasks, models and generation exchange: a micro-batch of omnimodal sequences.

Shapes: B sequences, S tokens each (padded), N vision tiles, C audio chunks. All tensors of a batch are on one device.

A sequence may hold several samples one after the other (packing): ``segment_ids`` tells them apart, attention never crosses
a boundary, and 3D positions restart in each. ``sample_ids`` and ``sample_positions`` name a token for all time
(global sample index, position inside it), so that random draws made for a token do not depend on where it was put.

Media placeholders: position (b, s) with modality IMAGE or VIDEO takes the next row of the vision encoder's output, AUDIO
the next row of the audio encoder's, both in the order of the flattened [B, S] grid; tiles and chunks are stored in that
same order. Stages of a pipeline that do not embed get the same batch with ``pixel_values`` and ``audio_features`` None.
"""

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

IGNORE_LABEL = -100


class Modality(IntEnum):
    """Kind of input that a token stands for; the index of every per-modality statistic."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


@dataclass(frozen=True, kw_only=True)
class OmniBatch:
    """One micro-batch."""

    input_ids: Tensor
    """[B, S] int64."""
    labels: Tensor
    """[B, S] int64, already shifted: the token to predict at each position, IGNORE_LABEL where nothing is learned."""
    position_ids: Tensor
    """[3, B, S] int64: time, height, width (positions.py)."""
    segment_ids: Tensor
    """[B, S] int64: index of the sample inside its sequence, -1 for padding."""
    sample_ids: Tensor
    """[B, S] int64: index of the sample in the global order of the run, -1 for padding."""
    sample_positions: Tensor
    """[B, S] int64: position inside the sample."""
    modality: Tensor
    """[B, S] int64 of Modality."""
    source_ids: Tensor
    """[B, S] int64: index of the record's source in the recipe's mixture."""
    pixel_values: Tensor | None = None
    """[N, 3, p, p] uint8 pixels, which the vision encoder normalises, or floats that are normalised."""
    audio_features: Tensor | None = None
    """[C, mel bins, frames] log-mel, float32 or what the audio encoder computes in."""

    def to(self, device: torch.device | str) -> "OmniBatch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})

    @property
    def padding_mask(self) -> Tensor:
        """[B, S] bool, True at padding (Megatron's convention)."""
        return self.segment_ids < 0

    @property
    def num_samples(self) -> int:
        """Samples in all sequences."""
        return int((self.segment_ids.amax(dim=1) + 1).sum())

    @property
    def num_label_tokens(self) -> int:
        """Tokens that carry a label."""
        return int((self.labels != IGNORE_LABEL).sum())
