"""Where the rows of a text file lie: the lines of a JSONL file, or the items of a ``.json`` file that holds one array.

A row is a byte range, so it is read in place and neither kind is ever in memory as a whole. The commas between items
are found by brackets and quotes alone: an item that is no record costs itself, as a bad line does.
"""

import mmap
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_omni.foreign import open_regular

_BLANK = b" \t\r\n\xef\xbb\xbf"
"""A byte order mark counts: the first line of a file may hold nothing else."""
_SHORTEST_ROW = 40
"""Bytes; no record is shorter, so only rows below this are looked at to see whether they are blank."""
_SCAN_BYTES = 1 << 24
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\Z)'
# A string without an end runs to the end of the file, so that no text costs more than its length.


def _brackets(levels: int) -> bytes:
    """What stands in brackets at most this many levels deep."""
    inside = _STRING if levels == 1 else _STRING + rb"|" + _brackets(levels - 1)
    return rb'[\[{][^][{}"]*+(?:(?:' + inside + rb')[^][{}"]*+)*+[\]}]'


_TOKEN = re.compile(_brackets(4) + rb"|" + _STRING + rb"|[\]\[{},]", re.DOTALL)
"""Records are at most four levels deep, so most items are one match."""


def is_array(path: Path) -> bool:
    """Whether a file is read as one JSON array: it is named ``.json``, and starts so."""
    if path.suffix != ".json":
        return False
    with open_regular(path) as file:
        return file.read(4096).lstrip(_BLANK)[:1] == b"["


def is_blank(row: bytes) -> bool:
    """Whether a row holds nothing."""
    return len(row) < _SHORTEST_ROW and not row.strip(_BLANK)


def find_rows(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[rows, 2] byte range and [rows] number, from 1, of every row that is not blank."""
    ranges = np.array([*_items(path, 0)], np.int64).reshape(-1, 2) if is_array(path) else _lines(path)
    keep = ranges[:, 1] > ranges[:, 0]
    with open_regular(path) as file:
        for i in np.flatnonzero(keep & (ranges[:, 1] - ranges[:, 0] < _SHORTEST_ROW)):
            file.seek(int(ranges[i, 0]))
            keep[i] = not is_blank(file.read(int(ranges[i, 1] - ranges[i, 0])))
    return ranges[keep], np.flatnonzero(keep) + 1


def cut(path: Path, num_bytes: int) -> list[tuple[int, int]]:
    """Stretches of a file for ``rows_between``, each of at least about ``num_bytes``; no bytes are left out."""
    size = path.stat().st_size
    if is_array(path):
        bounds = [0]
        for start, _ in _items(path, 0):
            if start >= bounds[-1] + num_bytes:
                bounds.append(start)
    else:
        bounds = [*range(0, max(size, 1), max(num_bytes, 1))]
    return [*pairwise([*bounds, size])]


def rows_between(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of the rows that start in a stretch, blank ones too."""
    with open_regular(path) as file:
        if is_array(path):
            for place, end in _items(path, start):
                if place >= stop:
                    break
                file.seek(place)
                yield place, file.read(end - place)
            return
        file.seek(max(start - 1, 0))
        if start:
            file.readline()  # the end of a row of the stretch before
        while (place := file.tell()) < stop and (line := file.readline()):
            yield place, line.removesuffix(b"\n")


def _lines(path: Path) -> NDArray[np.int64]:
    newlines, offset = [], 0
    with open_regular(path) as file:
        while chunk := file.read(_SCAN_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
    ends = np.concatenate([*newlines, [offset]]).astype(np.int64)
    return np.stack([np.concatenate([[0], ends[:-1] + 1]), ends], axis=1)


def _items(path: Path, start: int) -> Iterator[tuple[int, int]]:
    """Byte ranges between the commas of an array, from the item that starts at ``start``, or from the first one.

    ValueError for an array that does not end, or with text behind its end.
    """
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = start or data.find(b"[") + 1
        depth = 0
        for token in _TOKEN.finditer(data, start):
            found = token[0]
            if found in (b"{", b"["):
                depth += 1
            elif depth and found in (b"}", b"]"):
                depth -= 1
            elif not depth and found in (b",", b"]"):
                yield start, token.start()
                start = token.end()
                if found == b"]":
                    if rest := data[start:].strip(_BLANK):
                        raise ValueError(f"{path}: behind its array stands {rest[:40]!r}; keep one array a file")
                    return
        raise ValueError(
            f"{path}: the item at byte {start} has no end: a quote or a bracket is missing, or the file is cut off"
        )
