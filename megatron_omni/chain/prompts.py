"""Prompts of a stage without those that an earlier stage has learned to answer (VerIPO).

Of the prompts whose responses were all right, the share ``drop_solved`` is left out: those whose hash of seed, source and
record is lowest. The rows that stay lie in ``run_dir/prompts_<digest>/SOURCE.jsonl``; a start that finds them there reads
them as they are.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_omni.chain.config import PromptsConfig
from megatron_omni.chain.handed import (
    digest_of,
    file_digest,
    folder_of,
    handed,
    opened,
    root_of,
    row_of,
    source_digests,
    write_rows,
)
from megatron_omni.chain.pairs import last_rollouts, rollout_files
from megatron_omni.chain.verify import correct_rewards, is_right
from megatron_omni.checkpoint.commit import write_text
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.record import RecordError
from megatron_omni.data.sources import Source

REPORT = "prompts.json"


def prompts_folder(config: PromptsConfig, solved_by: Recipe, recipe: Recipe) -> Path:
    """Where the prompts of ``recipe`` lie that are left of these inputs; nothing need be there yet."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "rollouts"}
    inputs = {
        "settings": settings, "seed": recipe.seed,
        "rollouts": {str(file): file_digest(file) for file in rollout_files(Path(solved_by.run_dir))},
        "sources": source_digests(recipe.data.sources),
    }  # fmt: skip
    return folder_of(Path(recipe.run_dir), "prompts", digest_of(inputs))


def left_sources(config: PromptsConfig, solved_by: Recipe, recipe: Recipe) -> list[SourceConfig]:
    """The sources of ``recipe`` over the prompts that are left, written where they are not there yet.

    ValueError where the two stages read other sources, where nothing is left, and for tars.
    """
    folder = prompts_folder(config, solved_by, recipe)
    if not folder.is_dir():
        _write(config, solved_by, recipe, folder)
    return [handed(source, folder) for source in recipe.data.sources if (folder / f"{source.name}.jsonl").is_file()]


def solved_places(config: PromptsConfig, solved_by: Recipe) -> list[tuple[str, int]]:
    """Source and record of the prompts whose responses were all right when they were last asked."""
    names = correct_rewards(config, solved_by)
    groups = last_rollouts(Path(solved_by.run_dir))
    return [p for p, group in groups.items() if all(is_right(one.rewards, names, config) for one in group)]


def dropped_places(config: PromptsConfig, solved_by: Recipe, seed: int) -> set[tuple[str, int]]:
    """Those that are left out."""
    solved = solved_places(config, solved_by)
    in_order = sorted(solved, key=lambda place: hashlib.sha256(f"{seed} {place[0]} {place[1]}".encode()).digest())
    return set(in_order[: round(config.drop_solved * len(solved))])


def _write(config: PromptsConfig, solved_by: Recipe, recipe: Recipe, folder: Path) -> None:
    theirs = {source.name: source.path for source in solved_by.data.sources}
    for source in recipe.data.sources:
        if source.name in theirs and theirs[source.name] != source.path:
            raise ValueError(
                f"prompts_from: source {source.name!r} reads {source.path}, but in {solved_by.run_dir} {theirs[source.name]}, so "
                "that record numbers mean other prompts; let both read the same file"
            )
    sources = opened(recipe.data.sources, "prompts_from")
    solved = len(solved_places(config, solved_by))
    dropped = dropped_places(config, solved_by, recipe.seed)
    counts = dict.fromkeys(sources, 0)

    def rows(config: SourceConfig, source: Source) -> Iterator[dict[str, Any]]:
        root = root_of(config)
        for number in range(len(source)):
            if (config.name, number) in dropped:
                continue
            try:
                row = row_of(source[number], root)
            except RecordError:
                continue  # it would be skipped and counted by the run as well
            counts[config.name] += 1
            yield row

    kept = {source.name: list(rows(source, sources[source.name])) for source in recipe.data.sources}
    if not any(kept.values()):
        raise ValueError(
            f"prompts_from: drop_solved={config.drop_solved:g} leaves no prompt of {len(dropped)}; lower it"
        )
    write_rows(folder, {name: found for name, found in kept.items() if found})
    report = {"solved": solved, "dropped": len(dropped), "left": counts, "folder": folder.name}
    write_text(Path(recipe.run_dir) / REPORT, json.dumps(report, indent=1) + "\n")
