"""Pieces of a long recording: neighbouring segments with times, put together as the splitter would cut their text.

    texts of segments -> one text -> pieces (speech_pieces.py) -> a group ends with the first segment that ends at or behind a cut

Segments may be words (groups are then pieces) or sentences (of which none is cut: no time is known inside of one).
"""

from collections.abc import Sequence
from itertools import accumulate

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.data.speech_pieces import IDEOGRAPH, pieces
from megatron_omni.data.tokenizer import Tokenizer

_WIDE_MARKS = "。，？！：；、“”‘’（）《》「」『』…"


def joined(texts: Sequence[str]) -> str:
    """Neighbouring texts as one: with a space, but not beside Chinese or Japanese."""
    return "".join(_with_spaces(texts))


def groups(texts: Sequence[str], tokenizer: Tokenizer, config: SpeechConfig) -> list[range]:
    """Which of the texts are one piece, in order and all of them."""
    ends = [*accumulate(map(len, _with_spaces(texts)))]
    found = pieces(joined(texts), tokenizer, config)
    cuts = [*accumulate(len(tokenizer.decode(piece)) for piece in found)][:-1]
    made, first = [], 0
    for number, end in enumerate(ends):
        begin = ends[number - 1] if number else 0
        if any(begin < cut <= end for cut in cuts) and number + 1 < len(texts):
            made.append(range(first, number + 1))
            first = number + 1
    return [*made, range(first, len(texts))]


def _with_spaces(texts: Sequence[str]) -> list[str]:
    """The texts, with a space before those that need one."""
    before = ["", *texts]
    return [" " + text if last and _are_apart(last[-1], text[0]) else text for last, text in zip(before, texts)]


def _are_apart(last: str, first: str) -> bool:
    return not any(IDEOGRAPH.match(character) or character in _WIDE_MARKS for character in (last, first))
