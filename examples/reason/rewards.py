"""The reward of ``make reason``: an example of a function of yours (docs/reinforcement.md)."""

import random
from collections.abc import Sequence
from typing import Any

from megatron_omni.rewards.shape import think_format


def right(completions: Sequence[str], solution: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer, behind the end of a thought, that is the record's ``solution`` to the letter."""
    answers = [said.rpartition("</think>") for said in completions]
    return [float(bool(end) and answer.strip() == known) for (_, end, answer), known in zip(answers, solution)]


def permuted(
    completions: Sequence[str], solution: Sequence[str], thought: Sequence[str], step: int, **columns: Any
) -> list[float]:
    """The control: the sum of the recipe's rewards, dealt to other responses of the batch.

    Among those that GSPO would learn from: a group without spread keeps its reward, and is left out as there. Otherwise the
    control would average over three times as many responses, and its gradient be small for that alone. Equal responses of a
    group stay equal in reward, as with any reward of what is said: dealt apart, their gradients cancel, and of a group of G
    that says two things 1 / sqrt(G - 1) of GSPO's is left (docs/log.md).
    """
    paid = zip(right(completions, solution), think_format(completions=completions, **columns))
    totals = [value + 0.5 * (form or 0.0) for value, form in paid]
    groups: dict[tuple[str, str], list[int]] = {}
    for place, question in enumerate(zip(thought, solution)):  # the record's own thought names it
        groups.setdefault(question, []).append(place)
    said: dict[tuple[str, str, str], list[int]] = {}
    for question, group in groups.items():
        if len({totals[place] for place in group}) > 1:
            for place in group:
                said.setdefault((*question, completions[place]), []).append(place)
    dealt = [totals[places[0]] for places in said.values()]
    random.Random(step).shuffle(dealt)
    for places, total in zip(said.values(), dealt):
        for place in places:
            totals[place] = total
    return totals
