"""The files that a source's ``path`` stands for.

records.jsonl              that file
shards/{000..127}.tar      a range (zeros are kept) or {a,b}: every file named, all must exist
shards/*.tar               a pattern: the files that exist, in the order of their names
DIR                        a folder with ``.nv-meta`` (Energon): the tars of the split ``train``
DIR#val                    another split of it
"""

import glob
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:")
_NOT_READ = {
    (".parquet", ".arrow", ".feather", ".orc", ".tfrecord", ".lance"): "write its rows as JSONL (Dataset.to_json of "
    "Hugging Face datasets; media into files that the rows name), or as WebDataset tars",
    (".csv", ".tsv", ".xlsx"): "write one JSON object a row; a folder of media with a metadata.csv becomes records with "
    "megatron-omni prepare --folder",
    (".gz", ".zst", ".xz", ".bz2", ".tgz", ".zip", ".7z"): "unpack it: records are read in place",
}  # fmt: skip
"""Ends of names of data that people have, and what to do with it."""
_MOST_FILES = 1_000_000


def shard_paths(path: str) -> list[Path]:
    """Files of a source, in order; ValueError when there is none, one is missing, or of a kind that is not read."""
    try:
        return _shard_paths(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ValueError(f"{path!r} cannot be read: {error.strerror or error}") from error


def _shard_paths(path: str) -> list[Path]:
    if _URL.match(path):
        raise ValueError(
            f"{path!r} is a URL, and only files are read: copy the data to a disk, or mount the bucket as a file system"
        )
    folder, _, split = path.partition("#")
    if (Path(folder) / ".nv-meta").is_dir():
        return _energon_shards(Path(folder), split or "train")
    if Path(path).is_file():
        _check_kind(Path(path))
        return [Path(path)]
    if Path(path).is_dir():
        raise ValueError(
            f"{path!r} is a folder without .nv-meta; name its files ({path}/*.tar), or make records of the media in it "
            "with megatron-omni prepare --folder"
        )
    files = []
    for name in expand_braces(path):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        files += [Path(file) for file in found]
    if not files:
        raise ValueError(f"no file matches {path!r}")
    for file in files:
        _check_kind(file)
        if not file.is_file():
            raise ValueError(f"no such file {str(file)!r}")
    return files


def _check_kind(file: Path) -> None:
    """ValueError for a file of a kind that is not read, which names the way out."""
    for suffixes, way_out in _NOT_READ.items():
        if file.suffix.lower() in suffixes:
            raise ValueError(f"{str(file)!r}: {file.suffix} is not read; {way_out} (docs/data.md)")


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}`` and ``a{x,y}`` written out, from left to right."""
    pieces = _BRACES.split(pattern)  # text, content of a brace, text, ...
    choices = [[piece] if place % 2 == 0 else _choices(piece, pattern) for place, piece in enumerate(pieces)]
    if math.prod(map(len, choices)) > _MOST_FILES:
        raise ValueError(f"{pattern!r} stands for more than {_MOST_FILES:,} files; name fewer")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(brace: str, pattern: str) -> Sequence[str]:
    """What ``{brace}`` stands for."""
    bounds = _RANGE.fullmatch(brace)
    if bounds is None:
        return brace.split(",")
    low, high = int(bounds[1]), int(bounds[2])
    if not 0 <= high - low < _MOST_FILES:
        raise ValueError(f"{pattern!r}: the range {{{brace}}} is empty or absurdly long")
    return [str(number).zfill(len(bounds[1])) for number in range(low, high + 1)]


def _energon_shards(folder: Path, split: str) -> list[Path]:
    """Tars of one split of a folder that ``energon prepare`` has been over."""
    choices = [folder / ".nv-meta" / name for name in ("split.yaml", "split.json")]
    file = next((choice for choice in choices if choice.is_file()), choices[0])
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        parts = content["split_parts"]
        names = [name for pattern in parts[split] for name in expand_braces(pattern)]
        excluded = {name for pattern in content.get("exclude") or [] for name in expand_braces(pattern)}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} names no shards for the split {split!r} ({error!r})") from error
    partly = sorted(name for name in excluded if not name.endswith(".tar"))
    if partly:
        raise ValueError(f"{str(file)!r} excludes single samples ({partly[0]!r}), which is not supported; remove them")
    files = []
    for name in names:
        if name in excluded:
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{str(file)!r} names {name!r}, which leads out of {str(folder)!r}")
        if not path.is_file():
            raise ValueError(f"{str(file)!r} names {name!r}, and there is no such file")
        files.append(path)
    if not files:
        raise ValueError(f"{str(file)!r} names no shards for the split {split!r}")
    return files
