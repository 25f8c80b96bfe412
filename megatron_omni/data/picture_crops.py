"""Pictures at the sizes that a generator learns: one cut for a target and its source.

    size   the bucket (config/buckets.py) whose aspect is nearest the target's
    cut    the largest part of the target with the bucket's aspect, in its middle; resized (bicubic, antialiased)
    source the same part of it, by its own width and height

So what lies on the same place of both pictures still does. A pair whose aspects differ by more than ``SLACK`` shows different
parts already, and is refused; a smaller difference is squeezed. Nothing is drawn: what is cut is a function of the pictures,
and of the generator's ``base_size``, ``size_step`` and ``max_aspect``.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_omni.config.buckets import Size, buckets, nearest_bucket
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.data.errors import RecordError

SLACK = 0.05
"""Relative difference of the aspects of a target and its source."""


class Cut(NamedTuple):
    """The part of a picture that is kept, as shares of its width and height, and the size in pixels that it is given."""

    left: float
    top: float
    right: float
    bottom: float
    size: Size


def sizes_of(config: ImageGeneratorConfig) -> tuple[Size, ...]:
    """The buckets of a generator."""
    return buckets(config.base_size, config.size_step, config.max_aspect)


def cut_of(width: int, height: int, config: ImageGeneratorConfig) -> Cut:
    """The cut of a target of ``width`` x ``height`` pixels."""
    return cut_to(width, height, nearest_bucket(width, height, sizes_of(config)))


def cut_to(width: int, height: int, size: Size) -> Cut:
    """The largest part, in its middle, of a picture of ``width`` x ``height`` pixels that has the aspect of ``size``."""
    scale = max(size[0] / width, size[1] / height)
    kept_width, kept_height = min(1.0, size[0] / (scale * width)), min(1.0, size[1] / (scale * height))
    left, top = (1 - kept_width) / 2, (1 - kept_height) / 2
    return Cut(left, top, 1 - left, 1 - top, size)


def pixels_of(picture: Image.Image, cut: Cut) -> Tensor:
    """[3, height, width] uint8 of an RGB picture."""
    width, height = picture.size
    box = (cut.left * width, cut.top * height, cut.right * width, cut.bottom * height)
    if picture.size != cut.size or box != (0, 0, width, height):
        picture = picture.resize(cut.size, Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def check_target(width: int, height: int, config: ImageGeneratorConfig, *, field: str, where: str) -> None:
    """RecordError for a picture that is no target: longer than ``max_aspect`` allows, or with a side below ``size_step``."""
    if min(width, height) < config.size_step:
        raise RecordError(
            where, field=field, value=f"{width}x{height}",
            problem=f"a side is below model.image.size_step = {config.size_step} pixels",
            fix="give a larger picture", reason="too_small",
        )  # fmt: skip
    if max(width, height) > config.max_aspect * min(width, height):
        raise RecordError(
            where, field=field, value=f"{width}x{height}",
            problem=f"its sides are as 1 to {max(width, height) / min(width, height):.1f}, more than "
            f"model.image.max_aspect = {config.max_aspect:g}",
            fix="cut the picture (and its source)", reason="bad_aspect",
        )  # fmt: skip


def check_pair(target: Size, source: Size, *, where: str) -> None:
    """RecordError for a source that cannot show what its target shows."""
    ratio = target[0] * source[1] / (target[1] * source[0])
    if max(ratio, 1 / ratio) > 1 + SLACK:
        raise RecordError(
            where, field="images", value=f"{source[0]}x{source[1]}",
            problem=f"is the source of a target of {target[0]}x{target[1]}: their aspects differ, so they do not show the "
            "same part",
            fix="cut both to the same part", reason="misaligned",
        )  # fmt: skip
