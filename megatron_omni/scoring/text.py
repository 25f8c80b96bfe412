"""Exact match and ANLS, and the ways in which texts are made comparable.

strip   white space at the ends is nothing
text    besides: small letters, single spaces, no punctuation at the end
squad   small letters, no punctuation at all, no English articles, single spaces (the SQuAD script's order)
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from megatron_omni.scoring.metric import Metric, Scored, mean_of, yes_or_no

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith(("P", "S")) and character not in "%$€£¥°"


def text(value: str) -> str:
    """Small letters, single spaces, no punctuation at the end."""
    value = " ".join(value.lower().split())
    while value and _is_punctuation(value[-1]):
        value = value[:-1].rstrip()
    return value


def squad(value: str) -> str:
    """As the SQuAD evaluation script compares."""
    value = "".join(character for character in value.lower() if not _is_punctuation(character))
    return " ".join(_ARTICLES.sub(" ", value).split())


NORMALISERS: dict[str, Callable[[str], str]] = {"strip": str.strip, "text": text, "squad": squad}


def normaliser_of(name: str, known: dict[str, Callable[[str], str]] = NORMALISERS) -> Callable[[str], str]:
    """ValueError for a name that is not there."""
    if name not in known:
        raise ValueError(f"metric_settings: normaliser = {name!r}; give one of {', '.join(known)}")
    return known[name]


class ExactMatch(Metric):
    """1 where the answer is a reference, after both went through the normaliser."""

    def __init__(self, normaliser: str = "strip") -> None:
        self._normal = normaliser_of(normaliser)
        self.version = f"exact_match/1 normaliser={normaliser}"

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """0 or 1."""
        return yes_or_no(answer is not None and self._normal(answer) in {self._normal(one) for one in expected})


class ANLS(Metric):
    """Average normalised Levenshtein similarity (Biten et al. 2019, DocVQA): ``1 - d / longer length``, 0 from a distance
    of half the longer text on; the best over references, in small letters, stripped."""

    def __init__(self, threshold: float = 0.5) -> None:
        from rapidfuzz.distance import Levenshtein

        if not 0 < threshold <= 1:
            raise ValueError(f"metric_settings: threshold = {threshold}; it must be above 0 and at most 1")
        self._distance, self._threshold = Levenshtein.normalized_distance, threshold
        self.version = f"anls/1 threshold={threshold:g} normaliser=lower,strip"

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """From 0 to 1; right is 1."""
        given = (answer or "").strip().lower()
        best = 0.0
        for one in expected:
            distance = self._distance(given, one.strip().lower())
            best = max(best, 1 - distance if distance < self._threshold else 0.0)
        return mean_of(best, correct=best == 1.0)
