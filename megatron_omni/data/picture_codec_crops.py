"""Crops of pictures, step by step, for training a codec: square pieces of the records' pictures, mirrored now and then.

A record is an ordinary one with one ``<image>`` (crops.py). A sample of a step is ``crop_size`` pixels a side from a random place
of its picture; a smaller picture cannot be used. Place and mirroring are random; held-out crops are cut and no more.

In the batch a crop is a tile, ``pixel_values`` [B, 3, s, s] uint8, with one placeholder token, which counts as its label: the loss
of a step is a mean over pictures, and tokens are pictures.
"""

from dataclasses import replace
from typing import cast

import numpy as np
import torch

from megatron_omni.batch import Modality
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.crops import CropLoader, medium_alone
from megatron_omni.data.decode import cpu, open_decoder
from megatron_omni.data.record import MediaFile, Record, RecordError, loaded
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import SampleSize, SizeRule
from megatron_omni.data.tokenizer import Tokenizer


class PictureBuilder(SampleBuilder):
    """Records to whole pictures; nothing of them is text."""

    indexed = False

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        self.data, self.crop_size = recipe.data, recipe.picture_codec.crop_size
        self.decoder = open_decoder("cpu")
        # No text is read: whoever would ask these for something has gone wrong.
        self.tokenizer, self.sizes = cast(Tokenizer, tokenizer), cast(SizeRule, None)

    def size(self, record: Record) -> SampleSize:
        """That of every crop; RecordError or MediaError for a record without a picture that can be read and is large enough."""
        self._large_enough(cpu.probe_image(loaded(one_picture(record))), record)
        return SampleSize(0, image=1)

    def build_sample(self, record: Record) -> Sample:
        """The whole picture, [1, 3, H, W], as the tile of a sample of one token."""
        picture = cpu.decode_image(loaded(one_picture(record)))
        self._large_enough(picture.size, record)
        return medium_alone(Modality.IMAGE, 1, tiles=torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])

    def _large_enough(self, size: tuple[int, int], record: Record) -> None:
        if min(size) < self.crop_size:
            raise RecordError(
                record.where, field="images", value=f"{size[0]} x {size[1]}",
                problem=f"smaller than picture_codec.crop_size={self.crop_size}",
                fix="leave small pictures out, or lower it", reason="too_small",
            )  # fmt: skip


class PictureLoader(CropLoader):
    """Batches of crops."""

    builder: PictureBuilder

    def __init__(self, recipe: Recipe, *, sources: list[SourceConfig] | None = None, **options: object) -> None:
        self._settings = recipe.picture_codec
        super().__init__(recipe, sources=sources, **options)

    def _builder(self, recipe: Recipe, tokenizer: Tokenizer | None) -> PictureBuilder:
        return PictureBuilder(recipe, tokenizer)

    def _crop(self, whole: Sample, rng: np.random.Generator) -> Sample:
        assert whole.tiles is not None
        side = self._settings.crop_size
        top, left = (int(rng.integers(length - side + 1)) for length in whole.tiles.shape[2:])
        piece = whole.tiles[:, :, top : top + side, left : left + side]
        if self._settings.mirror and not self._held_out and rng.random() < 0.5:
            piece = piece.flip(3)
        return replace(whole, tiles=piece.contiguous())


def one_picture(record: Record) -> MediaFile:
    """The only picture of ``record``; RecordError for another number of them."""
    if len(record.images) != 1:
        raise RecordError(
            record.where, field="images", value=len(record.images), problem="a codec learns one picture a record",
            fix="write a record for each", reason="no_picture",
        )  # fmt: skip
    return record.images[0]
