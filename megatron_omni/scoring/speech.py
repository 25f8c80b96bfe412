"""Word and character error rates over a whole set: ``(substitutions + deletions + insertions) / words of the references``.

Not the mean of the samples' rates, in which short utterances would count most. References and answers go through the same
normaliser, by default Whisper's for English (whisper-normalizer):

    english      Whisper's EnglishTextNormalizer: small letters, no punctuation and brackets, numbers as digits, contractions out
    basic        Whisper's BasicTextNormalizer: small letters, no punctuation and brackets
    characters   the same with a space between all letters: words are characters (Chinese, Japanese, Thai)
    none         white space at the ends alone

A sample whose references are empty after that does not count, and is counted as such.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import version

from megatron_omni.scoring.metric import UNCOUNTED, Metric, Scored
from megatron_omni.scoring.text import normaliser_of


def _normalisers() -> dict[str, Callable[[str], str]]:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    # Whisper's basic normaliser leaves a space at the end.
    english, basic, letters = EnglishTextNormalizer(), BasicTextNormalizer(), BasicTextNormalizer(split_letters=True)
    return {
        "english": lambda value: english(value).strip(),
        "basic": lambda value: basic(value).strip(),
        "characters": lambda value: letters(value).strip(),
        "none": str.strip,
    }


class WordErrorRate(Metric):
    """Statistics: errors, words of the reference."""

    higher_is_better = False
    is_mean = False
    name = "wer"

    def __init__(self, normaliser: str = "english") -> None:
        import jiwer

        self._normal = normaliser_of(normaliser, _normalisers())
        self._process = jiwer.process_words if self.name == "wer" else jiwer.process_characters
        libraries = f"jiwer={version('jiwer')} whisper-normalizer={version('whisper-normalizer')}"
        self.version = f"{self.name}/1 normaliser={normaliser} {libraries}"

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """The sample's own rate, of the reference that fits best."""
        given = self._normal(answer or "")
        best: tuple[float, int, int] | None = None
        for reference in map(self._normal, expected):
            if reference:
                found = self._process(reference, given)
                errors = found.substitutions + found.deletions + found.insertions
                length = found.hits + found.substitutions + found.deletions
                if best is None or errors / length < best[0]:
                    best = errors / length, errors, length
        if best is None:
            return UNCOUNTED
        rate, errors, length = best
        return Scored(score=rate, correct=errors == 0, statistics=(errors, length))

    def combine(self, sums: Sequence[float], count: int) -> float:
        """Errors by words."""
        return sums[0] / sums[1]


class CharacterErrorRate(WordErrorRate):
    """The same of characters, spaces between words included."""

    name = "cer"

    def __init__(self, normaliser: str = "basic") -> None:
        super().__init__(normaliser)
