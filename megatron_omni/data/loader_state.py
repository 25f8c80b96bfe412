"""The data state of a run, made of the states of its loaders."""

from collections import Counter
from collections.abc import Sequence
from typing import Any


def joined_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of a run from those of its data ranks, in order: what each found while decoding is added up."""
    skips: Counter[tuple[str, str]] = Counter()
    for state in states:
        skips.update({(source, reason): number for source, reason, number in state["skips"]["decoded"]})
    first = states[0]
    return first | {
        "skips": first["skips"] | {"decoded": [[*key, number] for key, number in skips.items()]},
        "tried": first["tried"] | {"decoded": sum(state["tried"]["decoded"] for state in states)},
    }
