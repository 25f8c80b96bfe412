"""Qwen's ChatML: a record's turns and the sizes of its media -> token ids, answer mask and spans for positions.

    <|im_start|>system\n{prompt}<|im_end|>\n            only when the recipe or the record has a system prompt
    <|im_start|>user\n{content}<|im_end|>\n
    <|im_start|>assistant\n{content}<|im_end|>\n        learned: the content and <|im_end|>, unless the turn is marked

The content of a spoken answer (spoken.py) is its thought, if it has one, and

    <|speech_start|>{prompt}<|speech_prompt|>{spoken}<|speech_end|>

Of an answer that draws (drawing.py) each <generate> is the block of tokens that the recipe's picture generator has

    [TASK0][TASK1][TASK2][IMG0]..[IMG31]                learned like the text around it

Markers in a record's system and user turns become placeholders (in the recipe's system prompt they are text):

    <image>  <|vision_start|> <|image_pad|> * (rows cols s^2) <|vision_end|>
    <video>  <|vision_start|> <|video_pad|> * (frames s^2) <|vision_end|>, and with sound, behind it
    <audio>  <|audio_start|> <|audio_pad|> * (chunks queries) <|audio_end|>

The text between special tokens is encoded piece by piece (role line, content, content between markers, the empty thought
of an answer that begins with one, prompt and words of a spoken one), so an answer has the same ids whether it was given or
is about to be generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_omni.batch import Modality
from megatron_omni.config.data import DataConfig
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.thinking import EMPTY_THOUGHT, THINKING, joined
from megatron_omni.data.record import Message
from megatron_omni.data.spoken import split_thought
from megatron_omni.data.tokenizer import (
    AUDIO_END,
    AUDIO_PAD,
    AUDIO_START,
    IM_END,
    IM_START,
    IMAGE_GENERATION_SPECIALS,
    IMAGE_PAD,
    SPEECH_END,
    SPEECH_PROMPT,
    SPEECH_START,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Tokenizer,
)
from megatron_omni.positions import AudioSpan, ImageSpan, PositionRule, Span, TextSpan, VideoSpan, span_length

ANSWER_HEADER = "assistant\n"
"""What stands between ``<|im_start|>`` and an answer."""


@dataclass(frozen=True, kw_only=True)
class MediaSpans:
    """Sizes of a record's media, each kind in marker order; a video comes with its sound or None."""

    images: Sequence[ImageSpan] = ()
    audios: Sequence[AudioSpan] = ()
    videos: Sequence[tuple[VideoSpan, AudioSpan | None]] = ()


@dataclass
class Rendered:
    """Tokens of one sample: L ids, and for each whether it is part of an answer and its modality."""

    input_ids: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)
    modality: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    """The same L tokens as spans for positions.position_ids."""
    blocks: list[range] = field(default_factory=list)
    """Tokens of each picture that answers draw."""


def render(
    messages: Sequence[Message],
    media: MediaSpans,
    *,
    tokenizer: Tokenizer,
    rule: PositionRule,
    system_prompt: str = "",
    open_answer: bool = False,
    think: bool | None = None,
    block: Sequence[int] = (),
) -> Rendered:
    """Tokens of a conversation. A system turn of the record takes the place of ``system_prompt``. ``block``: ids of a picture
    that an answer draws.

    ``open_answer`` ends with the header of an assistant turn, for generation, and without thinking (``think`` is False)
    with the empty thought behind it.
    """
    writer = _Writer(tokenizer, rule, block)
    images, audios, videos = iter(media.images), iter(media.audios), iter(media.videos)
    if messages[0].role != "system":
        messages = [*prompt_turn(system_prompt), *messages]
    for message in messages:
        writer.special(IM_START)
        writer.text(f"{message.role}\n")
        if message.role == "assistant":
            writer.answer(message)
            writer.special(IM_END, answer=message.learned)
        else:
            pieces = message.pieces()
            writer.text(pieces[0])
            for kind, text in zip(pieces[1::2], pieces[2::2]):
                if kind == "image":
                    writer.picture(next(images), IMAGE_PAD, Modality.IMAGE)
                elif kind == "audio":
                    writer.sound(next(audios))
                else:
                    frames, sound = next(videos)
                    writer.picture(frames, VIDEO_PAD, Modality.VIDEO)
                    if sound is not None:
                        writer.sound(sound)
                writer.text(text)
            writer.special(IM_END)
        writer.text("\n")
    if open_answer:
        writer.special(IM_START)
        for text in answer_beginning(think):
            writer.text(text)
    assert next(images, None) is next(audios, None) is next(videos, None) is None, "more media than markers"
    return writer.close()


def prompt_turn(system_prompt: str) -> list[Message]:
    """The system turn of a recipe, none where it is empty. It brings no media, so markers in it are text."""
    return [Message("system", system_prompt, parts=(system_prompt,))] if system_prompt else []


def asked(messages: Sequence[Message], data: DataConfig, think: bool | None) -> list[Message]:
    """The turns of a prompt with their system turn: the recipe's where the record has none, and switched by ``think``.

    None leaves it as training had it. True puts the prompt for a thought in front of what stands there; where the recipe
    has another template, in its place. False leaves the recipe's template out; a record's own turn stays as it is.
    """
    own, rest = (messages[0], messages[1:]) if messages[0].role == "system" else (None, messages)
    if think is None or own is not None:
        turns = [*(prompt_turn(data.system_turn) if own is None else [own]), *rest]
    else:
        turns = [*prompt_turn(data.system_prompt), *rest]
    return headed(turns, THINKING) if think else turns


