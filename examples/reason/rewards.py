"""The reward of ``make reason``: an example of a function of yours (docs/reinforcement.md)."""

from collections.abc import Sequence
from typing import Any


def right(completions: Sequence[str], solution: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer, behind the end of a thought, that is the record's ``solution`` to the letter."""
    answers = [said.rpartition("</think>") for said in completions]
    return [float(bool(end) and answer.strip() == known) for (_, end, answer), known in zip(answers, solution)]
