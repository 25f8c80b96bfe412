"""The one data type that data, tasks, models and generation exchange: a micro-batch of omnimodal sequences.

Shapes: B sequences, S tokens each (padded), N vision tiles, C audio chunks. All tensors of a batch are on one device.

A sequence may hold several samples one after the other (packing): ``segment_ids`` tells them apart, and 3D positions
restart in each. ``attention`` says who sees whom, never across samples. ``sample_ids`` and ``sample_positions`` name a
token for all time (global sample index, position inside it), so that random draws made for a token do not depend on
where it was put.

Media placeholders: position (b, s) with modality IMAGE or VIDEO takes the next row of the vision encoder's output, AUDIO
the next row of the audio encoder's, both in the order of the flattened [B, S] grid; tiles and chunks are stored in that
same order. Stages of a pipeline that do not embed get the same batch with ``pixel_values`` and ``audio_features`` None.

A batch is made in host memory, by :meth:`OmniBatch.of`, which adds what follows from the tokens: where placeholders and
labels are, which media a sample has, counts. On a device each of these would be a wait of the host
(docs/decisions/0007-batch-facts.md). Its fields are therefore of eight kinds, which travel in different ways:

    MEDIA     pixel_values, audio_features
    INDICES   [n] int64, each with a length of its own: places in the flattened [S, B] grid, the order of hidden states
    COUNTS    Python integers, known on the host of every rank
    attention segments.py, also on the host of every rank
    part_labels  labels in each part of a row, where rows are cut (context parallelism), on the host of every rank as well
    routes    [B, S, ..] bytes, where routing is to be replayed (models/moe/routes.py)
    drawn     pictures that answers draw, on the last stage's ranks (drawn.py); a pipeline's last stage then has pixel_values,
              too, where the generator asks for the vision encoder's rows of a source
    GRIDS     everything else: [B, S], position_ids [3, B, S]
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from megatron_omni.drawn import Drawn
from megatron_omni.segments import AttentionSegments

IGNORE_LABEL = -100
NO_RECORD = 0x80
"""In the last byte of a token's routes in a layer, and so in all of its bytes: there is no record."""
MEDIA = ("pixel_values", "audio_features")
INDICES = ("picture_places", "sound_places", "label_places")
COUNTS = ("num_samples", "num_tokens")
APART = ("attention", "part_labels", "routes", "kept_rows", "drawn")


SampleRows = dict[str, Tensor]
"""What is frozen of what the encoders ``vision`` and ``audio`` made of a sample's media, in the order of its placeholders:
rows [n, H], or features of the tower [N, P, D] where the projector is trained."""


