"""Make indexes (index.py): every row of a JSONL file or tar is parsed, its text tokenized, its media headers read.

The work is cut into units: a stretch of a JSONL file, a whole tar. Processes share the units; each unit's result is put
into ``DATA.index.parts`` when it is whole, so an interrupted preparation goes on where it was, and the parts become
``DATA.index`` when the last one is there. Nothing depends on the number of processes. A row that cannot be used is part
of the index with its reason; it never ends the preparation.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omni.data import assemble
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.index import (
    ARRAYS,
    HAS_ANSWER,
    HAS_SYSTEM,
    HOLDS,
    MEDIA,
    RECORD,
    SPEECH,
    TARGET,
    VERSION,
    Fingerprint,
    IndexArrays,
    index_path,
    open_index,
    tokenizer_digest,
    write_index,
)
from megatron_omni.data.record import KINDS, LIST_FIELD, Record, RecordError, internal_error, parse_record
from megatron_omni.data.sizes import RecordFacts, measure
from megatron_omni.data.sources import parse_line
from megatron_omni.data.tar import TarMember, TarSample, tar_samples
from megatron_omni.data.text_rows import cut, is_blank, rows_between
from megatron_omni.data.tokenizer import Tokenizer, load_tokenizer
from megatron_omni.foreign import ForeignError, decode_text, parse_json, printable

_UNIT_BYTES, _MOST_UNITS = 1 << 18, 4096
"""A unit of a JSONL file, and how many of them at most."""
_TEXT_BYTES = 1 << 24
"""Largest caption or metadata file inside a tar."""


@dataclass(frozen=True)
class _Unit:
    """A part of the work: the rows that start in this stretch of a JSONL file, or all of a tar."""

    data: Path
    start: int
    stop: int
    part: Path
    tokenizer: Path
    prompt: str
    root: str


def index_files(
    files: Sequence[Path],
    tokenizer: str | Path,
    *,
    prompt: str = "",
    root: str = "",
    workers: int = 1,
    again: bool = False,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Bring the index of each of ``files`` up to date with ``workers`` processes.

    An index that is current is left alone, unless ``again``. ``prompt`` is asked of a tar's media that come with a
    caption alone; media of other files lie under ``root``, by default beside them; ``advance`` is told the bytes of data
    that were done. ValueError for a file that is no data, ChildProcessError when a process was killed; what was done
    stays.
    """
    digest, units, waiting = tokenizer_digest(tokenizer), dict[Path, list[_Unit]](), dict[Path, int]()
    fingerprints = {}
    for data in files:
        if again:
            index_path(data).unlink(missing_ok=True)
        elif _is_current(data, digest, prompt, root):
            advance(os.path.getsize(data))
            continue
        fingerprints[data] = Fingerprint.of(data)
        key = f"{VERSION} {fingerprints[data]} {digest} {prompt} {root}"
        units[data] = _units(data, Path(tokenizer), prompt, root, key=key)
        waiting[data] = len(units[data])
    for unit in _worked([unit for parts in units.values() for unit in parts], workers):
        advance(unit.stop - unit.start)
        waiting[unit.data] -= 1
        if not waiting[unit.data]:
            data = unit.data
            parts = _Parts([other.part for other in units[data]])
            write_index(
                data,
                parts.lengths,
                parts.pieces,
                fingerprint=fingerprints[data],
                tokenizer=digest,
                prompt=prompt,
                root=root,
            )
            shutil.rmtree(unit.part.parent, ignore_errors=True)


def _is_current(data: Path, digest: str, prompt: str, root: str) -> bool:
    try:
        return open_index(data, tokenizer=digest, prompt=prompt, root=root) is not None
    except ValueError:  # stale or damaged: made anew
        return False


