"""BLEU and chrF over a whole set, as sacrebleu computes them; the version holds its signature.

Both add up counts of n-grams over samples. sacrebleu keeps the counts of a sample to itself (names with an underscore);
tests/unit/test_evaluation_metrics.py holds the sums to its public ``corpus_score``.
"""

from collections.abc import Sequence
from typing import Any

from megatron_omni.scoring.metric import Metric, Scored


class _Sacrebleu(Metric):
    is_mean = False

    def __init__(self, corpus: Any, sentence: Any, name: str) -> None:
        self._corpus, self._sentence = corpus, sentence
        self._statistics(["a"], [["a"]])  # a signature exists once something has been compared
        # The number of references may differ by sample, and does not change what is computed.
        signature = [part for part in str(corpus.get_signature()).split("|") if not part.startswith("nrefs:")]
        self.version = f"{name}/1 sacrebleu={'|'.join(signature)}"

    def _statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[int]]:
        return self._corpus._extract_corpus_statistics(answers, references)

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """The score of the sample alone, for reading; the task's score is that of the counts."""
        given = answer or ""
        (counts,) = self._statistics([given], [[one] for one in expected])
        alone = self._sentence.sentence_score(given, list(expected)).score
        return Scored(score=float(alone), statistics=tuple(map(float, counts)))

    def combine(self, sums: Sequence[float], count: int) -> float:
        """From 0 to 100."""
        return float(self._corpus._compute_score_from_stats([int(value) for value in sums]).score)


class Bleu(_Sacrebleu):
    """BLEU of the corpus; ``tokenize`` is sacrebleu's (``zh`` for Chinese)."""

    def __init__(self, tokenize: str = "13a", lowercase: bool = False) -> None:
        from sacrebleu.metrics import BLEU

        if tokenize not in BLEU.TOKENIZERS:
            raise ValueError(
                f"metric_settings: tokenize = {tokenize!r}; give one of {', '.join(sorted(BLEU.TOKENIZERS))}"
            )
        settings: dict[str, Any] = {"tokenize": tokenize, "lowercase": lowercase}
        # One sentence rarely has a 4-gram in common: its own figure goes to the orders that it has.
        super().__init__(BLEU(**settings), BLEU(**settings, effective_order=True), "bleu")


class ChrF(_Sacrebleu):
    """chrF of the corpus; ``word_order`` 2 is chrF++."""

    def __init__(self, word_order: int = 0, lowercase: bool = False) -> None:
        from sacrebleu.metrics import CHRF

        if word_order < 0:
            raise ValueError(f"metric_settings: word_order = {word_order}; it must be 0 or above")
        settings: dict[str, Any] = {"word_order": word_order, "lowercase": lowercase}
        super().__init__(CHRF(**settings), CHRF(**settings), "chrf")
