"""What a sample will cost, before anything is decoded.

    record --measure: tokenizer, media headers--> RecordFacts --SizeRule: the recipe--> SampleSize

Facts are what text and headers say: text tokens, pixels, seconds, frames. They depend on the tokenizer and on nothing
else of a recipe, so an index of them (index.py) serves any. Tiles, frames, chunks and placeholders follow from them by
the pure functions of positions.py and processors.py. ``SizeRule`` is where a record that a recipe cannot use is
refused; what decoding then yields may differ slightly from what a header promised.
"""

from functools import lru_cache
from typing import NamedTuple

from megatron_omni.config.run import Recipe
from megatron_omni.data.codes import code_range
from megatron_omni.data.decode.cpu import probe_audio, probe_image, read_video_header
from megatron_omni.data.decode.media import FrameSampling, MediaError, VideoHeader
from megatron_omni.data.processors import choose_grid
from megatron_omni.data.record import KINDS, Kind, MediaFile, Record, RecordError, loaded
from megatron_omni.data.speech_pieces import spoken_ids
from megatron_omni.data.spoken import Speech
from megatron_omni.data.template import count_text_tokens, picture_block, prompt_turn
from megatron_omni.data.tokenizer import IMAGE_GENERATION_SPECIALS, SPEECH_SPECIALS, SPEECH_START, Tokenizer
from megatron_omni.positions import SAMPLE_RATE, PositionRule, audio_chunks, audio_tokens, image_tokens, video_tokens


class MediaFacts(NamedTuple):
    """What the header of a media file says; fields that the kind lacks are 0."""

    kind: Kind
    width: int = 0
    height: int = 0
    frames: int = 0
    """Of the whole video."""
    seconds: float = 0.0
    """Of the picture of a video."""
    samples: int = 0
    """Of sound at 16 kHz; of a video, of its sound track."""


class SpeechFacts(NamedTuple):
    """What a speech generator is told of a record's last spoken answer, and what it learns."""

    prompt: int
    """Tokens that name the voice or describe the style."""
    text: int
    """Tokens of what is said."""
    start: int = 0
    """Codes of the recording before the answer."""
    codes: int = 0
    """Of the answer; 0: there are none, or they cannot be read."""


class RecordFacts(NamedTuple):
    """What text and headers of a record say."""

    text_tokens: int
    """Tokens of its turns, without media, drawn pictures and the recipe's system prompt."""
    has_system: bool
    has_answer: bool
    media: tuple[MediaFacts, ...] = ()
    speech: SpeechFacts | None = None
    """Of its last spoken answer."""
    targets: tuple[tuple[int, int], ...] = ()
    """Width and height of each picture that its turns draw; 0 where the picture is not looked at."""


class SampleSize(NamedTuple):
    """What a sample will cost: tokens by modality, and encoder inputs."""

    text: int
    image: int = 0
    video: int = 0
    audio: int = 0
    tiles: int = 0
    chunks: int = 0
    drawn: int = 0
    """Pictures to draw."""

    @property
    def tokens(self) -> int:
        """Of the whole sample."""
        return self.text + self.image + self.video + self.audio


def measure(record: Record, tokenizer: Tokenizer) -> RecordFacts:
    """Facts of a record; MediaError for a file whose header cannot be read, RecordError for a spoken answer that the
    tokenizer has no special tokens for."""
    check_speakable(record, tokenizer)
    check_drawable(record, tokenizer)
    return RecordFacts(
        text_tokens=count_text_tokens(record.messages, tokenizer),
        has_system=record.messages[0].role == "system",
        has_answer=record.has_answer,
        media=tuple(_measure_media(kind, file) for kind in KINDS for file in record.media(kind)),
        speech=None if (speech := spoken_answer(record)) is None else measure_speech(speech, tokenizer),
        targets=measure_targets(record),
    )


