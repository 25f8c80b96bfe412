"""How an answer is taken from what the model said: named rules, whose effect every summary counts.

    whole          all of it
    first_word     up to the first space, without a full stop (VSI-Bench)
    last_line      the last line that is not empty
    boxed          inside the last \\boxed{...}
    letter         of an option, in this order: "answer is (B)", the last \\boxed{B}, "B." or "(B)" at the beginning, the exact
                   text of an option
    number         the last number
    segment, box   the last two or four numbers
    after: STRING  what follows the last STRING

A rule gives None where it finds nothing: such an answer is wrong, and counted as ``unparsed``. What was thought is gone
before a rule sees an answer.
"""

import re
from collections.abc import Callable, Sequence

from megatron_omni.scoring import nearest
from megatron_omni.scoring.choice import LETTERS
from megatron_omni.scoring.intervals import NUMBERS, numbers_in
from megatron_omni.scoring.numeric import NUMBER
from megatron_omni.scoring.text import text

Rule = Callable[[str, Sequence[str] | None], str | None]
"""(what was said, options) -> the answer."""

_SAID = re.compile(r"(?:(?i:answer)\s*(?:(?i:is)|:|：)|答案\s*(?:是|为|:|：))[\s:：*\"']*[(（]?([A-Z])(?![\w'])")
_LEADING = re.compile(r"\s*(?:[(（]([A-Z])[)）]|([A-Z])(?:[.:)、。，,]|\s*\n|\s*$))")
_LETTER_ALONE = re.compile(r"[(（]?([A-Za-z])[)）.]?")
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{(.*)\}")


def _whole(said: str, options: Sequence[str] | None) -> str | None:
    return said.strip()


def _first_word(said: str, options: Sequence[str] | None) -> str | None:
    words = said.split()
    return words[0].rstrip(".") or None if words else None


def _last_line(said: str, options: Sequence[str] | None) -> str | None:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), None)


def _boxed(said: str, options: Sequence[str] | None) -> str | None:
    start = said.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for place in range(begin, len(said)):
        depth += {"{": 1, "}": -1}.get(said[place], 0)
        if depth == 0:
            return said[begin:place].strip()
    return None


def _letter(said: str, options: Sequence[str] | None) -> str | None:
    known = LETTERS if options is None else LETTERS[: len(options)]
    stated = [match[1] for match in _SAID.finditer(said) if match[1] in known]
    if stated:
        return stated[-1]
    boxed = _boxed(said, None)
    if boxed is not None and (inside := _letter_alone(TEXT_COMMAND.sub(r"\1", boxed), known, options)):
        return inside
    if (leading := _LEADING.match(said)) and (letter := leading[1] or leading[2]) in known:
        return letter
    return _letter_alone(said, known, options)


def _letter_alone(said: str, known: str, options: Sequence[str] | None) -> str | None:
    """The letter of a text that is nothing but a letter, or an option."""
    for letter, option in zip(LETTERS, options or ()):
        if said.strip() == option.strip() or text(said) == text(option):
            return letter
    match = _LETTER_ALONE.fullmatch(said.strip())
    return match[1].upper() if match and match[1].upper() in known else None


def _number(said: str, options: Sequence[str] | None) -> str | None:
    found = NUMBER.findall(said)
    return found[-1] if found else None


def _last_numbers(count: int) -> Rule:
    def rule(said: str, options: Sequence[str] | None) -> str | None:
        values = numbers_in(said)
        return " ".join(f"{value:.12g}" for value in values[-count:]) if len(values) >= count else None

    return rule


def _after(mark: str) -> Rule:
    def rule(said: str, options: Sequence[str] | None) -> str | None:
        _, found, rest = said.rpartition(mark)
        return rest.strip() if found else None

    return rule


RULES: dict[str, Rule] = {
    "whole": _whole, "first_word": _first_word, "last_line": _last_line, "boxed": _boxed, "letter": _letter,
    "number": _number, "segment": _last_numbers(NUMBERS["segment"]), "box": _last_numbers(NUMBERS["box"]),
}  # fmt: skip


def open_rule(name: str) -> Rule:
    """The rule of this name, or ``after: STRING``; ValueError for an unknown one."""
    word, colon, rest = name.partition(":")
    if word.strip() == "after" and colon:
        if not rest.strip():
            raise ValueError("rule = 'after:' names no text; write after: Answer:")
        return _after(rest.strip())
    if name not in RULES:
        raise ValueError(f"rule = {name!r} is unknown; {nearest(name, [*RULES, 'after: STRING'])}")
    return RULES[name]
