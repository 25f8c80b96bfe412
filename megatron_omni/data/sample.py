"""Record -> ``Sample``: the tensors of one conversation, the same code for training, evaluation and generation.

``SampleBuilder`` holds what the recipe says (tokenizer, template, sizes). ``size`` reads media headers only (sizes.py),
the ``build_*`` methods decode. Labels are the ids shifted by one, on answers alone; tiles and chunks stand in the order of
their placeholders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.config.run import Recipe
from megatron_omni.data.decode import open_decoder
from megatron_omni.data.decode.media import MAX_AUDIO_SECONDS, Media, MediaError
from megatron_omni.data.drawn_pictures import PictureReader, Standing, learned_pictures
from megatron_omni.data.processors import frame_tiles, image_tiles, log_mel, square
from megatron_omni.data.record import KINDS, Kind, Record, RecordError, loaded
from megatron_omni.data.sizes import SampleSize, SizeRule, check_drawable, check_speakable, measure
from megatron_omni.data.source_pictures import source_picture
from megatron_omni.data.sources import Source
from megatron_omni.data.template import MediaSpans, Rendered, answer_beginning, asked, render
from megatron_omni.data.tokenizer import Tokenizer, load_tokenizer
from megatron_omni.drawn import DrawnPicture
from megatron_omni.positions import AudioSpan, ImageSpan, TextSpan, VideoSpan, position_ids
from megatron_omni.segments import Segment


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation of L tokens."""

    input_ids: Tensor
    """[L] int64."""
    labels: Tensor
    """[L] int64, shifted: the answer token that follows each position, IGNORE_LABEL elsewhere."""
    position_ids: Tensor
    """[3, L] int64: time, height, width."""
    next_position: int
    """Position of the token after the last, in all three channels."""
    modality: Tensor
    """[L] int64 of Modality."""
    tiles: Tensor | None
    """[N, 3, p, p] uint8 in placeholder order; None without pictures."""
    chunks: Tensor | None
    """[C, mel bins, frames] float32 in placeholder order; None without sound."""
    attention: tuple[Segment, ...] | None = None
    """Who sees whom among its tokens, as segments.py makes them; None: causal."""
    routes: Tensor | None = None
    """[L, MoE layers x bytes] uint8: ``OmniBatch.routes`` of its tokens."""
    drawn: tuple[DrawnPicture, ...] = ()
    """Pictures that its answers draw, in their order."""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        own = sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))
        return own + sum(picture.num_bytes for picture in self.drawn)

    def without_labels(self) -> "Sample":
        """The same input with nothing to learn."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_LABEL), drawn=())


class SampleBuilder:
    """Turns records into samples as a recipe says."""

    indexed = True
    """Whether :meth:`size` follows from what an index says of a record (index.py)."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or load_tokenizer(recipe.data.tokenizer)
        self._check_vocabulary(recipe)
        self.data, self.vision, self.audio = recipe.data, recipe.model.vision, recipe.model.audio
        self.sizes = self._size_rule(recipe)
        self.unwritten = self.sizes.block if recipe.model.image is not None else ()
        """Ids that an answer without pictures cannot have: what a picture is drawn from, of a model that draws."""
        self.rule = self.sizes.rule
        self.decoder = open_decoder(recipe.data.decoder)
        draws = recipe.task == "generative" and recipe.model.image is not None
        self.pictures = PictureReader(recipe, self.decoder) if draws else None

    def size(self, record: Record) -> SampleSize:
        """Size of the training sample, from media headers; RecordError or MediaError for what cannot be used."""
        self._check(record)
        return self.sizes.size(measure(record, self.tokenizer), where=record.where)

    def row_size(self, source: Source, row: int) -> SampleSize:
        """The same of a row of ``source``, from its index where it has one."""
        facts = source.facts(row)
        return self.size(source[row]) if facts is None or not self.indexed else self.sizes.size(facts)

    def prompt_size(self, record: Record, *, think: bool | None = None) -> SampleSize:
        """Size of :meth:`build_prompt`'s prompt for a record that ends with a question, from media headers."""
        self._check(record)
        facts = measure(self._asked(record, think), self.tokenizer)
        if think is not None:  # its system turn, or none, is decided
            facts = facts._replace(has_system=True)
        size = self.sizes.conversation_size(facts, where=record.where)
        begun = sum(len(self.tokenizer.encode(text)) for text in answer_beginning(think))
        return size._replace(text=size.text + 1 + begun)

    def build_sample(self, record: Record) -> Sample:
        """The training sample; RecordError or MediaError for what cannot be used."""
        _require_answer(record)
        return self._build(record, open_answer=False)

    def build_prompt(self, record: Record, *, think: bool | None = None) -> Sample:
        """The input of generation: without a final answer, with the header of the one to come; nothing is learned.

        ``think`` asks for a thought or for none (template.asked); None: as the recipe does.
        """
        if record.messages[-1].role == "assistant":
            record = replace(record, messages=record.messages[:-1])
        if not record.messages or record.messages[-1].role != "user":
            raise RecordError(
                record.where, field="messages", value=[m.role for m in record.messages], problem="asks nothing",
                fix="end with a user turn", reason="bad_roles",
            )  # fmt: skip
        return self._build(self._asked(record, think), open_answer=True, think=think).without_labels()

    @property
    def pad_id(self) -> int:
        """Id written into padding; padding is recognised by segments, never by this id."""
        return self.tokenizer.pad_id

    def is_mark(self, token: int) -> bool:
        """Whether an id of a sample is no text: a special token."""
        return self.tokenizer.is_special(token)

    def readable(self, ids: Sequence[int]) -> str:
        """Ids of a sample for people."""
        return self.tokenizer.decode(ids, skip_special=False)

    def _size_rule(self, recipe: Recipe) -> SizeRule:
        return SizeRule(recipe, self.tokenizer)

    def _check_vocabulary(self, recipe: Recipe) -> None:
        if self.tokenizer.vocab_size > recipe.model.vocab_size:
            raise ValueError(
                f"model.vocab_size = {recipe.model.vocab_size} is below the {self.tokenizer.vocab_size} ids of "
                f"data.tokenizer = {recipe.data.tokenizer!r}; raise it to at least that"
            )

    def _asked(self, record: Record, think: bool | None) -> Record:
        return record if think is None else replace(record, messages=tuple(asked(record.messages, self.data, think)))

    def build_text(self, ids: Sequence[int]) -> Sample:
        """A prompt of nothing but these tokens, without turns: what a text is continued from."""
        positions, next_position = position_ids([TextSpan(len(ids))], self.rule)
        input_ids = torch.tensor(ids, dtype=torch.int64)
        return Sample(
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORE_LABEL),
            position_ids=positions,
            next_position=next_position,
            modality=torch.full_like(input_ids, int(Modality.TEXT)),
            tiles=None,
            chunks=None,
        )

    def _build(self, record: Record, *, open_answer: bool, think: bool | None = None) -> Sample:
        self._check(record)
        decoded = {
            kind: [self._decode(kind, record, number) for number in range(len(record.media(kind)))] for kind in KINDS
        }
        media = MediaSpans(
            images=[image.picture for image in decoded["image"] if isinstance(image.picture, ImageSpan)],
            audios=[clip.sound for clip in decoded["audio"] if clip.sound is not None],
            videos=[(clip.picture, clip.sound) for clip in decoded["video"] if isinstance(clip.picture, VideoSpan)],
        )
        rendered = render(
            record.messages,
            media,
            tokenizer=self.tokenizer,
            rule=self.rule,
            system_prompt=self.data.system_turn if think is None else "",
            open_answer=open_answer,
            think=think,
            block=self.sizes.block,
        )
        text, image, video, audio = (rendered.modality.count(modality) for modality in range(4))
        self.sizes.check_length((text, image, video, audio), where=record.where)
        in_order = {kind: iter(items) for kind, items in decoded.items()}
        ordered = [next(in_order[kind]) for message in record.messages for kind in message.media()]
        drawn: tuple[DrawnPicture, ...] = ()
        if self.pictures is not None and rendered.blocks and not open_answer:
            shown = self._shown(decoded["image"], ordered)
            drawn = self.pictures.read(record, _standing(record, rendered.blocks, shown))
        tiles = [item.tiles for item in ordered if item.tiles is not None]
        chunks = [item.chunks for item in ordered if item.chunks is not None]
        _require_finite([*tiles, *chunks], record)
        ids = torch.tensor(rendered.input_ids, dtype=torch.int64)
        positions, next_position = position_ids(rendered.spans, self.rule)
        return Sample(
            input_ids=ids,
            labels=_shifted_labels(ids, rendered),
            position_ids=positions,
            next_position=next_position,
            modality=torch.tensor(rendered.modality, dtype=torch.int64),
            tiles=torch.cat(tiles) if tiles else None,
            chunks=torch.cat(chunks) if chunks else None,
            drawn=drawn,
        )

    def _shown(self, images: Sequence["_Decoded"], ordered: Sequence["_Decoded"]) -> list["_Shown"]:
        """Each image of a record with the vision encoder's rows of it, in the sample; ``ordered``: all media as they stand."""
        starts, seen = {}, 0
        for item in ordered:
            starts[id(item)] = seen
            seen += 0 if item.tiles is None else len(item.tiles) * self.rule.pooled_side**2
        found = []
        for item in images:
            assert item.image is not None and item.tiles is not None
            start = starts[id(item)]
            found.append(_Shown(item.image, (start, start + len(item.tiles) * self.rule.pooled_side**2)))
        return found

    # -------------------------------------------------------------------------------------------- media

    def _decode(self, kind: Kind, record: Record, number: int) -> "_Decoded":
        media = loaded(record.media(kind)[number])
        try:
            if kind == "image":
                return self._tiled(source_picture(record, number, self.decoder.decode_image(media)))
            return self._decode_audio(media) if kind == "audio" else self._decode_video(media)
        except MediaError:
            raise
        except ValueError as error:  # a processor refused the content
            raise MediaError(media, error) from error

    def _tiled(self, picture: Image.Image) -> "_Decoded":
        assert self.vision is not None
        tiles, (rows, cols) = image_tiles(picture, self.vision)
        return _Decoded(picture=ImageSpan(rows, cols), tiles=tiles, image=picture)

    def _decode_audio(self, file: Media) -> "_Decoded":
        assert self.audio is not None
        chunks = log_mel(self.decoder.decode_audio(file, max_seconds=self.sizes.sound_seconds), self.audio)
        return _Decoded(sound=AudioSpan(len(chunks)), chunks=chunks)

    def _decode_video(self, file: Media) -> "_Decoded":
        assert self.vision is not None
        side = self.vision.image_size
        video = self.decoder.decode_video(
            file,
            sampling=self.sizes.sampling,
            max_sound_seconds=self.sizes.sound_seconds or MAX_AUDIO_SECONDS,
            keep=lambda frame: square(frame, side),
        )
        chunks = None
        if video.sound is not None:
            assert self.audio is not None
            chunks = log_mel(video.sound, self.audio)
        return _Decoded(
            picture=VideoSpan(video.times_seconds),
            tiles=frame_tiles(video.frames, self.vision),
            sound=AudioSpan(len(chunks)) if chunks is not None else None,
            chunks=chunks,
        )

    # -------------------------------------------------------------------------------------------- checks

    def _check(self, record: Record) -> None:
        check_speakable(record, self.tokenizer)
        check_drawable(record, self.tokenizer)
        for kind in KINDS:
            if record.media(kind):
                self.sizes.check_encoder(kind, where=record.where)


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """Encoder input of one media file and the spans that its placeholders take."""

    picture: ImageSpan | VideoSpan | None = None
    tiles: Tensor | None = None
    sound: AudioSpan | None = None
    chunks: Tensor | None = None
    image: Image.Image | None = None
    """Of a picture, as it was before it was cut into tiles."""