class KeptRows:
    """Rows or features of frozen encoders, kept between passes over a micro-batch that is computed several times."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        """By name of the encoder, of all samples behind each other as in :data:`SampleRows`."""
        self.places: dict[str, list[int]] = {}
        """By name of the encoder: placeholders of each sample, each of which is encoded alone, so that its bits depend on no
        other; none: all are encoded together."""
        self.complete = False
        """Media are not needed again."""

    @classmethod
    def of_samples(cls, batch: "OmniBatch", known: Mapping[int, SampleRows]) -> "KeptRows":
        """For ``batch`` of a sample in each sequence, with what is ``known`` of samples by their ids. A sample may be in
        several sequences."""
        kept = cls()
        pictures = (batch.modality == Modality.IMAGE) | (batch.modality == Modality.VIDEO)
        for name, here in (("vision", pictures), ("audio", batch.modality == Modality.AUDIO)):
            counts = here.sum(1)
            sequences = counts.nonzero().squeeze(1)
            if not len(sequences):
                continue
            kept.places[name] = counts[sequences].tolist()
            samples = batch.sample_ids[sequences, here.int().argmax(1)[sequences]].tolist()
            found = [known.get(sample, {}).get(name) for sample in samples]
            rows = [own for own in found if own is not None]
            if len(rows) == len(found):
                kept.rows[name] = torch.cat(rows)
        kept.complete = len(kept.rows) == len(kept.places)
        return kept


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
    """[B, S] int64: position inside the sample; of several responses to one prompt, each continues from the prompt."""
    modality: Tensor
    """[B, S] int64 of Modality."""
    source_ids: Tensor
    """[B, S] int64: index of the record's source in the recipe's mixture."""
    attention: AttentionSegments
    """Who sees whom in the flattened [B, S] grid, in host memory; padding is in no segment."""
    sample_modalities: Tensor
    """[B, S] int64, one bit for each Modality: bit m is set where the token's sample has m, TEXT's where it has no media;
    0 at padding."""
    picture_places: Tensor
    """[n] int64: IMAGE and VIDEO placeholders as places in the flattened [S, B] grid, in the order of the encoder's rows."""
    sound_places: Tensor
    """[n] int64: the same of AUDIO placeholders."""
    label_places: Tensor
    """[n] int64: tokens that carry a label as places in the flattened [S, B] grid, ascending."""
    num_samples: int
    """Samples in all sequences."""
    num_tokens: int
    """Tokens in all sequences, without padding."""
    part_labels: tuple[int, ...] = ()
    """Labels in each of as many equal parts of the rows (:meth:`with_parts`); (): nobody counted them."""
    pixel_values: Tensor | None = None
    """[N, 3, p, p] uint8 pixels, which the vision encoder normalises, or floats that are normalised."""
    audio_features: Tensor | None = None
    """[C, mel bins, frames] log-mel, float32 or what the audio encoder computes in."""
    routes: Tensor | None = None
    """[B, S, MoE layers x bytes] uint8: slots that the routers are to take (models/moe/routes.py); None: those of their
    logits."""
    kept_rows: KeptRows | None = None
    """Where rows of frozen encoders are kept; None: nowhere. It stays where it was made."""
    drawn: Drawn | None = None
    """Pictures that its answers draw; None: none, or this is not the last stage."""

    @classmethod
    def of(
        cls,
        *,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        sample_ids: Tensor,
        sample_positions: Tensor,
        modality: Tensor,
        source_ids: Tensor,
        attention: AttentionSegments,
        pixel_values: Tensor | None = None,
        audio_features: Tensor | None = None,
        routes: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> "OmniBatch":
        """The batch of these tokens, in host memory, with everything that follows from them."""
        pictures = (modality == Modality.IMAGE) | (modality == Modality.VIDEO)
        return cls(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            segment_ids=segment_ids,
            sample_ids=sample_ids,
            sample_positions=sample_positions,
            modality=modality,
            source_ids=source_ids,
            attention=attention,
            sample_modalities=_sample_modalities(modality, segment_ids),
            picture_places=_places(pictures),
            sound_places=_places(modality == Modality.AUDIO),
            label_places=label_places(labels),
            num_samples=int((segment_ids.amax(dim=1) + 1).sum()),
            num_tokens=int((segment_ids >= 0).sum()),
            pixel_values=pixel_values,
            audio_features=audio_features,
            routes=routes,
            drawn=drawn,
        )

    def to(self, device: torch.device | str) -> "OmniBatch":
        """The same batch on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        drawn = None if self.drawn is None else self.drawn.to(device)
        return replace(self, **moved, drawn=drawn)

    def with_parts(self, number: int) -> "OmniBatch":
        """The same batch, in host memory, with ``part_labels`` of so many parts."""
        size = self.labels.shape[1] // number * len(self.labels)
        counts = torch.bincount(self.label_places // max(size, 1), minlength=number)
        return replace(self, part_labels=tuple(counts.tolist()))

    @property
    def padding_mask(self) -> Tensor:
        """[B, S] bool, True at padding (Megatron's convention)."""
        return self.segment_ids < 0

    @property
    def num_label_tokens(self) -> int:
        """Tokens that carry a label."""
        return len(self.label_places)

    @property
    def num_images(self) -> int:
        """Pictures that its answers draw."""
        return 0 if self.drawn is None else len(self.drawn)


GRIDS = tuple(f.name for f in fields(OmniBatch) if f.name not in (*MEDIA, *INDICES, *COUNTS, *APART))


def label_places(labels: Tensor) -> Tensor:
    """``OmniBatch.label_places`` of ``labels`` [B, S]."""
    return (labels != IGNORE_LABEL).t().flatten().nonzero().squeeze(1)


def _places(wanted: Tensor) -> Tensor:
    """[n] places in the flattened [S, B] grid of the true entries of ``wanted`` [B, S], in the order of [B, S]."""
    row, column = wanted.nonzero(as_tuple=True)
    return column * len(wanted) + row


def _sample_modalities(modality: Tensor, segment_ids: Tensor) -> Tensor:
    """``OmniBatch.sample_modalities`` of ``modality`` and ``segment_ids`` [B, S]."""
    rows, length = modality.shape
    # Padding (segment -1) falls into the last slot of its row, which no sample uses.
    sample = torch.arange(rows).unsqueeze(1) * (length + 1) + segment_ids.remainder(length + 1)
    present = torch.zeros(rows * (length + 1), len(Modality), dtype=torch.bool)
    present[sample, modality] = True
    present[:, Modality.TEXT] = ~present[:, Modality.TEXT + 1 :].any(dim=1)
    bits = present.to(torch.int64) @ (1 << torch.arange(len(Modality)))
    return torch.where(segment_ids < 0, 0, bits[sample])
