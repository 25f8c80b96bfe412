"""The pictures of a record as task ``generative`` learns them: target and source, what teachers and models said of both.

A target is latents where the record names some, else pixels, cut to a size (picture_crops.py); so is its source. Hidden states
are read where ``generative.conditions`` is ``cached``, teachers where a loss asks for them or conditions come from them. What
no loss asks for is not read. Pictures of answers that are not learned are not.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from megatron_omni.config.run import Recipe
from megatron_omni.data.decode import Decoder
from megatron_omni.data.drawing import Drawing
from megatron_omni.data.errors import RecordError
from megatron_omni.data.picture_arrays import PictureArrays, known_arrays
from megatron_omni.data.picture_crops import Cut, check_pair, check_target, cut_of, pixels_of
from megatron_omni.data.record import Record, loaded
from megatron_omni.data.source_pictures import source_picture
from megatron_omni.drawn import DrawnPicture

TEACHERS = ("task", "caption", "visual")


class Standing(NamedTuple):
    """Where a picture of a record stands in its sample."""

    number: int
    """Which of the record's targets it is."""
    offsets: Sequence[int]
    """Its block."""
    source: Callable[[], Image.Image] | None
    """The picture that it is made from, RGB."""
    vision_rows: tuple[int, int] | None
    """The vision encoder's rows of that, in the sample."""


class PictureReader:
    """Reads pictures as a recipe of task ``generative`` asks for them."""

    def __init__(self, recipe: Recipe, decoder: Decoder) -> None:
        assert recipe.model.image is not None
        self.config, self.decoder, self.arrays = recipe.model.image, decoder, PictureArrays(recipe)
        self.conditions, losses = recipe.generative.conditions, recipe.generative.losses
        self.shows_source = recipe.model.vision is not None
        self.draws = bool(losses.flow)
        self.aligned = [name for name in TEACHERS if getattr(losses, f"align_{name}")]
        self.only_aligned = not self.draws and not (losses.lm and self.conditions == "model")

    def read(self, record: Record, standing: Sequence[Standing]) -> tuple[DrawnPicture, ...]:
        """Pictures of a record that draws. RecordError or MediaError for what cannot be used."""
        return tuple(self._picture(record, place) for place in standing)

    def _picture(self, record: Record, place: Standing) -> DrawnPicture:
        assert record.drawing is not None
        number, drawing = record.picture_sources[place.number], record.drawing
        target, source = self.both(record, place) if self.draws else (None, None)
        hidden, vision = self._kept(record, place) if self.conditions == "cached" else (None, None)
        return DrawnPicture(
            offsets=torch.tensor([*place.offsets], dtype=torch.int64),
            task=drawing.task_of(number),
            target=target,
            source=source,
            vision_rows=place.vision_rows if self.conditions == "model" else None,
            vision=vision,
            hidden=hidden,
            teachers=self._taught(record, drawing, place),
        )

    def both(self, record: Record, place: Standing) -> tuple[Tensor, Tensor | None]:
        """Target and source, of one size: latents or pixels. RecordError or MediaError for what cannot be used."""
        assert record.drawing is not None
        known = known_arrays(record.drawing.latents, place.number)
        cut, size = None, None
        if "target" in known:
            target = self.arrays.latents(known["target"], field="latents.target", where=record.where)
        else:
            picture = self.decoder.decode_image(loaded(record.targets[place.number]))
            size, cut = picture.size, self._cut(record, place.number, picture.size)
            target = pixels_of(picture, cut)
        if place.source is None:
            return target, None
        if ("target" in known) != ("source" in known):
            raise RecordError(
                record.where, field="latents", value=sorted(known), problem="are of one of the target and its source alone",
                fix="run megatron-omni prepare --latents again", reason="bad_latents",
            )  # fmt: skip
        if "source" in known:
            source = self.arrays.latents(known["source"], field="latents.source", where=record.where)
            if source.shape != target.shape:
                raise RecordError(
                    record.where, field="latents.source", value=list(source.shape),
                    problem=f"are not as large as the target's {list(target.shape)}",
                    fix="run megatron-omni prepare --latents again", reason="bad_latents",
                )  # fmt: skip
            return target, source
        assert cut is not None and size is not None
        shown = place.source()
        check_pair(size, shown.size, where=record.where)
        return target, pixels_of(shown, cut)

    def _cut(self, record: Record, number: int, size: tuple[int, int]) -> Cut:
        check_target(*size, self.config, field=f"targets[{number}]", where=record.where)
        return cut_of(*size, self.config)

    def _kept(self, record: Record, place: Standing) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the block, and the vision encoder's rows of the source."""
        assert record.drawing is not None
        known = known_arrays(record.drawing.hidden, place.number)
        sees = place.source is not None and self.shows_source
        if missing := [name for name in ("rows", *(("vision",) if sees else ())) if name not in known]:
            raise RecordError(
                record.where, field=f"hidden.{missing[0]}", value=None,
                problem="is missing, and generative.conditions = cached reads it",
                fix="run megatron-omni prepare --hidden CHECKPOINT", reason="no_hidden",
            )  # fmt: skip
        rows = self.arrays.hidden(known["rows"], rows=len(place.offsets), field="hidden.rows", where=record.where)
        if not sees:
            return rows, None
        return rows, self.arrays.hidden(known["vision"], rows=None, field="hidden.vision", where=record.where)

    def _taught(self, record: Record, drawing: Drawing, place: Standing) -> dict[str, Tensor]:
        known = known_arrays(drawing.teachers, place.number)
        wanted = TEACHERS if self.conditions == "teachers" else self.aligned
        needed = ("task", "caption") if self.conditions == "teachers" else ()
        missing = [name for name in needed if name not in known]
        if missing or (self.only_aligned and not known.keys() & set(wanted)):
            name = missing[0] if missing else self.aligned[0]
            raise RecordError(
                record.where, field=f"teachers.{name}", value=None, problem="is missing, and nothing else is learned from",
                fix="write what the teacher makes of it, or take the row out", reason="no_teacher",
            )  # fmt: skip
        return {name: self.arrays.teacher(name, known[name], where=record.where) for name in wanted if name in known}


def picture_source(record: Record, number: int, decoder: Decoder) -> Image.Image:
    """Image ``number`` of a record, damaged where it says so."""
    return source_picture(record, number, decoder.decode_image(loaded(record.images[number])))


def learned_pictures(record: Record) -> list[int]:
    """Numbers of the targets of answers that are learned."""
    owners = [message.learned for message in record.messages for _ in range(message.num_drawn)]
    return [number for number, learned in enumerate(owners) if learned]
