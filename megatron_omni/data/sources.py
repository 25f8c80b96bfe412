"""A source: records by index, with media confined to the source's directory.

``JsonlSource`` scans its file once for line ranges (24 bytes a row in memory) and reads one row by position at a time,
so random access needs neither the rows in memory nor a sequential pass. ``Source`` is the seam for other stores.
"""

import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omni.config.data import SourceConfig
from megatron_omni.data.record import Record, RecordError, parse_record

_SCAN_BYTES = 1 << 24
_SHORTEST_ROW = 40
"""Bytes; no record is shorter, so only lines below this are read to see whether they are blank."""


class Source(Protocol):
    """Random access to the records of one mixture component."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record; RecordError when the row cannot be used."""
        ...

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        ...


class JsonlSource:
    """One JSONL file of records. Media paths in it are relative to the file's directory and may not leave it."""

    def __init__(self, path: str | Path, *, name: str) -> None:
        self.name = name
        self.path = Path(path)
        self.root = self.path.parent
        if not self.path.is_file():
            raise ValueError(
                f"data source {name!r}: path = {str(path)!r} is no file (working directory {os.getcwd()}); "
                "give a JSONL file"
            )
        self._ranges, self._lines = _scan(self.path)
        if not len(self._lines):
            raise ValueError(f"data source {name!r}: path = {str(path)!r} holds no rows; give a file with records")
        self._file = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        """File and line number of a row."""
        return f"{self.path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"data source {self.name!r} has {len(self)} rows, asked for row {index}")
        start, end = self._ranges[index].tolist()
        line = os.pread(self._file, end - start, start)  # no shared file position: safe from several threads
        where = self.where(index)
        try:
            row = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise RecordError(
                where, field="row", value=line[:60], problem=f"is no JSON ({error})",
                fix="write one JSON object per line", reason="not_json",
            ) from error  # fmt: skip
        record = parse_record(row, where=where, source=self.name)
        return confine(record, self.root)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


def _scan(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[rows, 2] byte range and [rows] 1-based line number of every line that is not blank."""
    newlines, offset = [], 0
    with path.open("rb") as file:
        while chunk := file.read(_SCAN_BYTES):
            newlines.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + offset)
            offset += len(chunk)
        ends = np.concatenate([*newlines, [offset]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        keep = ends > starts
        for i in np.flatnonzero(keep & (ends - starts < _SHORTEST_ROW)):
            file.seek(int(starts[i]))
            keep[i] = bool(file.read(int(ends[i] - starts[i])).strip(b" \t\r"))
    return np.stack([starts, ends], axis=1)[keep], np.flatnonzero(keep) + 1


def confine(record: Record, root: Path) -> Record:
    """The same record with media paths under ``root``; RecordError for a path that would leave it."""
    if not (record.images or record.audios or record.videos):
        return record

    def inside(field: str, files: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_inside(root, file, f"{field}[{i}]", record.where) for i, file in enumerate(files))

    return replace(
        record,
        images=inside("images", record.images),
        audios=inside("audios", record.audios),
        videos=inside("videos", record.videos),
    )


def _inside(root: Path, file: str, field: str, where: str) -> str:
    def refuse(problem: str) -> RecordError:
        return RecordError(
            where, field=field, value=file, problem=problem,
            fix=f"put the file under {str(root)!r} and give its path relative to that directory", reason="path_escape",
        )  # fmt: skip

    path = Path(file)
    if "\0" in file:
        raise refuse("holds a zero byte")
    if path.is_absolute():
        raise refuse("is an absolute path")
    if ".." in path.parts:
        raise refuse("climbs out with '..'")
    # Following links is slow and most files of a source share a directory: the directory is followed once, and the
    # file itself only where it is a link.
    full = os.path.join(root, file)
    if not (_leads_inside(str(root), os.path.dirname(full)) and (not os.path.islink(full) or _is_inside(root, full))):
        raise refuse("leads outside the source's directory through a link")
    return full


def _is_inside(root: str | Path, path: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(root).resolve())


_leads_inside = functools.lru_cache(maxsize=65536)(_is_inside)


def open_sources(configs: list[SourceConfig], *, field: str = "data.sources") -> list[Source]:
    """The sources of a recipe, in its order."""
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{field}: name = {name!r} is used {names.count(name)} times; names must differ")
    return [JsonlSource(config.path, name=config.name) for config in configs]
