"""What a record says of the picture that its answer is to be: which source, at what size, and which rows show it.

The source is the last picture of the turn that is answered (data/drawing.py). The size is that of the record's target where
it has one, so that both can be compared; else the bucket of a size that is asked for, or of the source's aspect, or a square.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_omni.batch import Modality
from megatron_omni.config.buckets import Size
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.picture_crops import cut_of, cut_to, pixels_of
from megatron_omni.data.record import MediaFile, Record, loaded
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.source_pictures import source_picture
from megatron_omni.generation.picture import drawn_size


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline:
    """Of one picture."""

    size: Size
    source: Tensor | None
    """[3, height, width] uint8."""
    note: str = ""
    """What is to be said of the size."""


def source_number(record: Record) -> int | None:
    """Of the images of a record the one that the pictures of its last answer are made from; None: from nothing."""
    turns = record.messages
    if turns and turns[-1].role == "assistant":
        if turns[-1].num_drawn:
            return record.picture_sources[-1]
        turns = turns[:-1]
    shown = turns[-1].media().count("image") if turns and turns[-1].role == "user" else 0
    return sum(message.media().count("image") for message in turns) - 1 if shown else None


def outline(
    record: Record, builder: SampleBuilder, config: ImageGeneratorConfig, *, wanted: Size | None = None
) -> Outline:
    """The size and source of the pictures of a record's last answer. MediaError for a picture that cannot be read."""
    number = source_number(record)
    picture = None
    if number is not None:
        media = loaded(record.images[number])
        picture = source_picture(record, number, builder.decoder.decode_image(media))
    target = _size_of(record.targets[-1]) if record.targets and wanted is None else None
    size, note = drawn_size(config, wanted, target or (picture.size if picture is not None else None))
    if picture is None:
        return Outline(size=size, source=None, note=note)
    # One cut for source and target, as training has it.
    cut = cut_of(*target, config) if target is not None else cut_to(*picture.size, size)
    return Outline(size=size, source=pixels_of(picture, cut), note=note)


def source_rows(record: Record, prompt: Sample) -> tuple[int, int] | None:
    """First and last + 1 of the vision encoder's rows of the source among those of the pictures and videos of ``prompt``."""
    if source_number(record) is None:
        return None
    # The last picture of the last turn that shows any: its placeholders are the last run of them.
    images = torch.nonzero(prompt.modality == int(Modality.IMAGE)).flatten()
    breaks = torch.nonzero(images.diff() > 1).flatten()
    first = int(images[int(breaks[-1]) + 1]) if len(breaks) else int(images[0])
    shown = (prompt.modality == int(Modality.IMAGE)) | (prompt.modality == int(Modality.VIDEO))
    before = int(shown[:first].sum())
    return before, before + int(images[-1]) + 1 - first


def _size_of(file: MediaFile) -> Size | None:
    """Of a target, where it is there."""
    from megatron_omni.data.decode import cpu

    try:
        return cpu.probe_image(loaded(file))
    except MediaError:
        return None
