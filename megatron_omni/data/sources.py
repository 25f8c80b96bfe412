"""A source: records by index, with media confined to the source's directory, or to its tar.

``JsonlSource`` reads one row of its file by position at a time, so random access needs neither the rows in memory nor a
sequential pass; without an index (index.py) it scans the file once for line ranges (24 bytes a row in memory).
``TarSource`` reads a WebDataset tar through its index, media in place. ``ShardedSource`` joins several files.
"""

import functools
import os
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omni.config.data import SourceConfig
from megatron_omni.config.shards import shard_paths
from megatron_omni.data.index import Index, open_index, tokenizer_digest
from megatron_omni.data.record import KINDS, LIST_FIELD, MediaFile, Record, RecordError, parse_record
from megatron_omni.data.sizes import RecordFacts
from megatron_omni.data.tar import TarMember
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.foreign import ForeignError, parse_json

_SCAN_BYTES = 1 << 24
SHORTEST_ROW = 40
"""Bytes; no record is shorter, so only lines below this are read to see whether they are blank."""


class Source(Protocol):
    """Random access to the records of one mixture component."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """The record; RecordError when the row cannot be used."""
        ...

    def where(self, index: int) -> str:
        """File and line or key of a row, for messages."""
        ...

    def facts(self, index: int) -> RecordFacts | None:
        """What the index says of a row, None without an index; RecordError for a row that cannot be used."""
        ...

    def holds(self) -> NDArray[np.uint8] | None:
        """[rows] kinds of media (bits of index.HOLDS), None without an index."""
        ...


class JsonlSource:
    """One JSONL file of records. Media paths in it are relative to the file's directory and may not leave it."""

    def __init__(self, path: str | Path, *, name: str, index: Index | None = None) -> None:
        self.name, self.index = name, index
        self.path = Path(path)
        self.root = self.path.parent
        if not self.path.is_file():
            raise ValueError(
                f"data source {name!r}: path = {str(path)!r} is no file (working directory {os.getcwd()}); "
                "give a JSONL file"
            )
        if index is None:
            self._ranges, self._lines = _scan(self.path)
        else:
            self._lines = index.arrays.records["number"]
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
        where = self.where(index)
        if self.index is None:
            start, end = self._ranges[index].tolist()
            line = os.pread(self._file, end - start, start)  # no shared file position: safe from several threads
        else:
            start, length, crc = self.index.byte_range(index)
            line = os.pread(self._file, length, start)
            if zlib.crc32(line) != crc:
                raise RecordError(
                    where, field="row", value=line[:60], problem="has changed since the index was made",
                    fix="run tools/prepare_data.py again", reason="stale_index",
                )  # fmt: skip
        return parse_line(line, where=where, source=self.name, root=self.root)

    def facts(self, index: int) -> RecordFacts | None:
        """What the index says of a row."""
        return self.index.facts(index, where=self.where) if self.index is not None else None

    def holds(self) -> NDArray[np.uint8] | None:
        """[rows] kinds of media."""
        return self.index.arrays.records["flags"] if self.index is not None else None

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


class TarSource:
    """One WebDataset tar, read through its index. Media are byte ranges of the tar and nothing else."""

    def __init__(self, path: str | Path, *, name: str, index: Index) -> None:
        self.name, self.path, self.index = name, Path(path), index
        if not len(index):
            raise ValueError(f"data source {name!r}: path = {str(path)!r} holds no samples; give a tar with members")

    def __len__(self) -> int:
        return len(self.index)

    def where(self, index: int) -> str:
        """Tar and key of a sample."""
        return f"{self.path}:{self.index.stored_row(index)['id']}"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"data source {self.name!r} has {len(self)} rows, asked for row {index}")
        self.facts(index)
        record = parse_record(self.index.stored_row(index), where=self.where(index), source=self.name)
        ranges = iter(self.index.media_ranges(index))
        media: dict[str, tuple[MediaFile, ...]] = {
            LIST_FIELD[kind]: tuple(TarMember(str(self.path), str(file), *next(ranges)) for file in record.media(kind))
            for kind in KINDS
        }
        return replace(record, **media)  # type: ignore[arg-type]

    def facts(self, index: int) -> RecordFacts:
        """What the index says of a sample."""
        return self.index.facts(index, where=self.where)

    def holds(self) -> NDArray[np.uint8]:
        """[rows] kinds of media."""
        return self.index.arrays.records["flags"]


