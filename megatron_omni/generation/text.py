"""Text of an answer while it is being made: whole characters, stop strings over token borders, thought told apart.

A token may be a part of a character, and what it decodes to may depend on the token before it. So the ids since the last
whole character are decoded together with the one before them (the *window*), and whole characters are told. Text that
may turn out to be the beginning of a stop string is held back until that is decided; a stop string itself is never told.
The pieces, joined, are the text of the whole answer, cut before the first stop string.

``<think>`` and ``</think>`` are told apart by their token ids where the vocabulary has them as special tokens, else by
their text (Qwen2.5 has no such tokens).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_omni.config.thinking import THINK, THINK_END
from megatron_omni.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_INCOMPLETE = 3
"""Signs that the beginning of a character may be decoded to; more of them are what the answer says."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is certain with one more token."""

    text: str = ""
    reasoning: str = ""
    stop: str | None = None
    """The stop string that was found; nothing follows it."""


class Detokenizer:
    """Ids to text, one at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = 0
        """Characters of the window's text that are out."""

    def add(self, token: int) -> str:
        """Text that is certain with ``token``."""
        if self._tokenizer.is_special(token):  # a decoder passes over it
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        tail = len(text) - len(text.rstrip(_REPLACEMENT)) if text.endswith(_REPLACEMENT) else 0
        certain = max(self._told, len(text) - min(tail, _LONGEST_INCOMPLETE))
        new = text[self._told : certain]
        self._told = certain
        if tail == 0:  # the last id stays, since what follows may decode otherwise at the beginning of a text
            self._window = [token]
            self._told = len(self._tokenizer.text_of(token))
        return new

    def flush(self) -> str:
        """The text that is left, incomplete characters as U+FFFD."""
        new = self._tokenizer.decode(self._window)[self._told :]
        self._window, self._told = [], 0
        return new


class TextStream:
    """Pieces of one answer's text."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), reasoning: bool = False) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._markers = {
            name: tokenizer.specials[name] for name in (THINK, THINK_END) if reasoning and name in tokenizer.specials
        }
        self._by_text = reasoning and len(self._markers) < 2
        self._held = ""
        self._thinks = False
        self.num_reasoning_tokens = 0
        """Tokens that were thought, the marks around them included."""

    def add(self, token: int) -> Piece:
        """What is certain with one more token of the answer; an end token has no text and is not given here."""
        was_thinking = self._thinks
        if token in self._markers.values():
            piece = self.flush()
            self._thinks = token == self._markers[THINK]
        else:
            piece = self._take(self._detokenizer.add(token), final=False)
        self.num_reasoning_tokens += was_thinking or self._thinks
        return piece

    def flush(self) -> Piece:
        """What was held back; the answer, or a part of it, is over."""
        return self._take(self._detokenizer.flush(), final=True)

    def _take(self, new: str, *, final: bool) -> Piece:
        """Move from what is held to what is told, up to a stop string, as far as it is certain."""
        if not (self._stop or self._by_text):
            return Piece("", new) if self._thinks else Piece(new)
        self._held += new
        told = {False: "", True: ""}
        stop = None
        while stop is None:
            marks = (*self._stop, *((THINK_END if self._thinks else THINK,) if self._by_text else ()))
            found = min(
                ((place, -len(mark), mark) for mark in marks if (place := self._held.find(mark)) >= 0), default=None
            )
            if found is None:
                break
            place, _, mark = found
            # A longer mark that begins earlier may still come.
            if not final and _may_begin(self._held, [m for m in marks if m != mark]) < place:
                break
            told[self._thinks] += self._held[:place]
            self._held = self._held[place + len(mark) :]
            if mark in self._stop:
                stop, self._held = mark, ""
            else:
                self._thinks = not self._thinks
        else:
            return Piece(told[False], told[True], stop)
        certain = len(self._held) if final else _may_begin(self._held, marks)
        told[self._thinks] += self._held[:certain]
        self._held = self._held[certain:]
        return Piece(told[False], told[True])


def _may_begin(text: str, marks: Sequence[str]) -> int:
    """The first place from which ``text`` may go on to be one of ``marks``; its length where there is none."""
    longest = max(map(len, marks), default=0)
    for place in range(max(0, len(text) - longest + 1), len(text)):
        if any(len(mark) > len(text) - place and mark.startswith(text[place:]) for mark in marks):
            return place
    return len(text)
