"""Ranges beside the fields: ``lr: float = number(1e-5, above=0)`` is a field that ``validate`` checks and docs/config.md shows.

Every number of a recipe has a range (tests/unit/test_config.py). Without ``at_most`` or ``below`` it ends at ``MOST``, so that a
slip of some zeros is an error at the start and not an overflow in a kernel.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MOST = 10**12
RANGE, FILE_PATH = "range", "file path"
"""Keys of a field's metadata."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """From ``at_least`` or ``above`` to ``at_most`` or ``below``; ``fix`` says what to write instead."""

    at_least: float | None = None
    above: float | None = None
    at_most: float = MOST
    below: float | None = None
    fix: str = ""

    def __contains__(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (value < self.below if self.below is not None else value <= self.at_most)
        )

    def __str__(self) -> str:
        low = f"at least {self.at_least:,}" if self.at_least is not None else f"above {self.above:,}"
        if self.below is not None:
            return f"{low} and below {self.below:,}"
        return low if self.at_most == MOST else f"{low} and at most {self.at_most:,}"


def number(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = MOST,
    below: float | None = None,
    fix: str = "",
) -> Any:
    """A dataclass field with a range. ``default``: its value, or what makes a list or mapping whose every number has it."""
    assert (at_least is None) != (above is None), "a range starts somewhere"
    metadata = {RANGE: Range(at_least=at_least, above=above, at_most=at_most, below=below, fix=fix)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def file_path(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that holds a path: ``~`` is expanded when a recipe is read, ``$`` is refused (load.py)."""
    return dataclasses.field(default=default, metadata={FILE_PATH: True})


def out_of_range(config: object) -> Iterator[str]:
    """What is wrong with the numbers of ``config``, one sentence each: not finite, or outside the range of their field."""
    for name, value, allowed in _numbers(config, "", None):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}={value}: must be a finite number"
        elif allowed is not None and value not in allowed:
            yield f"{name}={short(value)}: must be {allowed}{allowed.fix and '; ' + allowed.fix}"


def short(value: object, most: int = 60) -> str:
    """``value`` for a message; of a long one, the start."""
    try:
        text = str(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[:most]}..."


def _numbers(value: object, name: str, allowed: Range | None) -> Iterator[tuple[str, float, Range | None]]:
    """(dotted name, value, range) of every number in a tree; items of a list go by their name, as in overrides."""

    def inside(key: object) -> str:
        return f"{name}.{key}" if name else str(key)

    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield name, value, allowed
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from _numbers(getattr(value, item.name), inside(item.name), item.metadata.get(RANGE))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(key, inside(key), allowed)
            yield from _numbers(inner, inside(key), allowed)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _numbers(inner, inside(getattr(inner, "name", place)), allowed)
