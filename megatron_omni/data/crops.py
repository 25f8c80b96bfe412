"""Step by step, crops of the records' media: what trains codecs (sound_crops.py, picture_codec_crops.py).

A record is an ordinary one with one medium; its turns are not read, and it needs no answer. Order, plans, stand-ins and the cursor
are those of loader.py. A sample of a step is a crop of its record. What is random in it is drawn by the seed and the sample's
number in the order of the run: the same on every layout, and in a run that was resumed.
"""

from abc import abstractmethod

import numpy as np
import torch

from megatron_omni.batch import Modality, OmniBatch
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.plan import Place, Row, Skip
from megatron_omni.data.sample import Sample
from megatron_omni.platform.seeds import named_seed


class CropLoader(StepLoader):
    """Batches of crops."""

    def __init__(self, recipe: Recipe, *, sources: list[SourceConfig] | None = None, **options: object) -> None:
        self._seed, self._held_out = recipe.seed, sources is not None
        super().__init__(recipe, sources=sources, **options)  # type: ignore[arg-type]

    def _batch(self, rows: list[Row], skips: list[Skip]) -> OmniBatch:
        found = [(place, self._drawn(place, sample)) for _, place, sample in self._decoded_rows(rows, skips)]
        return collate(
            [sample.without_labels() if place.is_filler else sample for place, sample in found],
            pad_id=0,
            sample_ids=[place.sample_id for place, _ in found],
            source_ids=[place.draw.source for place, _ in found],
        )

    def _drawn(self, place: Place, whole: Sample) -> Sample:
        return self._crop(whole, np.random.default_rng(named_seed(self._seed, "crop", place.sample_id)))

    @abstractmethod
    def _crop(self, whole: Sample, rng: np.random.Generator) -> Sample:
        """A crop of a whole medium; of held-out ones it is cut and no more."""


def medium_alone(
    modality: Modality, num_tokens: int, *, tiles: torch.Tensor | None = None, chunks: torch.Tensor | None = None
) -> Sample:
    """A sample of ``num_tokens`` tokens that stand for its medium; all of them count as labels."""
    zeros = torch.zeros(num_tokens, dtype=torch.int64)
    return Sample(
        input_ids=zeros,
        labels=zeros,
        position_ids=torch.arange(num_tokens).expand(3, -1),
        next_position=num_tokens,
        modality=torch.full_like(zeros, int(modality)),
        tiles=tiles,
        chunks=chunks,
    )
