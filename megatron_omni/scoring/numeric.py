"""Numbers: mean relative accuracy (VSI-Bench) and relaxed accuracy (ChartQA)."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_omni.scoring.metric import Metric, Scored, mean_of, yes_or_no

NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?(?<=\d)(?:[eE][-+]?\d+)?"
)
"""A number in a text: digits of any script, a sign that no letter or digit stands before, commas between thousands."""
ALLOWED_PERCENT = tuple(range(50, 0, -5))
"""Largest relative errors that VSI-Bench takes for right: one minus .50, .55, ..., .95."""


def parse_number(written: str) -> float | None:
    """The number that a text is, and nothing else; None where it is none or not finite."""
    written = written.strip().replace("\u2212", "-")
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", written):
        written = written.replace(",", "")
    return _finite(written)


def _finite(written: str) -> float | None:
    if "_" in written:  # Python's own notation
        return None
    try:
        value = float(written)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class MeanRelativeAccuracy(Metric):
    """The share of the thresholds .50, .55, ..., .95 at which ``|answer - reference| / |reference| <= 1 - threshold``
    (VSI-Bench, Yang et al. 2024, as its code has it: with <=). A reference of 0 needs an answer of 0."""

    rule = "number"

    def __init__(self) -> None:
        self.version = "mean_relative_accuracy/1 thresholds=.50:.95:.05"

    def check(self, expected: Sequence[str], options: Sequence[str] | None) -> None:
        """References must be numbers."""
        for one in expected:
            if parse_number(one) is None:
                raise ValueError(
                    f"expected = {one!r} is no number, which mean_relative_accuracy compares with; write 12.5"
                )

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """From 0 to 1 in tenths; right is 1."""
        given = None if answer is None else parse_number(answer)
        if given is None:
            return mean_of(0.0, correct=False)
        best = max(self._one(given, parse_number(one) or 0.0) for one in expected)
        return mean_of(best, correct=best == 1.0)

    @staticmethod
    def _one(given: float, target: float) -> float:
        if target == 0.0:
            return float(given == 0.0)
        # Exact, of the decimals that were written: floats would decide ties by chance.
        answer, right = Fraction(str(given)), Fraction(str(target))
        error = 100 * abs(answer - right)
        return sum(error <= allowed * abs(right) for allowed in ALLOWED_PERCENT) / len(ALLOWED_PERCENT)


class RelaxedAccuracy(Metric):
    """ChartQA (Masry et al. 2022): numbers may be 5 % off, ``12%`` is 0.12; ``1,000`` and everything else, and a reference of
    0, is compared as text in small letters. White space at the ends is nothing."""

    def __init__(self, tolerance: float = 0.05) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"metric_settings: tolerance = {tolerance}; it must be from 0 to below 1")
        self._tolerance = tolerance
        self.version = f"relaxed_accuracy/1 tolerance={tolerance:g} normaliser=lower,strip"

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """0 or 1."""
        return yes_or_no(answer is not None and any(self._fits(answer.strip(), one.strip()) for one in expected))

    def _fits(self, answer: str, target: str) -> bool:
        given, wanted = _with_percent(answer), _with_percent(target)
        if given is not None and wanted:
            return abs(given - wanted) / abs(wanted) <= self._tolerance
        return answer.lower() == target.lower()


def _with_percent(written: str) -> float | None:
    if written.endswith("%"):
        value = _finite(written.rstrip("%"))
        return None if value is None else value / 100
    return _finite(written)
