"""Whether the thought comes to the answer: a rule that reads no solution (a judge can say the same, judge.py)."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_omni.config.thinking import THINK_END
from megatron_omni.rewards.answer import Value, Values, answer_text

_SHORT = 40
"""Characters of an answer that can be looked for in a thought."""
_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def consistency(*, completions: Sequence[str], **_: Any) -> Values:
    """1 where the thought's last line holds the answer, 0 where it does not.

    Of an answer that is a text, its last number is compared with the thought's last; None where one of them has none, and
    where there is no thought or no answer.
    """
    return [_concludes(completion) for completion in completions]


def _concludes(completion: str) -> Value:
    thought = completion.rpartition(THINK_END)[0].rstrip()
    answer = answer_text(completion)
    if not thought or not answer:
        return None
    end = thought.splitlines()[-1]
    if len(answer) <= _SHORT:
        said, line = (" ".join(text.casefold().split()) for text in (answer.strip(" .,!?:;*"), end))
        before, after = (r"(?<!\w)", r"(?!\w)") if said.isascii() else ("", "")
        if _NUMBER.fullmatch(said):
            before, after = r"(?<![\w.,-])", r"(?!\w|[.,]\d)"
        return float(re.search(f"{before}{re.escape(said)}{after}", line) is not None)
    concluded, solved = (_NUMBER.findall(text) for text in (end, answer))
    return float(concluded[-1] == solved[-1]) if concluded and solved else None
