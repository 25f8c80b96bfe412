"""Record -> ``Sample``: the tensors of one conversation, the same code for training, evaluation and generation.

``SampleBuilder`` holds what the recipe says (tokenizer, template, sizes). ``size`` reads media headers only, the
``build_*`` methods decode. Labels are the ids shifted by one, on answers alone; tiles and chunks stand in the order of
their placeholders.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.config.run import Recipe
from megatron_omni.data.decode.cpu import (
    FrameSampling,
    MediaError,
    decode_audio,
    decode_image,
    decode_video,
    probe_audio,
    probe_image,
    probe_video,
)
from megatron_omni.data.processors import choose_grid, frame_tiles, image_tiles, log_mel
from megatron_omni.data.record import KINDS, MARKER, Kind, Record, RecordError
from megatron_omni.data.template import MediaSpans, Rendered, render
from megatron_omni.data.tokenizer import Tokenizer, load_tokenizer
from megatron_omni.positions import AudioSpan, ImageSpan, PositionRule, VideoSpan, audio_chunks, position_ids


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
    """[N, 3, p, p] float32 in placeholder order; None without pictures."""
    chunks: Tensor | None
    """[C, mel bins, frames] float32 in placeholder order; None without sound."""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    def without_labels(self) -> "Sample":
        """The same input with nothing to learn."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE_LABEL))


class SampleSize(NamedTuple):
    """What a sample will cost, known before anything is decoded."""

    tokens: int
    tiles: int
    chunks: int


