"""Record -> sample of the speech generator: the last spoken answer, as speech_sequence.py lays it out.

    {"role": "assistant", "content": .., "speech": {"speaker": .., "codes": "NAME.codes.safetensors#17", "start": 80}}

The prompt names the voice or describes the style, the text is what is spoken, the codes are those of the answer. Where the
recording has codes before them, the last ``least_prefix_codes`` .. ``prefix_codes`` of these are the prefix: how many is a
function of the seed and of the sample's sizes, so planning, loading and any other machine agree. Generation is given
``prefix_codes``.

A record is left out, with its reason, without codes (``no_codes``), with more than ``max_codes`` (``too_long``), and where
codes and text do not fit (``misaligned``): fewer than two thirds of ``least_codes_per_token`` for each token of the text,
or more than three quarters of ``most_codes_per_token`` and 40 (by default 2 and 24). Codes of another codec than the
recipe's are an error.
"""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_omni.config.run import Recipe
from megatron_omni.data.codes import CodecOf, code_range, codes_between
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import (
    RecordFacts,
    SampleSize,
    SizeRule,
    SpeechFacts,
    check_speakable,
    measure_speech,
    spoken_answer,
    told,
)
from megatron_omni.data.speech_sequence import sequence_length, speech_sample
from megatron_omni.data.spoken import Speech
from megatron_omni.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_omni.config.generators import SpeechConfig, SpeechIds

_SHOWN_CODES = 12
SLACK_CODES = 40
"""Codes of silence around a text, beside those for its tokens."""


