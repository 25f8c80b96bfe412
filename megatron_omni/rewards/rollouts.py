"""Rollouts on disk: every response of an iteration with its rewards, ``run_dir/rollouts/iter_0000012.rank_0_of_2.jsonl``.

One file a data-parallel rank, one line a response, written beside and renamed: a file is whole or not there. A reader
joins the ranks; a set of files in which a rank is missing (a kill between two renames) is no iteration.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_omni.foreign import ForeignError, parse_json, read_bytes

FOLDER = "rollouts"
_FILE = re.compile(r"iter_(\d{7,})\.rank_(\d+)_of_(\d+)\.jsonl")
_MOST_BYTES = 1 << 34


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response."""

    iteration: int
    prompt: int
    """Number of the prompt in the order of the data: equal for the responses of a group, unique in an iteration."""
    source: str
    """Name of the source in the recipe."""
    record: int
    """Number of the record in its source."""
    id: str
    """Of the record, where it has one."""
    where: str
    """File and line of the record."""
    g: int
    """Number of the response in its group."""
    turns: Sequence[Mapping[str, str]]
    """The prompt: ``{"role", "content"}`` with markers where media stand."""
    media: Sequence[Mapping[str, str]]
    """``{"kind": "image" | "audio" | "video", "path"}`` in the order of the markers."""
    solution: Any = None
    text: str
    tokens: int
    """Of the response, its end token included."""
    token_ids: Sequence[int]
    finish: str
    """``stop`` or ``length``."""
    rewards: Mapping[str, float | None]
    """By function, before weights."""
    total: float | None
    """None: left out of its group's mean and of the loss."""
    advantage: float | None
    """None: left out, or its group has no spread."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further measurements, by name."""

    @property
    def place(self) -> tuple[str, int]:
        """Equal for the same record in other iterations."""
        return self.source, self.record


_FIELDS = [one.name for one in dataclasses.fields(Rollout)]


def write_rollouts(run_dir: str | Path, rollouts: Sequence[Rollout], *, iteration: int, rank: int, ranks: int) -> Path:
    """This rank's file of an iteration, replacing what an earlier attempt left of it. On disk when this returns."""
    assert 0 <= rank < ranks and all(one.iteration == iteration for one in rollouts)
    folder = Path(run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"iter_{iteration:07d}.rank_{rank}_of_{ranks}.jsonl"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for one in rollouts:
            row = {name: getattr(one, name) for name in _FIELDS}
            file.write(json.dumps(row, ensure_ascii=True, allow_nan=False, default=list) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if rank == 0:  # of an attempt on another number of ranks
        for other, (number, _, of) in _files(folder).items():
            if number == iteration and of != ranks:
                other.unlink(missing_ok=True)
    return path


def iterations(run_dir: str | Path) -> list[int]:
    """Those that are there from all their ranks, in order."""
    return sorted(_whole(Path(run_dir) / FOLDER))


def read_rollouts(run_dir: str | Path, iteration: int) -> list[Rollout]:
    """Of all ranks, by prompt and number of the response. ValueError where the iteration is not there, or a line is no
    response."""
    folder = Path(run_dir) / FOLDER
    whole = _whole(folder)
    if iteration not in whole:
        known = sorted(whole)
        said = f"it has {known[0]} to {known[-1]}" if known else "it has none"
        raise ValueError(f"{folder}: no rollouts of iteration {iteration} from all ranks; {said}")
    found = [one for path in whole[iteration] for one in _rows(path)]
    return sorted(found, key=lambda one: (one.prompt, one.g))


def _rows(path: Path) -> list[Rollout]:
    rows = []
    for number, line in enumerate(read_bytes(path, most_bytes=_MOST_BYTES).splitlines(), 1):
        row = parse_json(line, f"{path}:{number}")
        try:
            rows.append(Rollout(**{name: value for name, value in row.items() if name in _FIELDS}))
        except (TypeError, AttributeError) as error:
            raise ForeignError(f"{path}:{number}", f"no rollout: {error}") from error
    return rows


def _whole(folder: Path) -> dict[int, list[Path]]:
    """Files of the iterations that all ranks have written, by rank."""
    sets: dict[tuple[int, int], dict[int, Path]] = {}
    for path, (iteration, rank, ranks) in _files(folder).items():
        sets.setdefault((iteration, ranks), {})[rank] = path
    whole: dict[int, list[Path]] = {}
    for (iteration, ranks), files in sets.items():
        paths = [files[rank] for rank in sorted(files)]
        newer = iteration not in whole or paths[0].stat().st_mtime > whole[iteration][0].stat().st_mtime
        if len(files) == ranks and newer:
            whole[iteration] = paths
    return whole


def _files(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """(iteration, rank, ranks) of the files in a folder."""
    found = {path: _FILE.fullmatch(path.name) for path in folder.glob("iter_*.jsonl")}
    return {path: (int(name[1]), int(name[2]), int(name[3])) for path, name in found.items() if name}
