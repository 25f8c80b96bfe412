"""Perplexity of given answers: ``exp(- sum of log-probabilities / tokens)`` over the answers of a whole set.

The answer is the record's reference, rendered as in training; its tokens and the end of its turn count, each given the
prompt and the tokens before it.
"""

import math
from collections.abc import Sequence

from megatron_omni.scoring.metric import Metric, Scored

_LARGEST_EXPONENT = 700.0
"""exp of more is no finite number."""


class Perplexity(Metric):
    """Statistics: minus the log-probability of the answer, its tokens."""

    higher_is_better = False
    is_mean = False
    asks = "likelihood"

    def __init__(self) -> None:
        self.version = "perplexity/1 tokens=answer,end_of_turn"

    def check(self, expected: Sequence[str], options: Sequence[str] | None) -> None:
        """One answer is given."""
        if len(expected) != 1 or not expected[0].strip():
            raise ValueError(f"expected = {list(expected)!r}: perplexity is that of one answer; give one text")

    def of_answer(self, logprobs: Sequence[float]) -> Scored:
        """From the log-probabilities of an answer's tokens."""
        statistics = (-math.fsum(logprobs), float(len(logprobs)))
        return Scored(score=self.combine(statistics, 1), statistics=statistics)

    def combine(self, sums: Sequence[float], count: int) -> float:
        """At least 1."""
        return math.exp(min(sums[0] / sums[1], _LARGEST_EXPONENT))