class _Shown(NamedTuple):
    """An image of a record, and the vision encoder's rows of it."""

    image: Image.Image
    rows: tuple[int, int]


def _standing(record: Record, blocks: Sequence[range], shown: Sequence[_Shown]) -> list[Standing]:
    """The pictures of learned answers in a sample that has these ``blocks``."""
    found = []
    for number in learned_pictures(record):
        source = record.picture_sources[number]
        if source is None:
            found.append(Standing(number, blocks[number], None, None))
        else:
            image, rows = shown[source]
            found.append(Standing(number, blocks[number], partial(_itself, image), rows))
    return found


def _itself(image: Image.Image) -> Image.Image:
    return image


def _require_answer(record: Record) -> None:
    if not record.has_answer:
        raise RecordError(
            record.where, field="messages", value=[m.role for m in record.messages], problem="has no answer to learn",
            fix="add an assistant turn, or mark one to be learned", reason="no_answer",
        )  # fmt: skip


def _require_finite(inputs: list[Tensor], record: Record) -> None:
    """One value that is not finite in an encoder's input would make the whole step's gradients so."""
    for values in inputs:
        if not values.sum().isfinite() and not values.isfinite().all():  # the sum is cheap, and may overflow
            raise RecordError(
                record.where, field="media", value=tuple(values.shape), problem="an encoder input that is not finite",
                fix="repair the medium or drop the record", reason="not_finite",
            )  # fmt: skip


def _shifted_labels(ids: Tensor, rendered: Rendered) -> Tensor:
    labels = torch.full_like(ids, IGNORE_LABEL)
    is_answer = torch.tensor(rendered.is_answer)
    labels[:-1][is_answer[1:]] = ids[1:][is_answer[1:]]
    return labels
