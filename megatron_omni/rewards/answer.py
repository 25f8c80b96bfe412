"""The answer in a completion, and the references that it is compared with.

Looked for after the last ``</think>`` (a completion that never closes its thought has no answer), there inside the last
``<answer>...</answer>``, else inside the last ``\\boxed{...}``, else all of it. What stands in the thought is no answer:
a parser that takes the first match would pay for guesses.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_omni.config.thinking import THINK_END
from megatron_omni.scoring.rules import RULES

Value = float | None
Values = list[Value]
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_text(completion: str, thinking: bool = True) -> str:
    """The answer, without space at its ends; empty where there is none. ``thinking`` false: a thought is not asked for."""
    _, found, said = completion.rpartition(THINK_END)
    if thinking and not found:
        return ""
    tagged = _TAGGED.findall(said)
    if tagged:
        return tagged[-1].strip()
    boxed = RULES["boxed"](said, None)
    return said.strip() if boxed is None else boxed


def references(solution: Any) -> list[str]:
    """The right answers of a column's cell: one or a list of texts or numbers; none for null and for empty text."""
    cells = solution if isinstance(solution, list | tuple) else [solution]
    return [str(cell) for cell in cells if cell is not None and str(cell).strip()]


def compared(
    completions: Sequence[str],
    solution: Sequence[Any] | None,
    thinking: bool,
    one: Callable[[int, str, list[str]], Value],
) -> Values:
    """``one(place, answer, references)`` of every completion; None where a record has no reference."""
    if solution is None:
        raise ValueError("the records have no column 'solution', and no answer at their end to stand for it")
    right = [references(cell) for cell in solution]
    return [
        one(place, answer_text(said, thinking), known) if known else None
        for place, (said, known) in enumerate(zip(completions, right, strict=True))
    ]
