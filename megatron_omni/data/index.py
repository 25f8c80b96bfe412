"""The index of a data file: where every row lies and what it will cost, so that planning a step opens no media file.

``DATA.index`` stands beside ``DATA``, a JSONL file or a tar. It is one file, read through a memory map:

    magic line | header (JSON: version, fingerprints, lengths) | records | media | rows | rejections

``records`` has one entry a row (``RECORD``): its bytes, tokens of its text, its media and, for a row that cannot be
used, the place of the reason. ``media`` has one entry a media file (``MEDIA``): what its header says; behind them one for a
spoken answer, and one for each picture that answers draw. For a tar ``rows`` holds the records themselves as JSON lines, made
from the members of each key, and ``media`` the byte ranges.

Every row of the data is there, bad ones too: an index changes the speed of a run and nothing else. It belongs to one
tokenizer and to unchanged data; an index of anything else is refused. Of large data the size and a few places are
compared, and of a JSONL row its checksum when it is read, so a changed row is found at the latest then.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_omni.data.descriptors import mapped
from megatron_omni.data.record import KINDS, RecordError
from megatron_omni.data.sizes import MediaFacts, RecordFacts, SpeechFacts
from megatron_omni.foreign import parse_json, read_bytes

VERSION = 2
_MAGIC = b"megatron_omni data index\n"
_ALIGNMENT = 64
_WHOLE_BYTES, _PLACES, _PLACE_BYTES = 1 << 20, 16, 1 << 13
"""A file up to the first size is compared whole, a larger one at some places."""

RECORD = np.dtype(
    [
        ("start", "<u8"), ("num_bytes", "<u4"),  # the row: in the JSONL file, or in ``rows``
        ("crc", "<u4"),  # of a JSONL row
        ("number", "<u8"),  # line of a JSONL file, from 1
        ("text_tokens", "<u4"),
        ("rejection", "<u4"),  # 0, or 1 + where its line starts in ``rejections``
        ("media", "<u8"), ("num_media", "<u4"),
        ("flags", "u1"),
    ]
)  # fmt: skip
HAS_SYSTEM, HAS_ANSWER = 1, 2
HOLDS = {"image": 4, "audio": 8, "video": 16}
MEDIA = np.dtype(
    [
        ("kind", "u1"), ("width", "<u4"), ("height", "<u4"), ("frames", "<u4"), ("seconds", "<f8"), ("samples", "<u8"),
        ("start", "<u8"), ("num_bytes", "<u8"),  # in the tar
    ]
)  # fmt: skip
SPEECH = len(KINDS)
"""Kind of the entry behind those of a row's media that holds the ``SpeechFacts`` of its spoken answer: prompt, text and start
as width, height and frames, codes as samples."""
TARGET = SPEECH + 1
"""Kind of the entries behind these: the pictures that a row draws."""
ARRAYS = {"records": RECORD, "media": MEDIA, "rows": np.dtype("u1"), "rejections": np.dtype("u1")}


class RejectedRecord(RecordError):
    """A row that was found unusable when the index was made."""

    def __init__(self, where: str, *, reason: str, message: str) -> None:
        ValueError.__init__(self, f"{where}: {message}")
        self.where, self.reason = where, reason


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether data is the data an index was made of."""

    num_bytes: int
    digest: str

    @staticmethod
    def of(path: Path) -> "Fingerprint":
        """Size, and SHA-256 of the whole file or of some places in it."""
        size = os.path.getsize(path)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
            else:
                for place in range(_PLACES):
                    file.seek(place * (size - _PLACE_BYTES) // (_PLACES - 1))
                    digest.update(file.read(_PLACE_BYTES))
        return Fingerprint(size, digest.hexdigest())


def tokenizer_digest(path: str | Path) -> str:
    """SHA-256 of a tokenizer's file; ValueError (foreign.py) for what is no ordinary file of bounded size."""
    path = Path(path)
    return hashlib.sha256(read_bytes(path / "tokenizer.json" if path.is_dir() else path)).hexdigest()


@dataclass(frozen=True)
class IndexArrays:
    """The contents of an index, or of a part of one."""

    records: NDArray[np.void]
    media: NDArray[np.void]
    rows: NDArray[np.uint8]
    rejections: NDArray[np.uint8]


class Index:
    """An index on disk."""

    def __init__(self, path: Path, arrays: IndexArrays, header: dict[str, Any]) -> None:
        self.path, self.arrays, self.header = path, arrays, header

    def __len__(self) -> int:
        return len(self.arrays.records)

    @property
    def num_rejected(self) -> int:
        """Rows that no recipe can use."""
        return int(np.count_nonzero(self.arrays.records["rejection"]))

    def facts(self, row: int, *, where: Callable[[int], str]) -> RecordFacts:
        """What is known of a row; RejectedRecord, which names ``where(row)``, for one that cannot be used."""
        record = self.arrays.records[row].item()
        _, _, _, _, text_tokens, rejection, first, num_media, flags = record
        if rejection:
            raise RejectedRecord(where(row), **self._rejection(rejection - 1))
        entries = self.arrays.media[first : first + num_media].tolist()
        media = tuple(MediaFacts(KINDS[kind], *header) for kind, *header, _, _ in entries if kind < SPEECH)
        speech = [SpeechFacts(item[1], item[2], item[3], item[5]) for item in entries if item[0] == SPEECH]
        targets = tuple((item[1], item[2]) for item in entries if item[0] == TARGET)
        has_system, has_answer = bool(flags & HAS_SYSTEM), bool(flags & HAS_ANSWER)
        return RecordFacts(text_tokens, has_system, has_answer, media, speech[0] if speech else None, targets)

    def byte_range(self, row: int) -> tuple[int, int, int]:
        """Start, length and checksum of a row."""
        start, num_bytes, crc, *_ = self.arrays.records[row].item()
        return start, num_bytes, crc

    def stored_row(self, row: int) -> dict[str, Any]:
        """The record of a tar's sample, before parsing."""
        start, num_bytes, _ = self.byte_range(row)
        return parse_json(self.arrays.rows[start : start + num_bytes].tobytes(), f"{self.path}: row {row}")

    def media_ranges(self, row: int) -> list[tuple[int, int]]:
        """Start and length of each media file of a tar's sample, kind by kind, and behind them of its targets."""
        record = self.arrays.records[row]
        first, count = int(record["media"]), int(record["num_media"])
        entries = self.arrays.media[first : first + count]
        return [(int(item["start"]), int(item["num_bytes"])) for item in entries if item["kind"] != SPEECH]

    def rejections(self) -> Iterator[tuple[int, str, str]]:
        """(row, reason, message) of the rows that no recipe can use."""
        for row in np.flatnonzero(self.arrays.records["rejection"]).tolist():
            found = self._rejection(int(self.arrays.records[row]["rejection"]) - 1)
            yield row, found["reason"], found["message"]

    def _rejection(self, start: int) -> dict[str, str]:
        line = self.arrays.rejections[start : start + (1 << 16)].tobytes().split(b"\n", 1)[0]
        return parse_json(line, f"{self.path}: a rejection")


def index_path(data: Path) -> Path:
    """Where the index of ``data`` stands."""
    return data.with_name(data.name + ".index")


def index_setting_of(data: Path) -> str:
    """The setting of a source that the index of one of its files depends on: ``prompt`` or ``root``."""
    return "prompt" if data.suffix == ".tar" else "root"


def open_index(data: Path, *, tokenizer: str, prompt: str = "", root: str = "") -> Index | None:
    """The index of ``data`` for the tokenizer with this digest; None where there is none, ValueError for a stale one.

    ``prompt`` went into the records of a tar and matters for nothing else, ``root`` says where the media of other files
    lie.
    """
    path = index_path(data)
    if not path.is_file():
        return None
    again = f"run megatron-omni prepare again, or remove {str(path)!r}"
    index = read_index(path)
    if index.header["data"] != asdict(Fingerprint.of(data)):
        raise ValueError(f"{path}: stale, {data.name!r} has changed since it was made; {again}")
    if index.header["tokenizer"] != tokenizer:
        raise ValueError(f"{path}: stale, its tokens were counted with another tokenizer; {again}")
    name = index_setting_of(data)
    value = {"prompt": prompt, "root": root}[name]
    if index.header[name] != value:
        raise ValueError(f"{path}: stale, it was made with {name} = {index.header[name]!r}, not {value!r}; {again}")
    return index


def read_index(path: Path) -> Index:
    """An index as it lies there, whatever it belongs to; ValueError for a damaged one or one of another version."""
    again = f"run megatron-omni prepare again, or remove {str(path)!r}"
    try:
        contents = mapped(path)
        first, _, rest = contents[: len(_MAGIC) + (1 << 16)].tobytes().partition(b"\n")
        if first + b"\n" != _MAGIC:
            raise ValueError("it does not start like an index")
        line, _, _ = rest.partition(b"\n")
        header, offset = parse_json(line, "its header"), len(_MAGIC) + len(line) + 1
        if header["version"] != VERSION:
            raise ValueError(f"it has version {header['version']}, not {VERSION}")
        arrays = {}
        for name, dtype in ARRAYS.items():
            count, offset = int(header["lengths"][name]), _aligned(offset)
            end = offset + count * dtype.itemsize
            if count < 0 or end > len(contents):
                raise ValueError("it is cut off")
            arrays[name] = contents[offset:end].view(dtype)
            offset = end
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no usable index ({error}); {again}") from error
    return Index(path, IndexArrays(**arrays), header)


def write_index(
    data: Path,
    lengths: Mapping[str, int],
    pieces: Callable[[str], Iterable[NDArray[Any]]],
    *,
    fingerprint: Fingerprint,
    tokenizer: str,
    prompt: str = "",
    root: str = "",
) -> Path:
    """Put the index of ``data`` in its place, whole or not at all.

    ``lengths`` are those of ARRAYS, ``pieces`` gives the parts of each in order: one is in memory at a time.
    """
    header = {
        "version": VERSION,
        "data": asdict(fingerprint),
        "tokenizer": tokenizer,
        "prompt": prompt,
        "root": root,
        "lengths": {name: lengths[name] for name in ARRAYS},
    }
    path = index_path(data)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC + json.dumps(header).encode() + b"\n")
            for name, dtype in ARRAYS.items():
                file.write(b"\0" * (_aligned(file.tell()) - file.tell()))
                start = file.tell()
                for piece in pieces(name):
                    np.ascontiguousarray(piece, dtype).tofile(file)
                assert file.tell() == start + lengths[name] * dtype.itemsize, f"the parts of {name} do not add up"
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
