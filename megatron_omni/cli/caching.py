"""``megatron-omni prepare --latents --hidden``: pictures through a VAE and a language model, into files and rows that name them."""

import argparse
from pathlib import Path

from megatron_omni.cli.extracting import Progress
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.config.shards import shard_paths
from megatron_omni.data.picture_cache import Cached, Making, PictureRows, cache_pictures
from megatron_omni.generation.precompute import HiddenMaker, LatentMaker
from megatron_omni.parallel.groups import destroy


def cached(words: argparse.Namespace, recipe: Recipe, sources: list[SourceConfig]) -> list[tuple[SourceConfig, str]]:
    """Make what the words of the command ask for, of the rows of ``sources``; each source with the pattern of the rows that
    were written. ValueError where no row can be used, or a model is not the recipe's.
    """
    if recipe.model.image is None:
        raise ValueError(
            "--latents and --hidden: the recipe has no model.image, which says how pictures are cut; give one that draws"
        )
    try:
        making = Making(
            recipe=recipe,
            latents=LatentMaker(Path(words.latents), recipe) if words.latents is not None else None,
            hidden=HiddenMaker(Path(words.hidden), recipe) if words.hidden is not None else None,
            half=words.half,
        )
        return [(source, path) for source in sources for path in _of_source(source, making, again=words.again)]
    finally:
        destroy()


def _of_source(source: SourceConfig, making: Making, *, again: bool) -> list[str]:
    made = []
    for file in shard_paths(source.path):
        rows = PictureRows(Path(file), source.root)
        what = " and ".join(making.kinds)
        progress = Progress(f"{what} of {rows.path.name}", len(rows), "rows")
        found = cache_pictures(rows, making, again=again, advance=progress.add)
        _tell(f"{what} of {rows.path}", found)
        if not found.paths:
            first = f"; the first: {found.messages[0]}" if found.messages else ""
            raise ValueError(f"none of the {len(rows)} rows of {str(rows.path)!r} can be used{first}")
        made.append(str(rows.root / f"{rows.path.stem}.drawn-*.jsonl"))
    return made


def _tell(what: str, found: Cached) -> None:
    print(f"{what}: {found.num_rows} rows, {found.num_pictures} pictures")
    for reason, number in found.skipped.most_common():
        print(f"  left out ({reason}): {number}")
    for message in found.messages:
        print(f"  {message}")