def _units(data: Path, tokenizer: Path, prompt: str, root: str, *, key: str) -> list[_Unit]:
    """Units of a file. ``key`` is all that their results depend on: parts of another key are not taken up."""
    size = os.path.getsize(data)
    is_tar = data.suffix == ".tar"
    stretches = [(0, size)] if is_tar else cut(data, max(_UNIT_BYTES, -(-size // _MOST_UNITS)))
    folder, name = data.with_name(data.name + ".index.parts"), hashlib.sha256(key.encode()).hexdigest()[:16]
    return [
        _Unit(data, start, stop, folder / f"{name}-{number:04d}.npz", tokenizer, prompt, root)
        for number, (start, stop) in enumerate(stretches)
    ]


def _worked(units: list[_Unit], workers: int) -> Iterator[_Unit]:
    """The units, each when its part is there."""
    todo = []
    for unit in units:
        if unit.part.is_file():
            yield unit
        else:
            unit.part.parent.mkdir(exist_ok=True)
            todo.append(unit)
    if workers <= 1 or len(todo) <= 1:
        for unit in todo:
            _work(unit)
            yield unit
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # one import of everything, and no fork of a process with threads
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        futures = {pool.submit(_work, unit): unit for unit in todo}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            unfinished = sorted({str(unit.data) for future, unit in futures.items() if not unit.part.is_file()})
            raise ChildProcessError(
                f"a process was killed (out of memory, or by damaged media) while it read one of {', '.join(unfinished[:5])}; "
                "what was done stays: run the same command again, with fewer --workers if memory is short"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _work(unit: _Unit) -> None:
    """Read a unit and put its part in its place."""
    tokenizer, rows = _tokenizer(unit.tokenizer), _Rows()
    if unit.data.suffix == ".tar":
        _read_tar(unit, tokenizer, rows)
    else:
        _read_lines(unit, tokenizer, rows)
    partial = unit.part.with_name(f"{unit.part.stem}.{os.getpid()}.partial.npz")
    arrays = vars(rows.arrays())
    lengths = np.array([rows.num_lines, *(len(arrays[name]) for name in ARRAYS)])
    np.savez(partial, lengths=lengths, **arrays)
    os.replace(partial, unit.part)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


# ------------------------------------------------------------------------------------------------ rows of a unit


class _Rows:
    """The growing contents of a part."""

    def __init__(self) -> None:
        self.num_lines = 0
        self._records: list[tuple[int, ...]] = []
        self._media: list[tuple[float, ...]] = []
        self._rows, self._rejections = bytearray(), bytearray()

    def add(self, start: int, num_bytes: int, *, crc: int = 0, facts: RecordFacts, ranges: Sequence[TarMember]) -> None:
        """A row that can be used."""
        flags = HAS_SYSTEM * facts.has_system + HAS_ANSWER * facts.has_answer
        first = len(self._media)
        for number, item in enumerate(facts.media):
            flags |= HOLDS[item.kind]
            place = (ranges[number].start, ranges[number].num_bytes) if ranges else (0, 0)
            self._media.append((KINDS.index(item.kind), *item[1:], *place))
        if (speech := facts.speech) is not None:
            self._media.append((SPEECH, *speech[:3], 0.0, speech.codes, 0, 0))
        for number, (width, height) in enumerate(facts.targets, len(facts.media)):
            place = (ranges[number].start, ranges[number].num_bytes) if ranges else (0, 0)
            self._media.append((TARGET, width, height, 0, 0.0, 0, *place))
        line = self.num_lines
        self._records.append(
            (start, num_bytes, crc, line, facts.text_tokens, 0, first, len(self._media) - first, flags)
        )  # fmt: skip

    def reject(self, start: int, num_bytes: int, *, crc: int = 0, where: str, error: RecordError | MediaError) -> None:
        """A row that cannot be used."""
        message = str(error).removeprefix(f"{where}: ")
        place = 1 + len(self._rejections)
        self._rejections += json.dumps({"reason": error.reason, "message": message[:2000]}).encode() + b"\n"
        self._records.append((start, num_bytes, crc, self.num_lines, 0, place, len(self._media), 0, 0))

    def store(self, row: dict[str, Any]) -> tuple[int, int]:
        """Keep the row itself; its start and length."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
        self._rows += line + b"\n"
        return len(self._rows) - len(line) - 1, len(line)

    def arrays(self) -> IndexArrays:
        """The part."""
        return IndexArrays(
            records=np.array(self._records, RECORD),
            media=np.array(self._media, MEDIA),
            rows=np.frombuffer(bytes(self._rows), np.uint8),
            rejections=np.frombuffer(bytes(self._rejections), np.uint8),
        )


def _read_lines(unit: _Unit, tokenizer: Tokenizer, rows: _Rows) -> None:
    """The rows that start inside the unit."""
    root = Path(unit.root) if unit.root else unit.data.parent
    for start, line in rows_between(unit.data, unit.start, unit.stop):
        rows.num_lines += 1
        if is_blank(line):
            continue
        crc, where = zlib.crc32(line), "row"
        try:
            record = parse_line(line, where=where, source="", root=root)
            rows.add(start, len(line), crc=crc, facts=measure(record, tokenizer), ranges=())
        except Exception as error:
            bad = _expected(error, f"{unit.data}, byte {start}")
            rows.reject(start, len(line), crc=crc, where=where, error=bad)


def _read_tar(unit: _Unit, tokenizer: Tokenizer, rows: _Rows) -> None:
    fields = assemble.field_map(unit.data)
    for sample in tar_samples(unit.data):
        where = "sample"
        try:
            row, record, ranges = _tar_record(sample, fields, unit.prompt, where)
            facts = measure(record, tokenizer)
            rows.add(*rows.store(row), facts=facts, ranges=ranges)
        except Exception as error:
            bad = _expected(error, f"{unit.data}:{sample.key}")
            rows.reject(*rows.store({"id": printable(sample.key)}), where=where, error=bad)


def _expected(error: Exception, place: str) -> RecordError | MediaError:
    return error if isinstance(error, RecordError | MediaError) else internal_error(place, error)


def _tar_record(
    sample: TarSample, fields: dict[str, str], prompt: str, where: str
) -> tuple[dict[str, Any], Record, list[TarMember]]:
    """A sample's row, its record, and the members that are its media in the record's order."""
    if sample.problem:
        raise RecordError(
            where, field="member", value=sample.key, problem=sample.problem,
            fix="write the tar anew", reason="unsafe_member" if sample.members else "damaged_tar",
        )  # fmt: skip
    files = {suffix: member.name for suffix, member in sample.members.items()}
    parts = {suffix: _text(member, suffix, where) for suffix, member in sample.members.items() if _is_text(suffix)}
    if fields:
        row = assemble.assemble_mapped(sample.key, fields, files, parts, where=where, prompt=prompt)
    else:
        text, metadata = parts.get("txt"), parts.get("json")
        assert text is None or isinstance(text, str)
        row = assemble.assemble(sample.key, files, where=where, text=text, metadata=metadata, prompt=prompt)
    record = parse_record(row, where=where)
    members = {member.name: member for member in sample.members.values()}
    ranges = [members[str(name)] for kind in KINDS for name in record.media(kind)]
    by_kind = {LIST_FIELD[kind]: tuple(members[str(name)] for name in record.media(kind)) for kind in KINDS}
    targets = tuple(members[str(name)] for name in record.targets)
    found = Record(messages=record.messages, where=where, targets=targets, drawing=record.drawing, **by_kind)  # type: ignore[arg-type]
    return row, found, [*ranges, *targets]


def _is_text(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in ("txt", "json")


def _text(member: TarMember, suffix: str, where: str) -> object:
    """A caption, or decoded JSON."""

    def refuse(problem: str, reason: str) -> RecordError:
        return RecordError(
            where, field=suffix, value=member.name, problem=problem, fix="repair it or take it out", reason=reason
        )

    if member.num_bytes > _TEXT_BYTES:
        raise refuse(f"holds {member.num_bytes} bytes of text, more than {_TEXT_BYTES}", "too_long")
    try:
        data = member.load().data
        return decode_text(data, where) if suffix.endswith("txt") else parse_json(data, where)
    except ForeignError as error:
        raise refuse(error.problem, "not_json" if suffix.endswith("json") else "bad_text") from error


# ------------------------------------------------------------------------------------------------ parts to an index


class _Parts:
    """The parts of one file in order, of which one is in memory at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths, self._lengths = paths, []
        for path in paths:
            with np.load(path, allow_pickle=False) as part:
                self._lengths.append(dict(zip(("lines", *ARRAYS), part["lengths"].tolist(), strict=True)))
        self.lengths = {name: sum(lengths[name] for lengths in self._lengths) for name in ARRAYS}

    def pieces(self, name: str) -> Iterator[NDArray[Any]]:
        """One of the index's arrays, part by part, its places counted from the start of the whole."""
        before = Counter[str]()
        for path, lengths in zip(self._paths, self._lengths):
            with np.load(path, allow_pickle=False) as part:
                piece = part[name]
            if name == "records":
                piece["number"] += before["lines"]
                piece["media"] += before["media"]
                piece["rejection"][piece["rejection"] > 0] += before["rejections"]
                if lengths["rows"]:
                    piece["start"] += before["rows"]
            yield piece
            before.update(lengths)
