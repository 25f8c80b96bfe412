"""A source: records by index, with media confined to the source's root, or to its tar.

``JsonlSource`` reads one row of its file by position at a time, so random access needs neither the rows in memory nor a
sequential pass; without an index (index.py) it looks once where the rows lie (text_rows.py; 24 bytes a row in memory).
``TarSource`` reads a WebDataset tar through its index, media in place. ``ShardedSource`` joins several files.
"""

import functools
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omni.config.data import SourceConfig
from megatron_omni.config.shards import shard_paths
from megatron_omni.data.descriptors import DataFile, raise_limit
from megatron_omni.data.drawing import RowAt
from megatron_omni.data.index import Index, index_setting_of, open_index, tokenizer_digest
from megatron_omni.data.record import KINDS, LIST_FIELD, MediaFile, Record, RecordError, parse_record
from megatron_omni.data.sizes import RecordFacts
from megatron_omni.data.spoken import CodesAt
from megatron_omni.data.tar import TarMember
from megatron_omni.data.text_rows import find_rows, is_array
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.foreign import ForeignError, is_exhausted, parse_json

_MOST_NAME = 100
_NAME = re.compile(rf"(?!\.)[^/\\\x00-\x1f\x7f]{{1,{_MOST_NAME}}}")


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

    def flags(self) -> list[NDArray[np.uint8]] | None:
        """[rows] of each file: what a row holds (HAS_ANSWER and HOLDS of index.py); None where a file has no index."""
        ...


class JsonlSource:
    """One JSONL file of records, or a ``.json`` file that holds an array of them.

    Media paths in it are relative to ``root``, by default the file's directory, and may not leave it.
    """

    def __init__(self, path: str | Path, *, name: str, index: Index | None = None, root: str | Path = "") -> None:
        self.name, self.index = name, index
        self.path = Path(path)
        self.root = Path(root) if str(root) else self.path.parent
        if not self.path.is_file():
            raise ValueError(
                f"data source {name!r}: path = {str(path)!r} is no file (working directory {os.getcwd()}); "
                "give a JSONL file"
            )
        self._is_array = is_array(self.path)
        if index is None:
            self._ranges, self._lines = find_rows(self.path)
        else:
            self._lines = index.arrays.records["number"]
        if not len(self._lines):
            raise ValueError(f"data source {name!r}: path = {str(path)!r} holds no rows; give a file with records")
        self._file = DataFile(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        """File and line number of a row; of an array file and item, as ``jq '.[12]'`` counts."""
        number = self._lines[index]
        return f"{self.path}[{number - 1}]" if self._is_array else f"{self.path}:{number}"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"data source {self.name!r} has {len(self)} rows, asked for row {index}")
        where = self.where(index)
        if self.index is None:
            start, end = self._ranges[index].tolist()
            line = self._line(start, end - start, where)
        else:
            start, length, crc = self.index.byte_range(index)
            line = self._line(start, length, where)
            if zlib.crc32(line) != crc:
                raise RecordError(
                    where, field="row", value=line[:60], problem="has changed since the index was made",
                    fix="run megatron-omni prepare again", reason="stale_index",
                )  # fmt: skip
        return parse_line(line, where=where, source=self.name, root=self.root)

    def facts(self, index: int) -> RecordFacts | None:
        """What the index says of a row."""
        return self.index.facts(index, where=self.where) if self.index is not None else None

    def flags(self) -> list[NDArray[np.uint8]] | None:
        """[rows] what a row holds."""
        return [self.index.arrays.records["flags"]] if self.index is not None else None

    def _line(self, start: int, num_bytes: int, where: str) -> bytes:
        try:
            return self._file.read_at(start, num_bytes)
        except (OSError, ForeignError) as error:
            if is_exhausted(error):
                raise
            raise RecordError(
                where, field="row", value=start, problem=f"cannot be read any more ({error})",
                fix="leave the data alone while a run reads it", reason="unreadable_data",
            ) from error  # fmt: skip


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
        if (rejected := record.rejected) is not None and (rejected.images or rejected.audios or rejected.videos):
            raise RecordError(
                record.where, field="rejected_images / rejected_audios / rejected_videos", value=rejected.where,
                problem="media of the rejected side lie in a tar", fix="write pairs whose media differ as JSONL with files",
                reason="bad_pair",
            )  # fmt: skip
        ranges = iter(self.index.media_ranges(index))
        media: dict[str, tuple[MediaFile, ...]] = {
            LIST_FIELD[kind]: tuple(TarMember(str(self.path), str(file), *next(ranges)) for file in record.media(kind))
            for kind in KINDS
        }
        targets = tuple(TarMember(str(self.path), str(file), *next(ranges)) for file in record.targets)
        record = replace(record, **media, targets=targets)  # type: ignore[arg-type]
        return confine_drawing(confine_speech(record, self.path.parent), self.path.parent)

    def facts(self, index: int) -> RecordFacts:
        """What the index says of a sample."""
        return self.index.facts(index, where=self.where)

    def flags(self) -> list[NDArray[np.uint8]]:
        """[rows] what a row holds."""
        return [self.index.arrays.records["flags"]]


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

    def flags(self) -> list[NDArray[np.uint8]] | None:
        """[rows] of each file: what a row holds, None when a file has no index."""
        parts = [shard.flags() for shard in self.shards]
        return [file for part in parts for file in part or ()] if all(part is not None for part in parts) else None