def check_speakable(record: Record, tokenizer: Tokenizer) -> None:
    """RecordError for a spoken answer without special tokens for it."""
    for i, message in enumerate(record.messages):
        if message.speech is not None and not tokenizer.specials.keys() >= set(SPEECH_SPECIALS[:3]):
            raise RecordError(
                record.where, field=f"messages[{i}].speech", value=message.speech.spoken,
                problem=f"data.tokenizer = {str(tokenizer.path)!r} has no {SPEECH_START}",
                fix="make it with the specials of ALL_SPECIALS, or take speech out", reason="no_speech_tokens",
            )  # fmt: skip


def check_drawable(record: Record, tokenizer: Tokenizer) -> None:
    """RecordError for an answer that draws without special tokens for it."""
    draws = any(message.num_drawn for message in record.messages)
    if draws and (missing := set(IMAGE_GENERATION_SPECIALS) - tokenizer.specials.keys()):
        raise RecordError(
            record.where, field="targets", value=[str(file) for file in record.targets],
            problem=f"data.tokenizer = {str(tokenizer.path)!r} has no {min(missing)}",
            fix="make it with the specials of ALL_SPECIALS, or take targets out", reason="no_image_tokens",
        )  # fmt: skip


def spoken_answer(record: Record) -> Speech | None:
    """The last spoken answer of a record."""
    spoken = [message.speech for message in record.messages if message.speech is not None]
    return spoken[-1] if spoken else None


def measure_speech(speech: Speech, tokenizer: Tokenizer) -> SpeechFacts:
    """Facts of a spoken answer. A language model learns it without codes, so codes that cannot be read are none."""
    prompt, text = map(len, told(speech, tokenizer))
    try:
        stop = code_range(speech).stop
    except ValueError:
        return SpeechFacts(prompt, text)
    return SpeechFacts(prompt, text, speech.start, stop - speech.start)