class SampleBuilder:
    """Turns records into samples as a recipe says."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer or load_tokenizer(recipe.data.tokenizer)
        if self.tokenizer.vocab_size > recipe.model.vocab_size:
            raise ValueError(
                f"model.vocab_size = {recipe.model.vocab_size} is below the {self.tokenizer.vocab_size} ids of "
                f"data.tokenizer = {recipe.data.tokenizer!r}; raise it to at least that"
            )
        self.data, self.vision, self.audio = recipe.data, recipe.model.vision, recipe.model.audio
        self.rule = PositionRule.from_config(recipe.model)
        self.sampling = FrameSampling(
            fps=self.data.video_fps,
            min_frames=self.data.min_frames,
            max_frames=self.data.max_frames,
            max_frames_with_audio=self.data.max_frames_with_audio,
            sound=self.data.use_video_sound and self.audio is not None,
        )
        lowest = min(self.sampling.max_frames, self.sampling.max_frames_with_audio)
        if self.sampling.fps <= 0 or not 1 <= self.sampling.min_frames <= lowest:
            raise ValueError(
                f"data.video_fps = {self.sampling.fps}, min_frames = {self.sampling.min_frames}, max_frames = "
                f"{self.sampling.max_frames}, max_frames_with_audio = {self.sampling.max_frames_with_audio}: need "
                "video_fps > 0 and 1 <= min_frames <= both maxima"
            )
        self._sound_seconds = self.audio.max_chunks * self.audio.chunk_seconds if self.audio else 0.0

    def size(self, record: Record) -> SampleSize:
        """Size of the training sample, from media headers; RecordError or MediaError for what cannot be used."""
        self._check(record)
        _require_answer(record)
        media = MediaSpans(
            images=[self._probe_image(file) for file in record.images],
            audios=[self._audio_span(probe_audio(file, max_seconds=self._sound_seconds)) for file in record.audios],
            videos=[self._probe_video(file) for file in record.videos],
        )
        rendered = self._render(record, media)
        self._check_length(record, rendered)
        frames = sum(len(video.times_seconds) for video, _ in media.videos)
        sounds = (*media.audios, *(sound for _, sound in media.videos if sound is not None))
        return SampleSize(
            tokens=len(rendered.input_ids),
            tiles=sum(image.rows * image.cols for image in media.images) + frames,
            chunks=sum(sound.num_chunks for sound in sounds),
        )

    def build_sample(self, record: Record) -> Sample:
        """The training sample; RecordError or MediaError for what cannot be used."""
        _require_answer(record)
        return self._build(record, open_answer=False)

    def build_prompt(self, record: Record) -> Sample:
        """The input of generation: without a final answer, with the header of the one to come; nothing is learned."""
        if record.messages[-1].role == "assistant":
            record = replace(record, messages=record.messages[:-1])
        if not record.messages or record.messages[-1].role != "user":
            raise RecordError(
                record.where, field="messages", value=[m.role for m in record.messages], problem="asks nothing",
                fix="end with a user turn", reason="bad_roles",
            )  # fmt: skip
        return self._build(record, open_answer=True).without_labels()

    def _build(self, record: Record, *, open_answer: bool) -> Sample:
        self._check(record)
        decoded = {kind: [self._decode(kind, file) for file in record.media(kind)] for kind in KINDS}
        media = MediaSpans(
            images=[image.picture for image in decoded["image"] if isinstance(image.picture, ImageSpan)],
            audios=[clip.sound for clip in decoded["audio"] if clip.sound is not None],
            videos=[(clip.picture, clip.sound) for clip in decoded["video"] if isinstance(clip.picture, VideoSpan)],
        )
        rendered = self._render(record, media, open_answer=open_answer)
        self._check_length(record, rendered)
        in_order = {kind: iter(items) for kind, items in decoded.items()}
        ordered = [
            next(in_order[kind])  # type: ignore[index]
            for message in record.messages
            if message.role != "assistant"
            for kind in MARKER.findall(message.content)
        ]
        tiles = [item.tiles for item in ordered if item.tiles is not None]
        chunks = [item.chunks for item in ordered if item.chunks is not None]
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
        )

    def _render(self, record: Record, media: MediaSpans, *, open_answer: bool = False) -> Rendered:
        return render(
            record.messages,
            media,
            tokenizer=self.tokenizer,
            rule=self.rule,
            system_prompt=self.data.system_prompt,
            open_answer=open_answer,
        )

    # -------------------------------------------------------------------------------------------- media

    def _decode(self, kind: Kind, file: str) -> "_Decoded":
        try:
            return {"image": self._decode_image, "audio": self._decode_audio, "video": self._decode_video}[kind](file)
        except MediaError:
            raise
        except ValueError as error:  # a processor refused the content
            raise MediaError(file, error) from error

    def _decode_image(self, file: str) -> "_Decoded":
        assert self.vision is not None
        tiles, (rows, cols) = image_tiles(decode_image(file), self.vision)
        return _Decoded(picture=ImageSpan(rows, cols), tiles=tiles)

    def _decode_audio(self, file: str) -> "_Decoded":
        assert self.audio is not None
        chunks = log_mel(decode_audio(file, max_seconds=self._sound_seconds), self.audio)
        return _Decoded(sound=AudioSpan(len(chunks)), chunks=chunks)

    def _decode_video(self, file: str) -> "_Decoded":
        assert self.vision is not None
        video = decode_video(file, sampling=self.sampling)
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

    def _probe_image(self, file: str) -> ImageSpan:
        assert self.vision is not None
        width, height = probe_image(file)
        cols, rows = choose_grid(
            width, height, tile_size=self.vision.image_size, max_tiles_per_side=self.vision.max_tiles_per_side
        )
        return ImageSpan(rows, cols)

    def _probe_video(self, file: str) -> tuple[VideoSpan, AudioSpan | None]:
        size = probe_video(file, sampling=self.sampling)
        frames = VideoSpan(tuple(map(float, range(size.num_frames))))  # only the count matters for a length
        return frames, self._audio_span(size.sound_samples) if size.sound_samples else None

    def _audio_span(self, num_samples: int) -> AudioSpan:
        assert self.audio is not None
        return AudioSpan(audio_chunks(num_samples, chunk_seconds=self.audio.chunk_seconds))

    # -------------------------------------------------------------------------------------------- checks

    def _check(self, record: Record) -> None:
        for kind in KINDS:
            name, present = ("audio", self.audio) if kind == "audio" else ("vision", self.vision)
            if record.media(kind) and present is None:
                raise RecordError(
                    record.where, field=f"{kind}s", value=list(record.media(kind)),
                    problem=f"the model has no {name} encoder (model.{name} is null)",
                    fix=f"give the recipe a model.{name} or drop the record", reason="no_encoder",
                )  # fmt: skip

    def _check_length(self, record: Record, rendered: Rendered) -> None:
        length = len(rendered.input_ids)
        if length > self.data.seq_length:
            counts = [rendered.modality.count(m) for m in range(4)]
            raise RecordError(
                record.where, field="length", value=length,
                problem=f"{length} tokens (text {counts[0]}, image {counts[1]}, video {counts[2]}, audio {counts[3]}) "
                f"exceed data.seq_length = {self.data.seq_length}",
                fix="shorten the record or raise data.seq_length", reason="too_long",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """Encoder input of one media file and the spans that its placeholders take."""

    picture: ImageSpan | VideoSpan | None = None
    tiles: Tensor | None = None
    sound: AudioSpan | None = None
    chunks: Tensor | None = None


def _require_answer(record: Record) -> None:
    if not any(message.role == "assistant" for message in record.messages):
        raise RecordError(
            record.where, field="messages", value=[m.role for m in record.messages], problem="has no answer to learn",
            fix="add an assistant turn", reason="no_answer",
        )  # fmt: skip


def _shifted_labels(ids: Tensor, rendered: Rendered) -> Tensor:
    labels = torch.full_like(ids, IGNORE_LABEL)
    is_answer = torch.tensor(rendered.is_answer)
    labels[:-1][is_answer[1:]] = ids[1:][is_answer[1:]]
    return labels