def parse_line(line: bytes, *, where: str, source: str, root: Path) -> Record:
    """The record of a line of a JSONL file whose media lie under ``root``; RecordError for one that cannot be used."""
    try:
        row = parse_json(line, where)
    except ForeignError as error:
        raise RecordError(
            where, field="row", value=line[:60], problem=error.problem,
            fix="write one JSON object per line (a file that holds one array must be named .json)", reason="not_json",
        ) from error  # fmt: skip
    return confine(parse_record(row, where=where, source=source), root)


def confine(record: Record, root: Path) -> Record:
    """The same record with media paths under ``root``; RecordError for a path that would leave it."""
    if record.rejected is not None:
        record = replace(record, rejected=confine(record.rejected, root))
    record = confine_drawing(confine_speech(record, root), root)
    if not (record.images or record.audios or record.videos or record.targets):
        return record

    def inside(field: str, files: tuple[MediaFile, ...]) -> tuple[MediaFile, ...]:
        return tuple(_inside(root, str(file), f"{field}[{i}]", record.where) for i, file in enumerate(files))

    return replace(
        record,
        images=inside("images", record.images),
        audios=inside("audios", record.audios),
        videos=inside("videos", record.videos),
        targets=inside("targets", record.targets),
    )


def confine_speech(record: Record, root: Path) -> Record:
    """The same record with the files of its spoken answers under ``root``; RecordError for a path that would leave it."""
    if not any(message.speech for message in record.messages):
        return record
    messages = list(record.messages)
    for i, message in enumerate(messages):
        if (speech := message.speech) is None:
            continue
        field = f"messages[{i}].speech"
        if speech.file is not None:
            speech = replace(speech, file=_inside(root, speech.file, f"{field}.file", record.where))
        if isinstance(speech.codes, CodesAt):
            codes_file = _inside(root, speech.codes.file, f"{field}.codes", record.where)
            speech = replace(speech, codes=replace(speech.codes, file=codes_file))
        messages[i] = replace(message, speech=speech)
    return replace(record, messages=tuple(messages))


def confine_drawing(record: Record, root: Path) -> Record:
    """The same record with the files of its drawn pictures, but for the targets, under ``root``; RecordError for a path that
    would leave it."""
    drawing = record.drawing
    if drawing is None:
        return record

    def inside(key: str, each: tuple[Mapping[str, RowAt], ...]) -> tuple[Mapping[str, RowAt], ...]:
        return tuple(
            {name: replace(at, file=_inside(root, at.file, f"{key}.{name}", record.where)) for name, at in one.items()}
            for one in each
        )

    damage = drawing.damage
    if damage is not None and damage.file is not None:
        damage = replace(damage, file=_inside(root, damage.file, "degrade.file", record.where))
    drawing = replace(
        drawing,
        damage=damage,
        teachers=inside("teachers", drawing.teachers),
        latents=inside("latents", drawing.latents),
        hidden=inside("hidden", drawing.hidden),
    )
    return replace(record, drawing=drawing)


