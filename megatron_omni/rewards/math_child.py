"""A child process of the reward ``accuracy``: reads lines of JSON, compares two expressions, writes a line for each.

    in   {"gold": ["\\\\frac{1}{2}"], "answer": "0.5", "seconds": 10}        out   {"value": 1.0}

The value is None where no gold text is an expression. math-verify runs in the main thread of a process of its own because
it works with signals, and without its own time limit: it tries many ways, each of which would have the limit anew. A
comparison that does not end (``9^{9^{9^9}}``) is ended from outside; should the parent be gone, an alarm, for which there
is no handler, ends the process.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

from megatron_omni.foreign import parse_json

MOST_BYTES = 4 << 30
"""Of address space: a power of powers must not take the machine's memory."""
ALARM_AFTER = 5
"""Seconds later than the parent would have ended this process."""
_DELIMITERS = ("$", "\\(", "\\[", "\\boxed")
_COMMAND = re.compile(r"\\[A-Za-z]+|\b(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b")
_WORD = re.compile(r"[^\W\d_]{2}")


def main() -> None:
    """Until the input ends. The first line out says that the imports are done."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    sys.set_int_max_str_digits(100_000)
    out = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    value(["$1$"], "1")  # the first comparison costs half a second
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = parse_json(line, "math-verify's input")
        signal.alarm(int(asked["seconds"]) + ALARM_AFTER)
        print(json.dumps({"value": value(asked["gold"], asked["answer"])}), file=out, flush=True)
        signal.alarm(0)


def value(gold: Sequence[str], answer: str) -> float | None:
    """1 where the answer is one of ``gold``, else 0; None where no gold text parses."""
    known = [found for text in gold if (found := _parsed(text))]
    if not known:
        return None
    from math_verify import verify

    given = _parsed(answer)
    return float(any(_attempt(verify, right, given) for right in known)) if given else 0.0


def _parsed(text: str) -> list[Any]:
    """What math-verify reads in a text: marked formulas and numbers. A text that is nothing but a formula, as the inside of
    a box is, is marked first; a sentence would be read as a product of its letters."""
    from math_verify import parse

    is_marked = any(mark in text for mark in _DELIMITERS)
    is_formula = not is_marked and not _WORD.search(_COMMAND.sub(" ", text))
    marked = [f"${text}$", text] if is_formula else [text]
    return next((found for one in marked if (found := _attempt(parse, one))), [])


def _attempt(function: Any, *arguments: Any) -> Any:
    limit = "parsing_timeout" if function.__name__ == "parse" else "timeout_seconds"
    try:
        return function(*arguments, **{limit: None})
    except Exception:  # sympy raises all kinds, of memory and recursion too: no comparison, no reward
        return []


if __name__ == "__main__":
    main()
