"""What a language model wrote, taken apart: spoken turns among its tokens (data/template.py writes them).

    .. <|speech_start|> prompt <|speech_prompt|> spoken <|speech_end|> ..

The inverse of ``template.answer_ids``: ``parse_speech`` of a rendered answer gives its prompt and its words back. Models also
write what no record holds, and every sequence has a defined result: a span ends at ``<|speech_end|>``, at the next
``<|speech_start|>``, at an end token or with the sequence, and says whether it was ended by its own mark; one without
``<|speech_prompt|>`` speaks nothing; marks outside a span, and special tokens inside one, are passed over.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_omni.data.tokenizer import SPEECH_END, SPEECH_PROMPT, SPEECH_START, Tokenizer


@dataclass(frozen=True)
class SpokenTurn:
    """One span."""

    prompt: tuple[int, ...]
    """Ids of what asks for the voice."""
    text: tuple[int, ...]
    """Ids of what is said."""
    ended: bool = True
    """By ``<|speech_end|>``."""


class SpeechReader:
    """Follows an answer token by token, so that speaking can begin before the answer ends."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._start, self._middle, self._end = map(tokenizer.special, (SPEECH_START, SPEECH_PROMPT, SPEECH_END))
        self.turns: list[SpokenTurn] = []
        """Those that are over."""
        self.written: list[int] = []
        """Ids outside of spans."""
        self.prompt: list[int] | None = None
        """Ids of the open span's prompt; None outside of a span."""
        self.text: list[int] | None = None
        """Ids of its words; None before ``<|speech_prompt|>``."""

    def push(self, token: int) -> SpokenTurn | None:
        """Take the next token; the span that is over with it."""
        if token == self._start:
            over = self.finish()
            self.prompt = []
            return over
        if self.prompt is None:
            if not self.tokenizer.is_special(token):
                self.written.append(token)
            return None
        if token == self._middle and self.text is None:
            self.text = []
        elif token == self._end or token in self.tokenizer.eos_ids:
            return self.finish(ended=token == self._end)
        elif not self.tokenizer.is_special(token):
            (self.prompt if self.text is None else self.text).append(token)
        return None

    def finish(self, *, ended: bool = False) -> SpokenTurn | None:
        """The answer is over: the open span, if there is one."""
        if self.prompt is None:
            return None
        turn = SpokenTurn(tuple(self.prompt), tuple(self.text or ()), ended)
        self.prompt = self.text = None
        self.turns.append(turn)
        return turn


def parse_speech(ids: Iterable[int], tokenizer: Tokenizer) -> list[SpokenTurn]:
    """The spans of an answer, in order; ValueError for a tokenizer without their marks."""
    reader = SpeechReader(tokenizer)
    for token in ids:
        reader.push(int(token))
    reader.finish()
    return reader.turns
