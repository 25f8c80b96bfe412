"""Rows that cannot be used: the error that says so, and what is made of a fault that nobody foresaw."""

import logging
import re
import reprlib
import traceback

from megatron_omni.foreign import is_exhausted, printable

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SHOWN_CHARACTERS = 80
_shown = reprlib.Repr(maxlevel=4, maxlist=40, maxdict=20, maxstring=400, maxother=400, maxlong=90)
"""Short whatever the value holds: a row may be megabytes long, or nested to the limit of the interpreter."""


class RecordError(ValueError):
    """A row that cannot be used; the message names where, which field, what it holds and what to do."""

    def __init__(self, where: str, *, field: str, value: object, problem: str, fix: str, reason: str) -> None:
        shown = _shown.repr(value)
        if len(shown) > _SHOWN_CHARACTERS:
            shown = shown[:_SHOWN_CHARACTERS] + "..."
        said = f"{where}: {field} = {shown}: {problem}; {fix}" if where else f"{field} = {shown}: {problem}; {fix}"
        super().__init__(printable(said))
        self.where, self.field, self.value, self.reason = where, field, value, reason


class RecipeError(ValueError):
    """What a record shows to be wrong with the recipe: it ends the run, since all records like it would be skipped."""


_told: set[tuple[str, int | None]] = set()


def internal_error(where: str, error: Exception) -> RecordError:
    """The skip for what a record raised and nobody foresaw: one record never ends a run.

    The traceback is logged, once for each place in the code. What is no record's fault is raised again: a process that
    has no file descriptor or no memory left, or a recipe that does not fit the data, would skip all that follows.
    """
    if is_exhausted(error) or isinstance(error, MemoryError | RecipeError):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    place = (frames[-1].filename, frames[-1].lineno) if frames else ("", None)
    if place not in _told:
        _told.add(place)
        logger.error("%s: left out; please report this with the traceback", printable(where), exc_info=error)
    said = _ADDRESS.sub("", f"{type(error).__name__}: {error}")
    return RecordError(
        where, field="error", value=said, problem="is a fault of the program", fix="report it with the traceback in the log",
        reason="internal_error",
    )  # fmt: skip


def encodable(text: str) -> bool:
    """Whether it can be written as UTF-8: half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
"""How the name of a medium begins that is no file."""
