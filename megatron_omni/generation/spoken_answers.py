"""Answers that are heard: a language model writes the turn, a speech generator speaks it, on the same ranks.

    .. <|speech_start|> prompt <|speech_prompt|> text <|speech_end|> ..      what the model writes (speech_turn.py)

The first spoken turn of an answer is spoken, with the prompt that the model wrote. Where a voice or a style is wanted, the
question asks for it as training did (data/speech_request.py), and the answer begins with ``<|speech_start|>``, the prompt
of that voice and ``<|speech_prompt|>``: the model goes on from there. Prompt and text go to the speech generator as text:
the two may have different tokenizers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.data.record import Record
from megatron_omni.data.sample import Sample
from megatron_omni.data.speech_request import asked_to_speak
from megatron_omni.data.tokenizer import SPEECH_PROMPT, SPEECH_START, Tokenizer
from megatron_omni.generation.batches import Result
from megatron_omni.generation.load import Checkpoint, open_checkpoint
from megatron_omni.generation.speaking import SoundFiles, said_of, speak_all
from megatron_omni.generation.speech_turn import SpeechReader
from megatron_omni.generation.utterance import SpeechWanted, Utterance
from megatron_omni.generation.voices import codec_for, prompt_for

NO_SPEECH = "the answer has no spoken turn"


class AnswerSpeaker:
    """A speech generator and its codec beside a language model."""

    def __init__(self, wanted: SpeechWanted, checkpoint: Checkpoint) -> None:
        """All ranks together. ValueError for a voice, a codec, a tokenizer or a layout that do not fit."""
        self.wanted, self.tokenizer = wanted, checkpoint.builder.tokenizer
        self._wording = checkpoint.recipe.data.voice_request
        SpeechReader(self.tokenizer)  # refuses a tokenizer that has no such turn
        self._opened = open_checkpoint(wanted.speaker, overrides=layout_of(checkpoint), pg=checkpoint.pg)
        config = self._opened.recipe.model.speech
        if config is None:
            raise ValueError(f"{wanted.speaker}: no speech generator (model.speech); name one with --speaker")
        self.config = config
        if self._has_voice:
            self._prompt("")
        self.codec = codec_for(config, wanted.codec)
        self._model: Any = None

    @property
    def _has_voice(self) -> bool:
        return self.wanted.voice is not None or self.wanted.style is not None

    def asked(self, record: Record) -> Record:
        """``record`` whose question asks for the voice or the style."""
        if not self._has_voice:
            return record
        return asked_to_speak(record, voice=self.wanted.voice, style=self.wanted.style, wording=self._wording)

    def beginning(self, record: Record) -> list[int]:
        """Ids that the answer to ``record`` begins with."""
        if not self._has_voice:
            return []
        question = next((m.content for m in reversed(record.messages) if m.role == "user"), "")
        start, middle = map(self.tokenizer.special, (SPEECH_START, SPEECH_PROMPT))
        return [start, *self.tokenizer.encode(self._prompt(question)), middle]

    def _prompt(self, asked: str) -> str:
        wanted = self.wanted
        return prompt_for(self.config, asked, voice=wanted.voice, style=wanted.style, language=wanted.language)

    def speak(
        self,
        answers: Mapping[int, Sequence[Result]],
        beginnings: Mapping[int, Sequence[int]],
        *,
        file: Callable[[int], str],
        batch_size: int,
        deterministic: bool = False,
    ) -> dict[int, dict[str, Any]]:
        """Speak the first sample of each of ``answers``, the same on every rank, into ``file`` of its number; what a line
        says of each: {"answer", "speech"}. All ranks together."""
        read = {n: spoken_turn(self.tokenizer, [*beginnings.get(n, ()), *found[0].ids]) for n, found in answers.items()}
        utterances = [self._utterance(n, turn) for n, turn in read.items() if turn.error is None]
        said: dict[int, dict[str, Any]] = {}
        if utterances:
            self._model = self._model or self._opened.load_model()
            rate = self.codec.sample_rate
            with SoundFiles(lambda name: file(int(name)), rate) as files:
                ended = speak_all(
                    self._model,
                    utterances,
                    codec=self.codec,
                    tokenizer=self._opened.builder.tokenizer,
                    batch_size=batch_size,
                    deterministic=deterministic,
                    release=self.wanted.release,
                    take=files.take,
                )
            for u in utterances:
                said[int(u.name)] = said_of(ended[u.name], u, file=file(int(u.name)), sample_rate=rate)
        return {
            n: {"answer": turn.answer, "speech": said.get(n, {"error": turn.error}) | turn.facts}
            for n, turn in read.items()
        }

    def _utterance(self, number: int, turn: "_Turn") -> Utterance:
        wanted = self.wanted
        return Utterance(
            name=str(number), prompt=turn.prompt, text=turn.text, sampling=wanted.sampling, context=wanted.context
        )


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What an answer says and what of it is spoken."""

    answer: str
    prompt: str = ""
    text: str = ""
    facts: dict[str, Any]
    error: str | None = None


def spoken_turn(tokenizer: Tokenizer, ids: Sequence[int]) -> _Turn:
    """Of an answer's ``ids``: its words without marks and prompts, and its first spoken turn."""
    reader = SpeechReader(tokenizer)
    for token in ids:
        reader.push(token)
    reader.finish()
    texts = [tokenizer.decode(turn.text) for turn in reader.turns]
    answer = "".join([tokenizer.decode(reader.written), *texts])
    first = next((turn for turn in reader.turns if turn.text and turn.prompt), None)
    if first is None:
        return _Turn(answer=answer, facts={}, error=NO_SPEECH)
    facts: dict[str, Any] = {} if first.ended else {"ended": False}
    if len(reader.turns) > 1:
        facts["spoken_turns"] = len(reader.turns)
    return _Turn(answer=answer, prompt=tokenizer.decode(first.prompt), text=tokenizer.decode(first.text), facts=facts)


def continued(prompt: Sample, ids: Sequence[int]) -> Sample:
    """``prompt`` and ``ids`` of text behind it."""
    if not ids:
        return prompt
    new = torch.tensor(ids, dtype=torch.int64)
    positions = (prompt.next_position + torch.arange(len(ids))).expand(3, -1)
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, new]),
        labels=torch.cat([prompt.labels, torch.full_like(new, IGNORE_LABEL)]),
        position_ids=torch.cat([prompt.position_ids, positions], dim=1),
        next_position=prompt.next_position + len(ids),
        modality=torch.cat([prompt.modality, torch.zeros_like(new)]),
    )


def layout_of(checkpoint: Checkpoint) -> list[str]:
    """The overrides that give another checkpoint the same layout."""
    parallel = checkpoint.recipe.parallel
    names = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    return [f"parallel.{name}_parallel_size={getattr(parallel, f'{name}_parallel_size')}" for name in names]