class ShardedSource:
    """Several files as one source, their rows one after the other."""

    def __init__(self, name: str, shards: Sequence[JsonlSource | TarSource]) -> None:
        self.name, self.shards = name, list(shards)
        self._ends = list(accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[JsonlSource | TarSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"data source {self.name!r} has {len(self)} rows, asked for row {index}")
        number = bisect_right(self._ends, index)
        return self.shards[number], index - (self._ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Record:
        shard, row = self._locate(index)
        return shard[row]

    def where(self, index: int) -> str:
        """File and line or key of a row."""
        shard, row = self._locate(index)
        return shard.where(row)

    def facts(self, index: int) -> RecordFacts | None:
        """What the index of its file says of a row."""
        shard, row = self._locate(index)
        return shard.facts(row)

    def holds(self) -> NDArray[np.uint8] | None:
        """[rows] kinds of media, None when a file has no index."""
        parts = [shard.holds() for shard in self.shards]
        found = [part for part in parts if part is not None]
        return np.concatenate(found) if len(found) == len(parts) else None


def parse_line(line: bytes, *, where: str, source: str, root: Path) -> Record:
    """The record of a line of a JSONL file whose media lie under ``root``; RecordError for one that cannot be used."""
    try:
        row = parse_json(line, where)
    except ForeignError as error:
        raise RecordError(
            where, field="row", value=line[:60], problem=error.problem,
            fix="write one JSON object per line", reason="not_json",
        ) from error  # fmt: skip
    return confine(parse_record(row, where=where, source=source), root)


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
        for i in np.flatnonzero(keep & (ends - starts < SHORTEST_ROW)):
            file.seek(int(starts[i]))
            keep[i] = bool(file.read(int(ends[i] - starts[i])).strip(b" \t\r"))
    return np.stack([starts, ends], axis=1)[keep], np.flatnonzero(keep) + 1


def confine(record: Record, root: Path) -> Record:
    """The same record with media paths under ``root``; RecordError for a path that would leave it."""
    if not (record.images or record.audios or record.videos):
        return record

    def inside(field: str, files: tuple[MediaFile, ...]) -> tuple[MediaFile, ...]:
        return tuple(_inside(root, str(file), f"{field}[{i}]", record.where) for i, file in enumerate(files))

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


def open_sources(
    configs: list[SourceConfig], *, tokenizer: Tokenizer | None = None, field: str = "data.sources"
) -> list[Source]:
    """The sources of a recipe, in its order, with the indexes made for ``tokenizer`` (without one, none is used)."""
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{field}: name = {name!r} is used {names.count(name)} times; names must differ")
    digest = tokenizer_digest(tokenizer.path) if tokenizer is not None else ""
    return [open_source(config, digest=digest) for config in configs]


def open_source(config: SourceConfig, *, digest: str) -> Source:
    """One source, with the indexes made for the tokenizer of this digest ("": none is used)."""
    try:
        files = shard_paths(config.path)
        indexes = [open_index(file, tokenizer=digest, prompt=config.prompt) if digest else None for file in files]
    except ValueError as error:
        raise ValueError(f"data source {config.name!r}: path = {config.path!r}: {error}") from error
    shards: list[JsonlSource | TarSource] = []
    for file, index in zip(files, indexes):
        if file.suffix != ".tar":
            shards.append(JsonlSource(file, name=config.name, index=index))
        elif index is not None:
            shards.append(TarSource(file, name=config.name, index=index))
        else:
            raise ValueError(f"data source {config.name!r}: {str(file)!r} has no index; run tools/prepare_data.py")
    return shards[0] if len(shards) == 1 else ShardedSource(config.name, shards)
