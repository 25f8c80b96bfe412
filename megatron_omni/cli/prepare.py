"""Index the data of a recipe, so that planning a step opens no media file; say what the data holds.

    megatron-omni prepare recipes/tiny/quickstart.yaml                      # every source of the recipe
    megatron-omni prepare RECIPE --data 'shards/*.tar' more.jsonl           # these files instead
    megatron-omni prepare RECIPE --folder pictures [--prompt "What is it?"] # makes pictures/records.jsonl first
    megatron-omni prepare RECIPE --trl pairs.jsonl                          # makes pairs.records.jsonl first
    megatron-omni prepare RECIPE --codes CODEC --data train.jsonl           # makes train.spoken-*.jsonl and their codes first
    megatron-omni prepare RECIPE --codes CODEC --folder LJSpeech-1.1 --speaker Linda
    megatron-omni prepare RECIPE --latents VAE --hidden RUN --data train.jsonl   # makes train.drawn-*.jsonl and their arrays first

JSONL records (messages or ShareGPT) and WebDataset tars, also ones prepared for Energon, get an index beside them
(docs/data.md). A recipe gives the tokenizer, and the sizes that the printed summary counts in; the index serves any
recipe with the same tokenizer. Interrupted, it goes on where it was; a current index is left alone. Records that cannot be
used are counted, with reasons, in the summary and in SOURCE.summary.json beside the data, and are skipped in training.

Exit status: 0 done, 2 for data or settings that do not fit, a source without any usable record, or with --max-bad F
when more than this share of a source is unusable; 1 for a full disk or a killed process, 130 interrupted.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_omni.cli.starting import say_starting

if TYPE_CHECKING:
    from megatron_omni.config.data import SourceConfig
    from megatron_omni.config.run import Recipe
    from megatron_omni.data.made_records import MadeRecords
    from megatron_omni.data.tokenizer import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="megatron-omni prepare", description=description, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("recipe", metavar="RECIPE", help="YAML file: tokenizer, sizes and, without --data, the sources")
    made.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="JSONL files or tars instead of the recipe's"
    )
    made.add_argument("--folder", type=Path, metavar="DIR", help="folder of media with captions to make records of")
    made.add_argument("--trl", type=Path, metavar="FILE", help="rows of prompt, chosen and rejected to make records of")
    made.add_argument(
        "--codes", metavar="CODEC", help="folder of a codec: make codes of the recordings of --data or --folder"
    )
    made.add_argument("--speaker", metavar="NAME", help="with --codes: whose voice it is where the data does not say")
    made.add_argument("--style", metavar="TEXT", help="with --codes: describes the voice instead")
    made.add_argument("--language", metavar="NAME", help="with --codes: of the texts (default: by their script)")
    made.add_argument(
        "--longest", type=float, metavar="S", help="with --codes: seconds of a recording without segments (45)"
    )
    made.add_argument("--normalise", action="store_true", help="with --codes: numbers and signs in words, by wetext")
    made.add_argument("--latents", metavar="VAE", help="folder of a VAE: make latents of the pictures that rows draw")
    made.add_argument(
        "--hidden", metavar="RUN", help="run or checkpoint: keep its hidden states at the blocks of these pictures"
    )
    made.add_argument("--half", action="store_true", help="with --latents, --hidden: in fp16 and bf16, half the disk")
    made.add_argument("--prompt", default="", help="question for captions that come without one")
    made.add_argument(
        "--root", default="", metavar="DIR", help="folder that the media of --data (CosyVoice: --folder) lie under"
    )
    made.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)"
    )
    made.add_argument("--again", action="store_true", help="make current indexes anew (media files were replaced)")
    made.add_argument(
        "--max-bad", type=float, default=1.0, metavar="F", help="share of unusable records that is an error"
    )
    made.add_argument("overrides", nargs="*", metavar="key=value", help="recipe fields, such as data.tokenizer=DIR")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command."""
    words = parser().parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    # --data takes all the words that follow it, settings included.
    settings = [word for word in words.data if word.startswith(("model.", "data.")) and "=" in word]
    words.data = [word for word in words.data if word not in settings]
    words.overrides += settings
    try:
        return _prepare(words)
    except KeyboardInterrupt:
        print("interrupted: what was done stays, the same command goes on from there", file=sys.stderr)
        return 130
    except (ValueError, ChildProcessError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _prepare(words: argparse.Namespace) -> int:
    from megatron_omni.config.load import load_recipe
    from megatron_omni.config.shards import shard_paths
    from megatron_omni.data.tokenizer import load_tokenizer

    # What is missing is said before the imports below, which take seconds.
    _check_speech_words(words)
    recipe = load_recipe(words.recipe, words.overrides)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    sources = [*recipe.data.sources, *recipe.data.eval_sources]
    if words.data or words.folder is not None or words.trl is not None:
        sources = [_source(path, words) for path in words.data]
    elif not sources and words.codes is None:
        raise ValueError(f"{words.recipe} has no data.sources; add some, or name files with --data")
    files = [shard_paths(source.path) for source in sources]
    say_starting("prepare", words.folder or words.trl or words.recipe)
    if words.codes is not None:
        sources, files = _of_codes(words, recipe, tokenizer)
    if words.latents is not None or words.hidden is not None:
        sources = _of_pictures(words, recipe, sources)
        files = [shard_paths(source.path) for source in sources]
    for path in _made_records(words):
        sources.append(_source(str(path), words))
        files.append(shard_paths(sources[-1].path))
    from megatron_omni.checkpoint.progress import ByteProgress
    from megatron_omni.data.builders import size_rule
    from megatron_omni.data.index import tokenizer_digest
    from megatron_omni.data.prepare import index_files
    from megatron_omni.data.sources import check_name, check_shared, index_settings, open_source
    from megatron_omni.data.summary import summarise

    digest, sizes = tokenizer_digest(tokenizer.path), size_rule(recipe, tokenizer)
    for source in sources:
        check_name(source)
    progress = ByteProgress("index", sum(os.path.getsize(file) for shards in files for file in shards))
    indexed: dict[Path, SourceConfig] = {}
    for source, shards in zip(sources, files):
        new = [file for file in shards if indexed.setdefault(file.absolute(), source) is source]
        for file in set(shards) - set(new):
            check_shared(file, indexed[file.absolute()], source)
            progress.add(os.path.getsize(file))
        index_files(
            new, recipe.data.tokenizer, **index_settings(source), workers=words.workers, again=words.again,
            advance=progress.add,
        )  # fmt: skip
    progress.finish()
    status, written = 0, set[Path]()
    for source, shards in zip(sources, files):
        summary = summarise(open_source(source, digest=digest), sizes)
        file = _summary_file(shards[0].parent, source.name, written)
        status = max(status, _report(summary, file, words.max_bad))
    return status


def _check_speech_words(words: argparse.Namespace) -> None:
    """ValueError for words that do nothing, or contradict each other."""
    given = [name for name in ("speaker", "style", "language", "longest", "normalise") if getattr(words, name)]
    if words.codes is None and given:
        raise ValueError(f"--{given[0]} says how codes are made; give --codes CODEC, or leave it out")
    if words.codes is not None and words.trl is not None:
        raise ValueError("--trl makes records of preferences, --codes of recordings; run the command once for each")
    if words.speaker and words.style:
        raise ValueError("--speaker names a voice and --style describes one; give one of the two")
    if words.half and words.latents is None and words.hidden is None:
        raise ValueError("--half says how --latents and --hidden are stored; give one of them, or leave it out")
    if (words.latents or words.hidden) and (words.codes or words.trl or words.folder):
        raise ValueError(
            "--latents and --hidden read rows that draw; run the command for --codes, --trl or --folder by itself"
        )
    if words.longest is not None and not words.longest > 0:
        raise ValueError(f"--longest {words.longest:g}: give seconds above 0")


def _of_codes(
    words: argparse.Namespace, recipe: "Recipe", tokenizer: "Tokenizer"
) -> tuple[list["SourceConfig"], list[list[Path]]]:
    """The sources of rows that are made of recordings, and their files."""
    from megatron_omni.cli.extracting import extracted
    from megatron_omni.config.shards import shard_paths

    patterns = extracted(words, recipe, tokenizer)
    return [_source(path, words) for path in patterns], [shard_paths(path) for path in patterns]


def _of_pictures(words: argparse.Namespace, recipe: "Recipe", sources: list["SourceConfig"]) -> list["SourceConfig"]:
    """Sources of the rows that are made of those of ``sources``."""
    from dataclasses import replace

    from megatron_omni.platform.device import install

    install()  # before megatron.core
    from megatron_omni.cli.caching import cached

    return [replace(source, path=path) for source, path in cached(words, recipe, sources)]


def _summary_file(folder: Path, name: str, written: set[Path]) -> Path:
    """Where a source's summary goes; training and held-out sets may share names, and a folder."""
    names = (f"{name}{number}.summary.json" for number in chain([""], (f".{n}" for n in count(2))))
    file = next(folder / file for file in names if (folder / file).absolute() not in written)
    written.add(file.absolute())
    return file


def _made_records(words: argparse.Namespace) -> Iterator[Path]:
    """Make the records of a folder and of preference pairs, and say what was left out."""
    if words.folder is not None and words.codes is None:
        from megatron_omni.data.folder import records_of_folder

        yield _told(records_of_folder(words.folder, prompt=words.prompt))
    if words.trl is not None:
        from megatron_omni.data.trl_pairs import records_of_pairs

        yield _told(records_of_pairs(words.trl))


def _told(made: "MadeRecords") -> Path:
    print(f"wrote {made.path}: {made.num_records} records")
    for reason, number in made.rejected.most_common():
        print(f"  left out ({reason}): {number}")
    for message in made.messages:
        print(f"  {message}")
    if made.kept is not None:
        print(f"  what was there before is kept as {made.kept}")
    return made.path


def _source(path: str, words: argparse.Namespace) -> "SourceConfig":
    """A source for files named on the command line."""
    from megatron_omni.config.data import SourceConfig

    return SourceConfig(name=_name(path), path=path, prompt=words.prompt, root=words.root)


def _name(path: str) -> str:
    """A name for a source that has only a path: usable as a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(path).name.partition(".")[0]) or "data"


def _report(summary: dict[str, Any], file: Path, max_bad: float) -> int:
    """Print a summary and write it; 2 when too much of the source is unusable."""
    import json

    from megatron_omni.data.summary import summary_lines

    print("\n".join(summary_lines(summary)))
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
    bad = summary["records"] - summary["usable"]
    if not summary["usable"]:
        print(f"error: none of the {bad} records of {summary['source']} can be used", file=sys.stderr)
        return 2
    if bad > max_bad * summary["records"]:
        print(f"error: {bad} of {summary['records']} records of {summary['source']} cannot be used, more than --max-bad "
              f"{max_bad}", file=sys.stderr)  # fmt: skip
        return 2
    return 0


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
