"""Rewards that compare the answer with the record's ``solution``, without asking anyone: choice, number, iou, wer.

From 0 to 1; of several references (a list) the best. None where the record has none, or one that is no choice, number or
interval: such a record is not this function's. The maths is that of evaluation (scoring/).
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from megatron_omni.rewards.answer import Value, Values, compared
from megatron_omni.scoring.choice import Choice
from megatron_omni.scoring.intervals import NUMBERS, IoU, numbers_in
from megatron_omni.scoring.metric import Metric
from megatron_omni.scoring.numeric import MeanRelativeAccuracy
from megatron_omni.scoring.rules import RULES, TEXT_COMMAND

_STANDALONE = re.compile(r"(?<![\w'\\])(?:[B-HJ]|[AI](?!\s+[a-z]))(?![\w'])")
"""A letter from A to J that is no word: 'A cat' and 'I think' begin with one."""
_CHINESE = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _usable(metric: Metric, known: Sequence[str], options: Sequence[str] | None = None) -> bool:
    try:
        metric.check(known, options)
    except ValueError:
        return False
    return True


def choice(
    *,
    completions: Sequence[str],
    solution: Sequence[Any] | None = None,
    options: Sequence[Sequence[str] | None] | None = None,
    thinking: bool = True,
    **_: Any,
) -> Values:
    """1 where the letter of the answer is the solution's (a letter, or the text of one of the column ``options``)."""
    metric = Choice()

    def one(place: int, answer: str, known: list[str]) -> Value:
        offered = None if options is None or not options[place] else [str(option) for option in options[place] or ()]
        if not _usable(metric, known, offered):
            return None
        return metric.score(_letter(answer, offered), known, offered).score

    return compared(completions, solution, thinking, one)


def _letter(answer: str, options: Sequence[str] | None) -> str | None:
    """The letter by evaluation's rule ("answer is (B)", "B.", an option's text), else the first that stands alone."""
    answer = TEXT_COMMAND.sub(r"\1", answer)
    found = RULES["letter"](answer, options)
    if found is not None:
        return found
    known = "ABCDEFGHIJ"[: len(options)] if options else "ABCDEFGHIJ"
    return next((match[0] for match in _STANDALONE.finditer(answer) if match[0] in known), None)


def number(
    *, completions: Sequence[str], solution: Sequence[Any] | None = None, thinking: bool = True, **_: Any
) -> Values:
    """Mean relative accuracy of the last number of the answer: the share of c = .50, .55, .., .95 with
    ``|p - g| <= (1 - c) |g|``, decimals compared exactly; a solution of 0 needs 0."""
    metric = MeanRelativeAccuracy()

    def one(place: int, answer: str, known: list[str]) -> Value:
        return metric.score(RULES["number"](answer, None), known, None).score if _usable(metric, known) else None

    return compared(completions, solution, thinking, one)


def iou(
    *,
    completions: Sequence[str],
    solution: Sequence[Any] | None = None,
    kind: str = "segment",
    normalised: float | None = None,
    size: Sequence[Sequence[float] | None] | None = None,
    thinking: bool = True,
    **_: Any,
) -> Values:
    """Intersection over union of the last two (``kind`` segment) or four numbers (box) of the answer; ends the wrong way
    round are put right.

    With ``normalised`` N the model answers boxes in N-ths of the picture and solutions are in pixels: the column ``size``
    holds [width, height].
    """
    metric = IoU(kind)
    if normalised is not None and (kind != "box" or size is None):
        raise ValueError(f"normalised = {normalised:g} is for boxes and needs the column 'size', [width, height]")

    def one(place: int, answer: str, known: list[str]) -> Value:
        right = [_written(_ordered(numbers_in(text))) for text in known]
        given = numbers_in(answer)[-NUMBERS[kind] :]
        if not _usable(metric, right):
            return None
        if normalised is not None:
            sides = (size or ())[place]
            if not sides or len(sides) != 2:
                return None
            given = [value * side / normalised for value, side in zip(given, [*sides, *sides])]
        return metric.score(_written(_ordered(given)), right, None).score

    rows = None if solution is None else [_intervals(cell, kind) for cell in solution]
    return compared(completions, rows, thinking, one)


def _intervals(cell: Any, kind: str) -> Any:
    """A list of two or four numbers is one reference."""
    if isinstance(cell, list | tuple) and all(isinstance(value, int | float) for value in cell):
        return _written(cell)
    return (
        [_written(item) if isinstance(item, list | tuple) else item for item in cell]
        if isinstance(cell, list)
        else cell
    )


def _written(values: Sequence[float]) -> str:
    return " ".join(f"{value:.17g}" for value in values)


def _ordered(values: Sequence[float]) -> list[float]:
    """Of [start, end] or [left, top, right, bottom], each end behind its start."""
    half = len(values) // 2
    sides = [sorted(pair) for pair in zip(values[:half], values[half:])]
    return [low for low, _ in sides] + [high for _, high in sides] if len(values) == 2 * half else list(values)


def wer(
    *, completions: Sequence[str], solution: Sequence[Any] | None = None, thinking: bool = True, **_: Any
) -> Values:
    """``max(0, 1 - edits / words of the reference)`` in small letters without punctuation; where the reference has
    Chinese, of characters."""

    def one(place: int, answer: str, known: list[str]) -> Value:
        values = [
            1 - edits(_words(answer, right), units) / len(units) for right in known if (units := _words(right, right))
        ]
        return max(0.0, *values) if values else None

    return compared(completions, solution, thinking, one)


def _words(text: str, reference: str) -> list[str]:
    kept = "".join(
        "" if letter in "'’" else " " if unicodedata.category(letter).startswith(("P", "S")) else letter
        for letter in unicodedata.normalize("NFKC", text).lower()
    )
    return list("".join(kept.split())) if _CHINESE.search(reference) else kept.split()


def edits(given: Sequence[str], right: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions from one to the other (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, one in enumerate(given, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (one != other))
    return row[-1]