def told(speech: Speech, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of the prompt and of the text of a spoken answer, as a speech generator is given them.

    A text that ends its recording gets an end where it has none, as the last piece of a long text does.
    """
    return tokenizer.encode(speech.prompt), spoken_ids(speech.spoken, tokenizer, last=speech.stop is None)


def measure_targets(record: Record) -> tuple[tuple[int, int], ...]:
    """Size of each picture that its turns draw; MediaError for a target that cannot be read. One whose latents are kept need
    not be there any more, nor are those of a conversation that goes on."""
    count = sum(message.num_drawn for message in record.messages)
    latents = record.drawing.latents if record.drawing is not None else ()
    kept = bool(latents) and all("target" in one for one in latents)
    found = () if kept else tuple(probe_image(loaded(file)) for file in record.targets[:count])
    return found + ((0, 0),) * (count - len(found))


def _measure_media(kind: Kind, file: MediaFile) -> MediaFacts:
    readable = loaded(file)
    if kind == "image":
        width, height = probe_image(readable)
        return MediaFacts(kind, width=width, height=height)
    if kind == "audio":
        return MediaFacts(kind, samples=probe_audio(readable))
    video = read_video_header(readable)
    if not (0 < video.num_frames < 1 << 32 and 0 <= video.seconds < 1e9 and video.sound_samples >= 0):
        raise MediaError(readable, f"its header promises {video.num_frames} frames in {video.seconds} s")
    return MediaFacts(kind, video.width, video.height, video.num_frames, video.seconds, video.sound_samples)


class SizeRule:
    """Sizes as one recipe sees them."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        data = recipe.data
        self.vision, self.audio, self.seq_length = recipe.model.vision, recipe.model.audio, data.seq_length
        self.rule = PositionRule.from_config(recipe.model)
        self.sampling = FrameSampling(
            fps=data.video_fps,
            min_frames=data.min_frames,
            max_frames=data.max_frames,
            max_frames_with_audio=data.max_frames_with_audio,
            choice=data.frame_choice,
            sound=data.use_video_sound and self.audio is not None,
        )
        lowest = min(self.sampling.max_frames, self.sampling.max_frames_with_audio)
        if self.sampling.fps <= 0 or not 1 <= self.sampling.min_frames <= lowest:
            raise ValueError(
                f"data.video_fps = {self.sampling.fps}, min_frames = {self.sampling.min_frames}, max_frames = "
                f"{self.sampling.max_frames}, max_frames_with_audio = {self.sampling.max_frames_with_audio}: need "
                "video_fps > 0 and 1 <= min_frames <= both maxima"
            )
        self.sound_seconds = self.audio.max_chunks * self.audio.chunk_seconds if self.audio else 0.0
        """Longest clip that the model takes."""
        self._system_tokens = count_text_tokens(prompt_turn(data.system_turn), tokenizer)
        self.block = picture_block(tokenizer, recipe.model.image)
        """Ids of a picture that an answer draws; empty where the tokenizer has none."""
        if self.vision is not None:  # most pictures of a source share a few sizes
            tile_size, sides = self.vision.image_size, self.vision.max_tiles_per_side
            self._grid = lru_cache(maxsize=1 << 16)(
                lambda width, height: choose_grid(width, height, tile_size=tile_size, max_tiles_per_side=sides)
            )

    def size(self, facts: RecordFacts, *, where: str = "") -> SampleSize:
        """Size of the training sample; RecordError for one that this recipe cannot use (``where`` stands in it)."""
        if not facts.has_answer:
            raise RecordError(
                where, field="messages", value=facts.text_tokens, problem="has no answer to learn",
                fix="add an assistant turn", reason="no_answer",
            )  # fmt: skip
        return self.conversation_size(facts, where=where)

    def conversation_size(self, facts: RecordFacts, *, where: str = "") -> SampleSize:
        """Size of its turns, with or without an answer; RecordError for what this recipe cannot use."""
        text = facts.text_tokens + (0 if facts.has_system else self._system_tokens)
        text += len(self.block) * len(facts.targets)
        image = video = audio = tiles = chunks = 0
        for number, item in enumerate(facts.media):
            self.check_encoder(item.kind, where=where)
            text += 2
            if item.kind == "image":
                cols, rows = self._grid(item.width, item.height)
                tiles += rows * cols
                image += image_tokens(rows, cols, pooled_side=self.rule.pooled_side)
                continue
            samples = item.samples
            if item.kind == "video":
                header = VideoHeader(
                    width=item.width, height=item.height, num_frames=item.frames, seconds=item.seconds,
                    sound_samples=samples,
                )  # fmt: skip
                frames, samples = vars(header.sampled(self.sampling)).values()
                tiles += frames
                video += video_tokens(frames, pooled_side=self.rule.pooled_side)
                text += 2 if samples else 0
            elif samples > self.sound_seconds * SAMPLE_RATE:
                seconds = samples / SAMPLE_RATE
                raise RecordError(
                    where, field=f"media[{number}]", value="audio",
                    problem=f"{seconds:.1f} s of sound, above the limit of {self.sound_seconds:g} s",
                    fix="cut the clip or raise model.audio.max_chunks", reason="media_too_large",
                )  # fmt: skip
            if samples:
                assert self.audio is not None
                here = audio_chunks(samples, chunk_seconds=self.audio.chunk_seconds)
                chunks += here
                audio += audio_tokens(here, num_query_tokens=self.rule.num_query_tokens)
        size = SampleSize(text, image, video, audio, tiles, chunks, len(facts.targets))
        self.check_length((text, image, video, audio), where=where)
        return size

    def check_encoder(self, kind: Kind, *, where: str) -> None:
        """RecordError for a medium that the model has no encoder for."""
        name, present = ("audio", self.audio) if kind == "audio" else ("vision", self.vision)
        if present is None:
            raise RecordError(
                where, field=f"{kind}s", value=kind,
                problem=f"the model has no {name} encoder (model.{name} is null)",
                fix=f"give the recipe a model.{name} or drop the record", reason="no_encoder",
            )  # fmt: skip

    def check_length(self, counts: tuple[int, int, int, int], *, where: str) -> None:
        """RecordError for more tokens (text, image, video, audio) than a row holds."""
        length = sum(counts)
        if length > self.seq_length:
            raise RecordError(
                where, field="length", value=length,
                problem=f"{length} tokens (text {counts[0]}, image {counts[1]}, video {counts[2]}, audio {counts[3]}) "
                f"exceed data.seq_length = {self.seq_length}",
                fix="shorten the record or raise data.seq_length", reason="too_long",
            )  # fmt: skip