class SpeechSizeRule(SizeRule):
    """Sizes of the samples of a speech generator."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        super().__init__(recipe, tokenizer)
        self.speech, self.seed = speech_config(recipe), recipe.seed

    def conversation_size(self, facts: RecordFacts, *, where: str = "") -> SampleSize:
        """Size of the training sample; RecordError for a record that this recipe cannot use."""
        speech = self.check(facts.speech, where)
        length = sequence_length(
            prompt=speech.prompt, prefix=self.prefix_codes(speech), text=speech.text, codes=speech.codes
        )
        self.check_length((length, 0, 0, 0), where=where)
        return SampleSize(length)

    def prompt_size(self, speech: SpeechFacts, *, where: str) -> SampleSize:
        """Size of a prompt of generation."""
        prefix = min(speech.start, self.speech.prefix_codes) if speech.codes else 0
        length = sequence_length(prompt=speech.prompt, prefix=prefix, text=speech.text, codes=0)
        self.check_length((length, 0, 0, 0), where=where)
        return SampleSize(length)

    def prefix_codes(self, speech: SpeechFacts) -> int:
        """Codes of the prefix of a training sample."""
        most = self.speech.prefix_codes
        least = min(self.speech.least_prefix_codes, most)
        drawn = least + zlib.crc32(f"{self.seed} {tuple(speech)}".encode()) % (most - least + 1)
        return min(speech.start, drawn)

    def check(self, speech: SpeechFacts | None, where: str) -> SpeechFacts:
        """RecordError for an answer that cannot be learned."""
        if speech is None or not speech.codes:
            raise _nothing(where, speech)
        if speech.codes > self.speech.max_codes:
            raise RecordError(
                where, field="speech.codes", value=speech.codes,
                problem=f"{speech.codes} codes, above model.speech.max_codes = {self.speech.max_codes}",
                fix="cut the recording (give segments to megatron-omni prepare --codes) or raise it", reason="too_long",
            )  # fmt: skip
        least = self.speech.least_codes_per_token * 2 / 3 * speech.text
        most = self.speech.most_codes_per_token * 3 / 4 * speech.text + SLACK_CODES
        if not least <= speech.codes <= most:
            raise RecordError(
                where, field="speech.codes", value=speech.codes,
                problem=f"{speech.codes} codes for {speech.text} tokens of text, which may have {least:.0f} to {most:.0f}: "
                "text and sound do not fit",
                fix="repair the pair, or change model.speech.least_codes_per_token and most_codes_per_token",
                reason="misaligned",
            )  # fmt: skip
        return speech


class SpeechSampleBuilder(SampleBuilder):
    """Turns records with spoken answers into samples of the speech generator."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(recipe, tokenizer)
        self.speech = speech_config(recipe)
        self.codec = CodecOf(self.speech)

    def size(self, record: Record) -> SampleSize:
        """Size of the training sample; RecordError for what cannot be used."""
        return self._rule.size(self._facts(record), where=record.where)

    def prompt_size(self, record: Record, *, think: bool | None = None) -> SampleSize:
        """Size of :meth:`build_prompt`'s prompt."""
        facts = self._facts(record).speech
        if facts is None:
            raise _nothing(record.where, None)
        return self._rule.prompt_size(facts, where=record.where)

    def build_sample(self, record: Record) -> Sample:
        """The training sample; RecordError for what cannot be used, RecipeError for codes of another codec."""
        self.size(record)
        speech = spoken_answer(record)
        assert speech is not None
        codes = code_range(speech)
        prefix = self._rule.prefix_codes(measure_speech(speech, self.tokenizer))
        return self._sequence(record, speech, prefix, codes_between(speech, codes.start, codes.stop))

    def build_prompt(self, record: Record, *, think: bool | None = None) -> Sample:
        """The input of generation for the last spoken answer: it ends where the codes begin. Codes of the recording before
        the answer are its prefix; ``think`` means nothing here.
        """
        size = self.prompt_size(record)
        speech = spoken_answer(record)
        assert speech is not None
        has_codes = bool(measure_speech(speech, self.tokenizer).codes)
        sample = self._sequence(record, speech, min(speech.start, self.speech.prefix_codes) if has_codes else 0, None)
        assert sample.length == size.tokens
        return sample

    def build_text(self, ids: Sequence[int]) -> Sample:
        """A speech generator continues no text: ValueError."""
        raise ValueError("a speech generator continues no text; give it a record with a spoken answer")

    @property
    def pad_id(self) -> int:
        """Id written into padding."""
        return self.speech.ids.padding

    def is_mark(self, token: int) -> bool:
        """Whether an id of a sample is one of the nine marks."""
        return token in _names(self.speech.ids)

    def readable(self, ids: Sequence[int]) -> str:
        """Ids of a sample for people: marks by name, codes as numbers, text as text."""
        known, names = self.speech.ids, _names(self.speech.ids)
        codes = [token for token in ids if token < known.num_codes]
        if codes:
            shown = " ".join(map(str, codes[:_SHOWN_CODES]))
            return f"{len(codes)} codes: {shown}{' ..' if len(codes) > _SHOWN_CODES else ''}"
        if marks := [names[token] for token in ids if token in names]:
            return "".join(marks)
        return self.tokenizer.decode([token - known.num_outputs for token in ids], skip_special=False)

    @property
    def _rule(self) -> SpeechSizeRule:
        assert isinstance(self.sizes, SpeechSizeRule)
        return self.sizes

    def _facts(self, record: Record) -> RecordFacts:
        check_speakable(record, self.tokenizer)
        speech = spoken_answer(record)
        facts = measure_speech(speech, self.tokenizer) if speech is not None else None
        return RecordFacts(0, has_system=False, has_answer=record.has_answer, speech=facts)

    def _sequence(self, record: Record, speech: Speech, num_prefix: int, codes: Sequence[int] | None) -> Sample:
        prompt, text = told(speech, self.tokenizer)
        if num_prefix or codes is not None:
            self.codec.check(speech)
        prefix = codes_between(speech, speech.start - num_prefix, speech.start) if num_prefix else ()
        try:
            return speech_sample(self.speech.ids, prompt=prompt, prefix=prefix, text=text, codes=codes)
        except ValueError as error:
            raise RecordError(
                record.where, field="speech.codes", value=speech.codes, problem=str(error), fix="see there",
                reason="bad_code",
            ) from error  # fmt: skip

    def _size_rule(self, recipe: Recipe) -> SizeRule:
        return SpeechSizeRule(recipe, self.tokenizer)

    def _check_vocabulary(self, recipe: Recipe) -> None:
        config = speech_config(recipe)
        if self.tokenizer.vocab_size > config.text_vocab_size:
            raise ValueError(
                f"model.speech.text_vocab_size = {config.text_vocab_size} is below the {self.tokenizer.vocab_size} ids "
                f"of data.tokenizer = {recipe.data.tokenizer!r}; raise it to at least that"
            )


def _names(ids: "SpeechIds") -> dict[int, str]:
    """Of the marks."""
    pairs = zip((*ids.prompt, *ids.prefix), ("<prompt>", "</prompt>", "<prefix>", "</prefix>"))
    text = {ids.text_start: "<text>", ids.text_end: "</text>"}
    codes = {ids.codes_start: "<codes>", ids.codes_end: "</codes>", ids.padding: "<padding>"}
    return dict(pairs) | text | codes


def speech_config(recipe: Recipe) -> "SpeechConfig":
    """``model.speech`` of a recipe that has it."""
    assert recipe.model.speech is not None
    return recipe.model.speech


def _nothing(where: str, speech: SpeechFacts | None) -> RecordError:
    said = "no spoken answer" if speech is None else "a spoken answer without codes that can be read"
    return RecordError(
        where, field="speech", value=None, problem=f"{said}: a speech generator learns nothing from it",
        fix='give an assistant turn "speech" and make its codes with megatron-omni prepare --codes',
        reason="no_speech" if speech is None else "no_codes",
    )  # fmt: skip
