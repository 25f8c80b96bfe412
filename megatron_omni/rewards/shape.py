"""Rewards that read no solution: think_format, repetition, overlong.

They say how something was said, not whether it is right: alone they decide nothing where a function that judges content
abstains (score.py).
"""

from collections.abc import Sequence
from typing import Any

from megatron_omni.config.thinking import THINK, THINK_END
from megatron_omni.rewards.answer import Values


def think_format(*, completions: Sequence[str], prompts: Sequence[str], **_: Any) -> Values:
    """1 for exactly one ``<think>``, at the start, exactly one ``</think>``, and something on both sides of it. A prompt
    that ends with ``<think>`` has opened the thought already."""
    return [
        float(is_well_formed(THINK + said if prompt.rstrip().endswith(THINK) else said))
        for said, prompt in zip(completions, prompts, strict=True)
    ]


def is_well_formed(completion: str) -> bool:
    """Whether a completion is ``<think>`` thought ``</think>`` answer, neither of them empty."""
    if completion.count(THINK) != 1 or completion.count(THINK_END) != 1:
        return False
    before, _, rest = completion.partition(THINK)
    thought, closed, answer = rest.partition(THINK_END)
    return not before.strip() and bool(closed and thought.strip() and answer.strip())


def repetition(*, completion_ids: Sequence[Sequence[int]], n: int = 3, most: float = 1.0, **_: Any) -> Values:
    """Minus the share of n-grams of **token ids** that were there before, times ``most``: from -most to 0."""
    if n < 1 or not most > 0:
        raise ValueError(f"n = {n}, most = {most:g}: n is at least 1 and most above 0")
    return [-most * repeated_share(ids, n) if repeated_share(ids, n) else 0.0 for ids in completion_ids]


def repeated_share(ids: Sequence[int], n: int = 3) -> float:
    """``1 - distinct / all`` n-grams of token ids, 0 for fewer than n tokens. Of words it would see no Chinese."""
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def overlong(
    *,
    completion_ids: Sequence[Sequence[int]],
    finish_reasons: Sequence[str],
    max_new_tokens: int,
    overlong_tokens: int,
    **_: Any,
) -> Values:
    """DAPO's soft punishment: 0 up to ``max_new_tokens - overlong_tokens`` tokens, linear to -1 at ``max_new_tokens``; -1
    for a completion that was cut."""
    if not 0 <= overlong_tokens <= max_new_tokens:
        raise ValueError(f"overlong_tokens = {overlong_tokens}: give 0 to max_new_tokens = {max_new_tokens}")
    free = max_new_tokens - overlong_tokens
    return [
        -1.0 if reason == "length" else -min(1.0, max(0, len(ids) - free) / max(overlong_tokens, 1)) or 0.0
        for ids, reason in zip(completion_ids, finish_reasons, strict=True)
    ]
