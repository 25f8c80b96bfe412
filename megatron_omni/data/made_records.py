"""A JSONL file of records that is made of something else: whole or not at all, and what could not be used is counted."""

import filecmp
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from megatron_omni.data.record import RecordError, internal_error

MOST_MESSAGES = 20


@dataclass
class MadeRecords:
    """What became of the things that records were to be made of."""

    path: Path
    """The JSONL file that was written."""
    kept: Path | None = None
    """Where the file went that was there before, if it said anything else: somebody's work, perhaps."""
    num_records: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    """Why some were left out, the first of them."""

    def _leave_out(self, where: str, error: Exception) -> None:
        bad = error if isinstance(error, RecordError) else internal_error(where, error)
        self.rejected[bad.reason] += 1
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(str(bad))


def make_records(path: Path, rows: Iterable[tuple[str, Callable[[], dict[str, Any]]]], *, nothing: str) -> MadeRecords:
    """Write the ``rows`` to ``path``: each a place, and what makes the row or raises a RecordError.

    Another file of that name is kept under the next free one (``records.jsonl.1``). ValueError that begins with ``nothing``
    where no row could be made.
    """
    made = MadeRecords(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for where, row in rows:
                try:
                    line = json.dumps(row(), ensure_ascii=False) + "\n"
                except Exception as error:
                    made._leave_out(where, error)
                    continue
                out.write(line)
                made.num_records += 1
        if not made.num_records:
            raise ValueError(nothing + (f"; the first: {made.messages[0]}" if made.messages else ""))
        if path.exists() and not filecmp.cmp(partial, path, shallow=False):
            numbered = (path.with_name(f"{path.name}.{number}") for number in count(1))
            made.kept = next(other for other in numbered if not os.path.lexists(other))
            os.rename(path, made.kept)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return made
