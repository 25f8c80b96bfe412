"""Long text in pieces that are spoken one after the other: the same cuts in training and while a text is still written.

A cut falls between two tokens, and between two whole characters. With a the piece so far and b what follows, a cut is made

    after an end   when a has ``min_split_tokens`` tokens and ends with one of ``. , ? ! ;``, their Chinese forms or a new line
                   (closing quotes and brackets may follow it). Behind an ASCII mark b must begin with a space or in Chinese:
                   no cut in ``www.a.org``; and b must not begin with a digit, so none in ``3.14``
    at a word      when a has ``max_split_tokens`` tokens and no end came: beside a space or a Chinese or Japanese character,
                   and not inside of a number (``12 000``, ``3万``). Chinese words are cut between their tokens
    anywhere       when a has four times as many: 50,000 letters in a row, or a script without spaces

and never before a closing bracket or another mark, so "?!" and the quote stay with their sentence. A piece has something
to say: what has no letter and no digit stays with the piece before, and is left out beyond four times
``max_split_tokens`` tokens. Apart from that the pieces put together are the text, and where the text does not end with a
mark it gets a ".". A text without a letter or a digit has no pieces.

``PieceSplitter`` is told token by token and knows a piece when the token behind it came (or more of them, where a
character is spread over several tokens, or nothing to say has followed). ``pieces`` is the same over a whole text.
``spoken_ids`` are the tokens of a piece as the speech generator is given them: without the spaces around it, so that a
piece of a long text has the tokens that it has alone.

Source: the released text splitter of Uni-MoE-2.0-Omni, which cuts anywhere after 16 tokens, also inside of a word; the
rules for quotes, addresses, words and numbers are ours.
"""

import codecs
import re
import unicodedata
from collections.abc import Sequence

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.tokenizer import Tokenizer

_ASCII_MARKS = ".,?!;"
_MARKS = _ASCII_MARKS + "。，？！：；" + "\n\r"
_ENDS = _MARKS + ":…—"
"""What a text may end with, so that no "." is added."""
_FINAL_MARK = "."
_CLOSING = "\"'”’)]}»」』】》〉）］｝"
_OPENING = "“‘([{«「『【《〈（［｛"
IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Chinese characters and Japanese syllables: scripts that write no spaces between words."""
_NUMBER_SIGNS = "两兩点點%％‰"
"""Parts of numbers that Unicode does not call numeric."""
_RUN = 4
"""Times ``max_split_tokens`` without any place to cut, or without anything to say, that are endured."""
_SEEN = 64
"""Characters before a cut that decide about it."""


class PieceSplitter:
    """Cuts a text that comes token by token."""

    def __init__(self, tokenizer: Tokenizer, config: SpeechConfig) -> None:
        self.tokenizer = tokenizer
        self._least, self._most = config.min_split_tokens, config.max_split_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[int] = []
        self._whole, self._open = 0, True
        """Tokens up to the last that ended with a whole character, and whether only a part of one has come since."""
        self._cut = 0
        """Tokens of the finished piece, while nothing to say has followed it."""
        self._text, self._says = "", False
        """Last characters behind the cut, and whether any of them all was a letter or a digit."""

    def push(self, token: int) -> list[int] | None:
        """Take the next token; the piece that is known to be whole now."""
        more = self._decoder.decode(self.tokenizer.token_bytes(token))
        if more and self._open and not self._cut and self._may_cut(more):
            self._cut, self._text, self._says = self._whole, "", False
        self._tokens.append(token)
        self._text = (self._text + more)[-_SEEN:]
        self._says = self._says or _speakable(more)
        self._open = not more
        if not self._decoder.getstate()[0]:
            self._mark_whole()
        return self._finished() if self._cut and self._says else None

    def finish(self) -> list[int] | None:
        """The last piece; None where there is nothing to say. The splitter is then ready for another text."""
        piece = ended(self._tokens, self.tokenizer) if self._cut or self._says else None
        self._decoder.reset()
        self._tokens, self._whole, self._open, self._cut, self._text, self._says = [], 0, True, 0, "", False
        return piece

    def _mark_whole(self) -> None:
        """Note that the last token ends with a whole character; drop it where too much came that says nothing."""
        if not self._says and len(self._tokens) - self._cut > _RUN * self._most:
            del self._tokens[self._whole :]
        self._whole, self._open = len(self._tokens), True

    def _finished(self) -> list[int]:
        piece, self._tokens = self._tokens[: self._cut], self._tokens[self._cut :]
        self._whole, self._cut = self._whole - self._cut, 0
        return piece

    def _may_cut(self, more: str) -> bool:
        """Whether the text may be cut before ``more``, which is at least one character."""
        if not self._says or unicodedata.combining(more[0]):
            return False
        count = self._whole
        if count >= _RUN * self._most:
            return True
        if more[0] in _CLOSING or (more.lstrip(" ") or " ")[0] in _MARKS:
            return False
        at_end = count >= self._least and _ends_before(self._text, more[0])
        return at_end or (count >= self._most and _word_begins(self._text, more))


def pieces(text: str | Sequence[int], tokenizer: Tokenizer, config: SpeechConfig) -> list[list[int]]:
    """The pieces of a text or of its tokens, each a list of tokens."""
    splitter = PieceSplitter(tokenizer, config)
    tokens = tokenizer.encode(text) if isinstance(text, str) else text
    found = [splitter.push(token) for token in tokens]
    return [piece for piece in (*found, splitter.finish()) if piece is not None]


def ended(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text; where it does not end with a mark, those of "." take the place of the spaces at its end."""
    text = tokenizer.decode(tokens)
    bare = text.rstrip()
    if (bare.rstrip(_CLOSING) or " ")[-1] in _ENDS:
        return [*tokens]
    return [*tokens, *tokenizer.encode(_FINAL_MARK)] if bare == text else tokenizer.encode(bare + _FINAL_MARK)


def spoken_ids(text: str | Sequence[int], tokenizer: Tokenizer, *, last: bool = False) -> list[int]:
    """What the speech generator is told of a text or a piece. ``last``: no piece follows, so that it needs an end."""
    said = text if isinstance(text, str) else tokenizer.decode(text)
    tokens = tokenizer.encode(said.strip())
    return ended(tokens, tokenizer) if last else tokens


def _speakable(text: str) -> bool:
    return any(map(str.isalnum, text))


def _ends_before(before: str, first: str) -> bool:
    """Whether ``before`` ends with a mark behind which ``first`` may begin a new piece."""
    mark = before.rstrip(" \t" + _CLOSING)[-1:]
    if not mark or mark not in _MARKS or first.isdigit():
        return False
    if mark not in _ASCII_MARKS or before[-1].isspace() or first.isspace():
        return True
    return bool(IDEOGRAPH.match(first)) or first in _OPENING


def _word_begins(before: str, more: str) -> bool:
    """Whether a word begins with ``more``, or behind the spaces that it begins with; not inside of a number."""
    last, first, follows = before[-1], more[0], more.lstrip()[:1]
    if not follows or last in _OPENING:  # spaces alone: what they separate is seen with the next token
        return False
    apart = last.isspace() or first.isspace() or IDEOGRAPH.match(last) or IDEOGRAPH.match(first)
    return bool(apart) and not (_in_number(before.rstrip()[-1:]) and _in_number(follows))


def _in_number(character: str) -> bool:
    return bool(character) and (character.isnumeric() or character in _NUMBER_SIGNS)
