"""Choices: the letter of an option, written by the model or chosen by the likelihood of the options' texts."""

from collections.abc import Sequence

from megatron_omni.scoring.metric import Metric, Scored, yes_or_no
from megatron_omni.scoring.text import text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def check_options(options: Sequence[str] | None) -> None:
    """ValueError for options among which no letter can choose."""
    if options is None:
        return
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"options has {len(options)} items; give 2 to {len(LETTERS)}")
    seen: dict[str, str] = {}
    for letter, option in zip(LETTERS, options):
        if (other := seen.setdefault(text(option) or option, letter)) != letter:
            raise ValueError(f"options repeat: {other} and {letter} are both {option!r}; leave one of them out")


def letter_of(expected: str, options: Sequence[str] | None) -> str:
    """The letter that a reference means, which may be written as letter or as the option's text; ValueError where it is
    neither, or both of different options."""
    written = expected.strip()
    bare = written.strip("().").upper()
    known = LETTERS if options is None else LETTERS[: len(options)]
    by_letter = bare if len(bare) == 1 and bare in known else None
    by_text = next((letter for letter, one in zip(LETTERS, options or ()) if one.strip() == written), None)
    if by_text is None:
        by_text = next((letter for letter, one in zip(LETTERS, options or ()) if text(one) == text(written)), None)
    if by_letter and by_text and by_letter != by_text:
        raise ValueError(
            f"expected = {expected!r} is the letter of one option and the text of another ({by_text}); give the letter of "
            "the right one, and other texts to options that are single letters"
        )
    found = by_text or by_letter
    if found is None:
        said = (
            f"one of {', '.join(known)}, or the text of an option"
            if options is not None
            else "a letter, or give options"
        )
        raise ValueError(f"expected = {expected!r} is no option; write {said}")
    return found


class Choice(Metric):
    """1 where the letter that the answer gives is a right one."""

    rule = "letter"

    def __init__(self) -> None:
        self.version = "choice/1"

    def check(self, expected: Sequence[str], options: Sequence[str] | None) -> None:
        """Options differ, and every reference is one of them."""
        check_options(options)
        for one in expected:
            letter_of(one, options)

    def score(self, answer: str | None, expected: Sequence[str], options: Sequence[str] | None) -> Scored:
        """0 or 1."""
        return yes_or_no(answer is not None and answer.strip().upper() in {letter_of(one, options) for one in expected})


class LikelihoodChoice(Choice):
    """The same where the model says nothing: its choice is the option with the largest log-probability as an answer, by
    character of its text unless ``per_character`` is false."""

    rule = "whole"
    asks = "likelihood of options"

    def __init__(self, per_character: bool = True) -> None:
        self.per_character = per_character
        self.version = f"likelihood_choice/1 per_character={str(per_character).lower()}"

    def check(self, expected: Sequence[str], options: Sequence[str] | None) -> None:
        """There must be options."""
        if options is None:
            raise ValueError("options is missing, which likelihood_choice chooses from; give the record a list of them")
        super().check(expected, options)

    def choose(self, logprobs: Sequence[float], options: Sequence[str]) -> str:
        """The letter of the likeliest option, the first of equal ones."""
        values = [
            value / max(len(option), 1) if self.per_character else value for value, option in zip(logprobs, options)
        ]
        return LETTERS[max(range(len(values)), key=values.__getitem__)]
