"""A folder of media files with captions -> ``records.jsonl`` in it.

Captions come, in this order, from ``metadata.jsonl`` or ``metadata.csv`` at the top of the folder (``file_name`` and
``text``, ``caption`` or ``answer``; ``question`` or ``prompt`` if there is one), from ``NAME.json`` beside the file, or
from ``NAME.txt``. assemble.py says what becomes of them.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_omni.data.assemble import assemble, media_kind
from megatron_omni.data.record import RecordError, parse_record
from megatron_omni.data.tar import split_name
from megatron_omni.foreign import ForeignError, parse_json, read_json, read_text

RECORDS = "records.jsonl"
_METADATA_BYTES = 1 << 30
"""Largest table of captions."""


@dataclass
class FolderReport:
    """What became of the files of a folder."""

    path: Path
    """The JSONL file that was written."""
    num_records: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    """Why files were left out, the first of them."""


def records_of_folder(folder: Path, *, prompt: str = "", most_messages: int = 20) -> FolderReport:
    """Write ``folder/records.jsonl``: a record for every medium with a caption, in the order of their names.

    ValueError when the folder is none, or nothing in it can be used.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    report = FolderReport(folder / RECORDS)
    listed = _metadata(folder)
    partial = report.path.with_name(f"{RECORDS}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            for key, files, captions in _groups(folder):
                where = str(folder / key)
                try:
                    text, metadata = _caption(folder, files, captions, listed, where)
                    row = assemble(key, files, where=where, text=text, metadata=metadata, prompt=prompt)
                    parse_record(row, where=where)
                except RecordError as error:
                    report.rejected[error.reason] += 1
                    if len(report.messages) < most_messages:
                        report.messages.append(str(error))
                    continue
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                report.num_records += 1
        if not report.num_records:
            first = f"; the first: {report.messages[0]}" if report.messages else ""
            raise ValueError(f"{str(folder)!r} holds no medium with a caption{first}")
        os.replace(partial, report.path)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _groups(folder: Path) -> Iterator[tuple[str, dict[str, str], dict[str, Path]]]:
    """(key, media by suffix, caption files by suffix) of the files that share a name, links left out."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        grouped: dict[str, list[str]] = {}
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink() and name[0] != ".":
                grouped.setdefault(split_name(name)[0], []).append(name)
        for stem, members in grouped.items():
            relative = [Path(parent, name).relative_to(folder) for name in members]
            suffixes = [split_name(name)[1] for name in members]
            media = {suffix: str(path) for suffix, path in zip(suffixes, relative) if media_kind(suffix)}
            captions = {suffix: folder / path for suffix, path in zip(suffixes, relative) if suffix in ("txt", "json")}
            if media:
                yield str(Path(parent, stem).relative_to(folder)), media, captions


def _caption(
    folder: Path, files: dict[str, str], captions: dict[str, Path], listed: dict[str, dict[str, object]], where: str
) -> tuple[str | None, object]:
    for name in files.values():
        if name in listed:
            return None, listed[name]
    try:
        if "json" in captions:
            return None, read_json(captions["json"])
        return (read_text(captions["txt"]) if "txt" in captions else None), None
    except ForeignError as error:
        raise RecordError(
            where, field="caption", value=[path.name for path in captions.values()], problem=error.problem,
            fix="repair it or take it out", reason="not_json",
        ) from error  # fmt: skip


def _metadata(folder: Path) -> dict[str, dict[str, object]]:
    """Rows of metadata.jsonl or metadata.csv by file name."""
    rows: list[dict[str, object]] = []
    for name in ("metadata.jsonl", "metadata.csv"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            text = read_text(file, most_bytes=_METADATA_BYTES)
            if name[-1] == "l":
                rows = [parse_json(line, "a row") for line in text.split("\n") if line.strip()]
            else:
                rows = [*csv.DictReader(io.StringIO(text, newline=""))]
            return {str(Path(str(row["file_name"]))): row for row in rows}
        except (ForeignError, csv.Error, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} cannot be read ({error!r}); give every row a file_name") from error
    return {}
