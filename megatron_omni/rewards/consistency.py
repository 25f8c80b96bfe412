"""Whether the answer is what the thought came to: a rule that reads no solution (a judge can say the same, judge.py).

The conclusion of a thought is looked for from its end, sentence by sentence, as the kind of thing that the answer is: a
letter of a choice, a number, or else the answer's words.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from megatron_omni.rewards.answer import THOUGHT_ENDS, Value, Values, answer_text
from megatron_omni.rewards.compare import letter_in
from megatron_omni.scoring.numeric import NUMBER, parse_number
from megatron_omni.scoring.text import squad

_SENTENCE = re.compile(r"(?<=[.!?])\s+|[\n。！？]+")


def consistency(
    *, completions: Sequence[str], options: Sequence[Sequence[str] | None] | None = None, **_: Any
) -> Values:
    """1 where thought and answer agree, 0 where the thought came to another answer, None where no conclusion is found."""
    offered = options if options is not None else [None] * len(completions)
    return [agreement(said, choices) for said, choices in zip(completions, offered, strict=True)]


def agreement(completion: str, options: Sequence[str] | None = None) -> Value:
    """Of one completion, as :func:`consistency`."""
    thought, ended, _ = completion.rpartition(THOUGHT_ENDS)
    answer = answer_text(completion)
    if not ended or not answer:
        return None
    sentences = [sentence for sentence in reversed(_SENTENCE.split(thought)) if sentence.strip()]
    letter = letter_in(answer, options) if options or len(answer.strip("().")) == 1 else None
    if letter is not None:
        chosen = next((found for sentence in sentences if (found := letter_in(sentence.strip(), options))), None)
        return None if chosen is None else float(chosen == letter)
    number = _last_number(answer)
    if number is not None:
        concluded = next((one for sentence in sentences if (one := _last_number(sentence)) is not None), None)
        return None if concluded is None else float(concluded == number)
    words = squad(answer)
    return 1.0 if words and any(f" {words} " in f" {squad(sentence)} " for sentence in sentences[:2]) else None


def _last_number(text: str) -> Fraction | None:
    found = NUMBER.findall(text)
    value = parse_number(found[-1]) if found else None
    return None if value is None else Fraction(str(value))
