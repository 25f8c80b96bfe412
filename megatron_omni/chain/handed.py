"""Rows that a stage makes of an earlier stage's rows, for the next stage to read as sources of its own.

They lie in a folder that is named by the digest of everything that they were made of, and appear there whole or not at
all. So a run that reads them says in its ``resolved.yaml`` of what they were made, and one that was started from others
is found out. A file a source: names, and with them the metrics by source, stay.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_omni.config.data import SourceConfig
from megatron_omni.config.shards import shard_paths
from megatron_omni.data.record import KINDS, LIST_FIELD, Message, Record
from megatron_omni.data.sources import Source, open_sources

_DIGITS = 12
"""Of a digest, in a folder's name."""


def opened(configs: Sequence[SourceConfig], where: str) -> dict[str, Source]:
    """Sources by name. ValueError for one that rows cannot be made of: a tar holds its media itself."""
    for config in configs:
        if tars := [file for file in shard_paths(config.path) if file.suffix == ".tar"]:
            raise ValueError(
                f"{where}: data source {config.name!r} reads {tars[0]}; rows are made of JSONL files, so write its records "
                "into one"
            )
    return {source.name: source for source in open_sources(list(configs))}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digests(configs: Sequence[SourceConfig]) -> dict[str, dict[str, str]]:
    """Of every file of the sources, by name and path."""
    return {c.name: {str(file): file_digest(file) for file in shard_paths(c.path)} for c in configs}


def digest_of(inputs: Mapping[str, Any]) -> str:
    """One name for all of them; where files lie does not count, only what they hold."""
    return hashlib.sha256(json.dumps(_placeless(inputs), sort_keys=True).encode()).hexdigest()


def _placeless(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    files = all(isinstance(item, str) for item in value.values()) and any(os.sep in name for name in value)
    return sorted(value.values()) if files else {name: _placeless(item) for name, item in value.items()}


def root_of(config: SourceConfig) -> Path:
    """The folder that a source's media lie under."""
    if config.root:
        return Path(config.root)
    return Path(os.path.commonpath([file.parent.absolute() for file in shard_paths(config.path)]))


def row_of(record: Record, root: Path) -> dict[str, Any]:
    """The record as a row whose media are relative to ``root``."""
    row: dict[str, Any] = {"messages": [_turn_of(message, root) for message in record.messages]}
    if record.id:
        row["id"] = record.id
    for kind in KINDS:
        if files := record.media(kind):
            row[LIST_FIELD[kind]] = [os.path.relpath(str(file), root) for file in files]
    return row | dict(record.extra)


def _turn_of(message: Message, root: Path) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.speech is not None:
        turn["speech"] = message.speech.row(lambda file: os.path.relpath(file, root))
    return turn


def handed(config: SourceConfig, folder: Path) -> SourceConfig:
    """The source over the rows that ``write_rows`` has put into ``folder``."""
    return replace(config, path=str(folder / f"{config.name}.jsonl"), root=str(root_of(config)))


def write_rows(folder: Path, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """``folder/SOURCE.jsonl`` of every source, all of them or none."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, items in rows.items():
        with (partial / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in items)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def folder_of(run_dir: Path, kind: str, digest: str) -> Path:
    """Where the rows of this digest lie."""
    return run_dir / f"{kind}_{digest[:_DIGITS]}"
