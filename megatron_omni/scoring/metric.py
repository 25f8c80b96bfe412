"""What a metric is: a score of each sample, numbers that are added up over samples, and the task's score of the sums.

A mean is the sum of scores by their number; a word error rate the sum of errors by the sum of words. With the sums of any
choice of samples at hand, standard errors and comparisons are the same code for all metrics (uncertainty.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One sample's outcome."""

    score: float | None
    """None: the sample does not count."""
    correct: bool | None = None
    statistics: tuple[float, ...] | None = None
    """Added up over samples; None where the sample does not count."""


UNCOUNTED = Scored(score=None)


class Metric:
    """Base of all metrics; the defaults are those of a mean of scores."""

    version: str
    """Name, number (raised with every change of what it computes), settings and libraries."""
    rule = "whole"
    """How an answer is taken from the text unless a task says otherwise."""
    higher_is_better = True
    is_mean = True
    asks: Literal["answer", "likelihood", "likelihood of options", "picture", "pictures"] = "answer"
    """What the model is asked for; a picture of each sample, or pictures that are scored together
    (evaluation/picture_metrics.py)."""

    def check(self, expected: Sequence[str], options: Sequence[str] | None) -> None:
        """ValueError for references that can never be right or wrong."""

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """The best over the references; ``answer`` is None where the rule found nothing."""
        raise NotImplementedError

    def combine(self, sums: Sequence[float], count: int) -> float:
        """The score of ``count`` samples from the sums of their statistics."""
        return sums[0] / count


def mean_of(score: float, *, correct: bool | None = None) -> Scored:
    """A sample of a metric that is the mean of its samples' scores."""
    return Scored(score=score, correct=correct, statistics=(score,))


def yes_or_no(correct: bool) -> Scored:
    """A sample of an accuracy."""
    return mean_of(float(correct), correct=correct)
