"""The one reader of text that others wrote: JSON rows, configurations, captions, headers.

Python's own reader ends in different ways: ValueError (no JSON, a number of 5000 digits), RecursionError (nested too
deep), MemoryError, UnicodeDecodeError; it lets half a surrogate pair through, which fails later, in a tokenizer or at a
write; and ``open`` waits for ever at a pipe and reads ``/dev/zero`` until memory ends. Here all of these are one
``ForeignError`` that says where. A byte order mark (Windows programs write one) is dropped.

Nothing else in the package or in tools/ calls ``json.load`` or ``json.loads`` (``tests/unit/test_foreign.py``).
"""

import codecs
import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 1 << 27
"""Of a file that is read whole; the largest that people have, a tokenizer.json or the index of a checkpoint, are below."""
_HALF_PAIR = re.compile(r"\\u[dD][89abcdefABCDEF]")
"""An escape of one half of a surrogate pair; without one, text that was UTF-8 cannot hold a half."""


class ForeignError(ValueError):
    """Text that cannot be read: ``where`` it stands and the ``problem`` with it."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem


def open_regular(path: str | Path) -> BinaryIO:
    """An ordinary file to read from; ForeignError for a pipe, a device, a socket or a folder, and what cannot be opened.

    O_NONBLOCK: a pipe that nobody writes to would hold the caller for ever. It means nothing for ordinary files.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ForeignError(str(path), f"cannot be read: {_said(error)}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ForeignError(str(path), "no ordinary file (a folder, a pipe or a device)")
    return os.fdopen(file, "rb")


def read_bytes(path: str | Path, *, most_bytes: int = MOST_BYTES) -> bytes:
    """All of an ordinary file; ForeignError for one that holds more than ``most_bytes``."""
    with open_regular(path) as file:
        try:
            data = file.read(most_bytes + 1)
        except OSError as error:
            raise ForeignError(str(path), f"cannot be read: {_said(error)}") from error
    if len(data) > most_bytes:
        raise ForeignError(str(path), f"larger than {most_bytes} bytes, the most that is read of such a file")
    return data


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForeignError(where, f"not UTF-8 text: {error}") from error


def read_text(path: str | Path, *, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file."""
    return decode_text(read_bytes(path, most_bytes=most_bytes), str(path))


def parse_json(text: bytes | str, where: str) -> Any:
    """The value that JSON ``text`` stands for."""
    if isinstance(text, bytes):
        text = decode_text(text, where)
    try:
        text.encode("utf-8")
        value = json.loads(text, object_pairs_hook=_once)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ForeignError(where, "holds half of a surrogate pair; write valid Unicode") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ForeignError(where, f"not valid JSON: {_said(error)}") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key that is there twice, of which Python would take the last one silently."""
    value = dict(pairs)
    if len(value) < len(pairs):
        double = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {double[:80]!r} is there twice in one object; keep one")
    return value


def read_json(path: str | Path, *, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a JSON file."""
    return parse_json(read_bytes(path, most_bytes=most_bytes), str(path))


def printable(text: str) -> str:
    """The same with ``\\udce9`` for what is no Unicode (file names of other systems), so that it can be written."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_exhausted(error: BaseException | None) -> bool:
    """Whether the process or the machine has no file descriptor left: never the fault of what was to be opened."""
    if isinstance(error, ForeignError):
        error = error.__cause__
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _said(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) else str(error)
    return (said or type(error).__name__) + ("; allow more of them (ulimit -n 65536)" if is_exhausted(error) else "")