def headed(messages: Sequence[Message], text: str) -> list[Message]:
    """``messages`` with a system turn that begins with ``text``. What looks like a marker in it is text."""
    if messages and messages[0].role == "system":
        own, *rest = messages
        if own.content.startswith(text):
            return [own, *rest]
        first, *pieces = own.pieces()
        return [Message("system", joined(text, own.content), parts=(joined(text, first), *pieces)), *rest]
    return [*prompt_turn(text), *messages]


def answer_beginning(think: bool | None) -> tuple[str, ...]:
    """Texts behind ``<|im_start|>`` of an answer that is about to be generated."""
    return (ANSWER_HEADER, EMPTY_THOUGHT) if think is False else (ANSWER_HEADER,)


def answer_ids(message: Message, tokenizer: Tokenizer, block: Sequence[int] = ()) -> list[int]:
    """Ids of an answer, without the end token: its texts encoded one by one, the special tokens of a spoken one placed, a
    ``block`` for every picture that it draws.
    """
    if message.num_drawn:
        first, *rest = _drawn_texts(message, tokenizer)
        return [*first, *(token for ids in rest for token in (*block, *ids))]
    if message.speech is None:
        return _encoded(_texts_of(message.content), tokenizer)
    thought, _ = split_thought(message.content)
    start, middle, end = map(tokenizer.special, (SPEECH_START, SPEECH_PROMPT, SPEECH_END))
    prompt, spoken = map(tokenizer.encode, (message.speech.prompt, message.speech.spoken))
    return [*_encoded(_texts_of(thought), tokenizer), start, *prompt, middle, *spoken, end]


def _drawn_texts(message: Message, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of what stands before, between and behind the pictures that an answer draws."""
    first, *rest = message.pieces()[::2]
    return [_encoded(_texts_of(first), tokenizer), *map(tokenizer.encode, rest)]


def picture_block(tokenizer: Tokenizer, config: ImageGeneratorConfig | None) -> tuple[int, ...]:
    """Ids of a picture for a model with this generator, or of the default one for a model that has none; empty where there is
    none and the tokenizer has no such tokens, ValueError where there is one."""
    config = config or (ImageGeneratorConfig() if tokenizer.specials.keys() >= set(IMAGE_GENERATION_SPECIALS) else None)
    return () if config is None else config.block_ids(tokenizer.specials)


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    return [token for text in texts for token in tokenizer.encode(text)]


def _texts_of(content: str) -> tuple[str, ...]:
    """An answer's texts as they are encoded: the empty thought apart, since generation without thinking gives it."""
    if content.startswith(EMPTY_THOUGHT):
        return EMPTY_THOUGHT, content.removeprefix(EMPTY_THOUGHT)
    return (content,)


def count_text_tokens(messages: Sequence[Message], tokenizer: Tokenizer) -> int:
    """Tokens that ``render`` writes for the turns themselves: what media and blocks of drawn pictures add comes on top."""
    count = 0
    for message in messages:
        texts = () if message.role == "assistant" else message.pieces()[::2]
        count += 2 + len(_encoded((f"{message.role}\n", *texts, "\n"), tokenizer))
        if message.role == "assistant":
            count += len(answer_ids(message, tokenizer))
    return count


class _Writer:
    """Appends tokens and keeps ids, masks and spans in step."""

    def __init__(self, tokenizer: Tokenizer, rule: PositionRule, block: Sequence[int]) -> None:
        self._tokenizer, self._rule, self._block = tokenizer, rule, list(block)
        self._out = Rendered()
        self._text_tokens = 0

    def text(self, text: str) -> None:
        self._plain(self._tokenizer.encode(text), False)

    def answer(self, message: Message) -> None:
        if not message.num_drawn:
            self._plain(answer_ids(message, self._tokenizer), message.learned)
            return
        for i, ids in enumerate(_drawn_texts(message, self._tokenizer)):
            if i:
                start = len(self._out.input_ids)
                self._out.blocks.append(range(start, start + len(self._block)))
                self._plain(self._block, message.learned)
            self._plain(ids, message.learned)

    def special(self, name: str, *, answer: bool = False) -> None:
        self._plain([self._tokenizer.special(name)], answer)

    def picture(self, span: ImageSpan | VideoSpan, pad: str, modality: Modality) -> None:
        self.special(VISION_START)
        self._placeholders(span, pad, modality)
        self.special(VISION_END)

    def sound(self, span: AudioSpan) -> None:
        self.special(AUDIO_START)
        self._placeholders(span, AUDIO_PAD, Modality.AUDIO)
        self.special(AUDIO_END)

    def close(self) -> Rendered:
        if self._text_tokens:
            self._out.spans.append(TextSpan(self._text_tokens))
            self._text_tokens = 0
        return self._out

    def _plain(self, ids: list[int], answer: bool) -> None:
        self._append(ids, answer, Modality.TEXT)
        self._text_tokens += len(ids)

    def _placeholders(self, span: Span, pad: str, modality: Modality) -> None:
        self.close()
        self._out.spans.append(span)
        self._append([self._tokenizer.special(pad)] * span_length(span, self._rule), False, modality)

    def _append(self, ids: list[int], answer: bool, modality: Modality) -> None:
        self._out.input_ids.extend(ids)
        self._out.is_answer.extend([answer] * len(ids))
        self._out.modality.extend([int(modality)] * len(ids))