def _inside(root: Path, file: str, field: str, where: str) -> str:
    """The path of a medium. What a row says must name a place under the root.

    A link that lies there is followed wherever it leads: it was put there by whoever laid out these files (model and
    data caches consist of links, folders of pictures are links to larger disks), not by a row.
    """

    def refuse(problem: str) -> RecordError:
        return RecordError(
            where, field=field, value=file, problem=problem,
            fix=f"give a path under {str(root)!r}, or name another folder as the source's root", reason="path_escape",
        )  # fmt: skip

    if "\0" in file:
        raise refuse("holds a zero byte")
    path = Path(file)
    if ".." in path.parts:
        raise refuse("climbs out with '..'")
    if path.is_absolute() and not any(path.is_relative_to(place) for place in _places(root)):
        raise refuse("is an absolute path outside the source's root")
    return os.path.join(root, file)


@functools.lru_cache(maxsize=1024)
def _places(root: Path) -> tuple[str, str]:
    """A folder as it is called, and where it is."""
    return os.path.abspath(root), os.path.realpath(root)


def open_sources(
    configs: list[SourceConfig], *, tokenizer: Tokenizer | None = None, field: str = "data.sources"
) -> list[Source]:
    """The sources of a recipe, in its order, with the indexes made for ``tokenizer`` (without one, none is used)."""
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{field}: name = {name!r} is used {names.count(name)} times; names must differ")
    raise_limit()
    digest = tokenizer_digest(tokenizer.path) if tokenizer is not None else ""
    return [open_source(config, digest=digest) for config in configs]


def index_settings(config: SourceConfig) -> dict[str, str]:
    """What an index depends on beside the data and the tokenizer."""
    return {"prompt": config.prompt, "root": config.root}


def check_name(config: SourceConfig) -> None:
    """ValueError for a name that is a path: files and metrics are called after it."""
    if not _NAME.fullmatch(config.name):
        raise ValueError(
            f"data source name = {config.name!r}: give a name and no path: 1 to {_MOST_NAME} characters without slashes, "
            "not starting with a dot"
        )


def check_shared(file: Path, one: SourceConfig, other: SourceConfig) -> None:
    """ValueError for a file of two sources that would need two indexes."""
    setting = index_setting_of(file)
    mine, theirs = index_settings(one)[setting], index_settings(other)[setting]
    if mine != theirs:
        raise ValueError(
            f"{str(file)!r} is in two sources, {one.name!r} with {setting} = {mine!r} and {other.name!r} with {theirs!r}, and "
            f"has one index; give both the same {setting}, or the second a copy (or a link) of the file"
        )


def open_source(config: SourceConfig, *, digest: str) -> Source:
    """One source, with the indexes made for the tokenizer of this digest ("": none is used)."""
    check_name(config)
    root = config.root
    if root and not Path(root).is_dir():
        raise ValueError(
            f"data source {config.name!r}: root = {root!r} is no folder; name the folder that its media lie under"
        )
    try:
        files = shard_paths(config.path)
        indexes = [open_index(file, tokenizer=digest, **index_settings(config)) if digest else None for file in files]
    except ValueError as error:
        raise ValueError(f"data source {config.name!r}: path = {config.path!r}: {error}") from error
    shards: list[JsonlSource | TarSource] = []
    for file, index in zip(files, indexes):
        if file.suffix != ".tar":
            shards.append(JsonlSource(file, name=config.name, index=index, root=root))
        elif index is not None:
            shards.append(TarSource(file, name=config.name, index=index))
        else:
            raise ValueError(f"data source {config.name!r}: {str(file)!r} has no index; run megatron-omni prepare")
    return shards[0] if len(shards) == 1 else ShardedSource(config.name, shards)
