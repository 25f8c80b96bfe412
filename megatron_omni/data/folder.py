"""A folder of media files with captions -> ``records.jsonl`` in it.

Captions come, in this order, from ``metadata.jsonl`` or ``metadata.csv`` at the top of the folder (``file_name`` and
``text``, ``caption`` or ``answer``; ``question`` or ``prompt`` if there is one), from ``NAME.json`` beside the file, or
from ``NAME.txt``. assemble.py says what becomes of them. Files belong together when they differ behind the LAST dot
only (cameras and people write dots into names; the rule of the first dot is for tars). A link to a file is taken like
the file; one to a folder is not followed (it may lead in a circle), and named.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_omni.data.assemble import assemble, media_kind
from megatron_omni.data.made_records import MadeRecords, make_records
from megatron_omni.data.record import RecordError, parse_record
from megatron_omni.data.tar import is_junk
from megatron_omni.foreign import ForeignError, parse_json, read_json, read_text

RECORDS = "records.jsonl"
_METADATA_BYTES = 1 << 30
"""Largest table of captions."""


def records_of_folder(folder: Path, *, prompt: str = "") -> MadeRecords:
    """Write ``folder/records.jsonl``: a record for every medium with a caption, in the order of their names.

    ValueError when the folder is none, or nothing in it can be used.
    """
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    listed = _metadata(folder)

    def row(key: str, files: dict[str, str], captions: dict[str, Path]) -> dict[str, Any]:
        where = str(folder / key)
        if not files:
            raise _linked(where)
        text, metadata = _caption(files, captions, listed, where)
        row = assemble(key, files, where=where, text=text, metadata=metadata, prompt=prompt)
        parse_record(row, where=where)
        return row

    rows = ((str(folder / key), partial(row, key, files, captions)) for key, files, captions in _groups(folder))
    return make_records(folder / RECORDS, rows, nothing=f"{str(folder)!r} holds no medium with a caption")


def _groups(folder: Path) -> Iterator[tuple[str, dict[str, str], dict[str, Path]]]:
    """(key, media by suffix, caption files by suffix) of the files that share a name; no media for a linked folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and not is_junk(name))
        here = Path(parent).relative_to(folder)
        for name in folders:
            if Path(parent, name).is_symlink():
                yield str(here / name), {}, {}
        grouped: dict[str, dict[str, str]] = {}
        for name in sorted(names):
            if name[0] != "." and not is_junk(name) and Path(parent, name).is_file():
                stem, _, suffix = name.rpartition(".")
                files = grouped.setdefault(stem, {})
                files[suffix if suffix.lower() in files else suffix.lower()] = str(here / name)
        for stem, files in grouped.items():
            media = {suffix: file for suffix, file in files.items() if media_kind(suffix)}
            captions = {suffix: folder / file for suffix, file in files.items() if suffix in ("txt", "json")}
            if media:
                yield str(here / stem), media, captions


def _linked(where: str) -> RecordError:
    return RecordError(
        where, field="folder", value=where, problem="is a link to a folder, which is not followed",
        fix="run this command on the folder itself", reason="linked_folder",
    )  # fmt: skip


def _caption(
    files: dict[str, str],
    captions: dict[str, Path],
    listed: dict[str, dict[str, object] | RecordError],
    where: str,
) -> tuple[str | None, object]:
    for name in files.values():
        if name in listed:
            if isinstance(row := listed[name], RecordError):
                raise row
            return None, row
    try:
        if "json" in captions:
            return None, read_json(captions["json"])
        return (read_text(captions["txt"]) if "txt" in captions else None), None
    except ForeignError as error:
        raise RecordError(
            where, field="caption", value=[path.name for path in captions.values()], problem=error.problem,
            fix="repair it or take it out", reason="not_json",
        ) from error  # fmt: skip


def _metadata(folder: Path) -> dict[str, dict[str, object] | RecordError]:
    """Rows of metadata.jsonl or metadata.csv by file name; a refusal for a file with several."""
    rows: list[dict[str, object]] = []
    for name in ("metadata.jsonl", "metadata.csv"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            text = read_text(file, most_bytes=_METADATA_BYTES)
            if name[-1] == "l":
                rows = [parse_json(line, f"line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
            else:
                rows = [*csv.DictReader(io.StringIO(text, newline=""))]
            return _by_name(rows, file)
        except (ForeignError, csv.Error, KeyError, TypeError) as error:
            raise ValueError(f"{str(file)!r} cannot be read ({error!r}); give every row a file_name") from error
    return {}


def _by_name(rows: list[dict[str, object]], table: Path) -> dict[str, dict[str, object] | RecordError]:
    names = [str(Path(str(row["file_name"]))) for row in rows]
    found: dict[str, dict[str, object] | RecordError] = dict(zip(names, rows))
    for name, number in Counter(names).items():
        if number > 1:
            found[name] = RecordError(
                str(table), field="file_name", value=name, problem=f"is there {number} times, with a caption each",
                fix="keep one", reason="double_name",
            )  # fmt: skip
    return found
