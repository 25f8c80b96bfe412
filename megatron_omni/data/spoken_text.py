"""Text as it is spoken: numbers, dates and signs in words, by wetext (the extra ``[speech]``; grammars of its own, offline).

Off by default: labels must match the sound, and a recording of "80 GB" that was read "eighty gigs" is spoiled by any rule.
English and Chinese. Known faults of wetext 0.1.8 in English: "$1,234.56" loses its "one", "555-1234" is read as a range and
"No. 7" becomes "Number. seven"; Chinese was right wherever it was tried.
"""

from collections.abc import Callable

_LANGUAGES = {"English": "en", "Chinese": "zh"}


def normaliser() -> Callable[[str, str], str]:
    """(text, language) -> the words that are spoken; other languages than English and Chinese stay as they are.

    ValueError where wetext is not installed.
    """
    try:
        from wetext import Normalizer
    except ImportError as error:
        raise ValueError(
            f"--normalise: wetext cannot be imported ({error}); install the extra (pip install 'megatron-omni[speech]')"
        ) from error
    made = {language: Normalizer(lang=code, operator="tn") for language, code in _LANGUAGES.items()}

    def normalise(text: str, language: str) -> str:
        known = made.get(language)
        return text if known is None else str(known.normalize(text)).strip() or text

    return normalise
