"""Score a trained checkpoint on tasks: answers, scores, standard errors, a comparison with earlier results.

    python -m megatron_omni.cli.evaluate CHECKPOINT --tasks task.yaml quickstart --out DIR
    torchrun --nproc-per-node 2 -m megatron_omni.cli.evaluate CHECKPOINT --tasks held_out.jsonl --metric exact_match --out DIR \
        parallel.tensor_model_parallel_size=2
    megatron-omni evaluate --compare DIR OTHER

A task is a YAML file, a JSONL file of records with --metric, a set that comes with the package, or a held-out set of the
checkpoint's recipe (docs/evaluation.md). DIR gets samples/TASK.jsonl with a line for each sample, summary.json, table.md
and index.html, a page to leaf through. The same command goes on after a kill with the samples that are not there yet. Exit
status 2 for bad input, with one ``error:`` line. torch is imported after the command line has been accepted.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_omni.cli.generate import OVERRIDES, add_think
from megatron_omni.cli.starting import Parser, check_directory, refused, run_on_ranks, say_starting
from megatron_omni.config.outcome import EXIT_BAD_INPUT


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command line, checked as far as that goes without reading a file."""

    checkpoint: Path | None
    """None: compare two folders."""
    tasks: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of all tasks."""
    data: Path | None = None
    out: Path | None = None
    against: Path | None = None
    compare: tuple[Path, Path] | None = None
    seed: int = 0
    batch_size: int = 32
    threads: int = 2
    deterministic: bool = False
    codec: Path | None = None
    vae: Path | None = None
    overrides: list[str] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        prog="megatron-omni evaluate",
        description="Score a trained checkpoint on tasks, or compare two results folders.",
        epilog="The sizes of the layout default to 1 whatever the checkpoint was trained on; what is left of the world size "
        "shares the samples. The same command goes on with a results folder that a killed one has left.",
    )
    p.add_argument(
        "checkpoint", type=Path, nargs="?", help="run directory, or one of its checkpoints/iter_* directories"
    )
    p.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="task YAML, JSONL of records (with --metric), name "
                   "of a shipped set, or of a held-out set of the recipe")  # fmt: skip
    p.add_argument("--out", type=Path, metavar="DIR", help="results folder")
    p.add_argument("--against", type=Path, metavar="DIR", help="compare with this results folder of the same tasks")
    p.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="compare two results folders, no model"
    )
    p.add_argument("--data", type=Path, metavar="DIR", help="folder that the tasks' data are relative to (default: the task "
                   "file's; of a shipped set, the working directory)")  # fmt: skip
    p.add_argument("--metric", metavar="NAME", help="metric of all tasks, in place of their own")
    p.add_argument("--rule", metavar="RULE", help="how the answer is taken from the text, in place of the tasks' own")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer, in place of the tasks' own")
    p.add_argument("--limit", type=int, metavar="N", help="the first N records of each task")
    add_think(p)
    p.add_argument("--batch-size", type=int, default=32, metavar="N", help="answers computed together (default 32)")
    p.add_argument(
        "--threads", type=int, default=2, metavar="N", help="threads of a rank that decode ahead (default 2)"
    )
    p.add_argument("--codec", type=Path, metavar="DIR", help="of tasks of kind speech: folder of the codec (default: that "
                   "of the recipe)")  # fmt: skip
    p.add_argument("--vae", type=Path, metavar="DIR", help="of tasks of kind image: folder of the codec of pictures (default: "
                   "that of the recipe)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the comparison's draws (default 0)")
    p.add_argument(
        "--deterministic", action="store_true", help="the same bits whatever is answered beside it (one rank; slow)"
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help=f"one of {', '.join(OVERRIDES)}")
    return p


def parse(argv: Sequence[str] | None = None) -> Request:
    """The checked command line. ValueError names what is wrong."""
    args = parser().parse_intermixed_args(argv)
    # "--tasks a b key=value": argparse takes the last word for a task.
    is_override = {word: word.partition("=")[0] in OVERRIDES and "=" in word for word in args.tasks}
    tasks = [word for word in args.tasks if not is_override[word]]
    overrides = [*args.overrides, *(word for word in args.tasks if is_override[word])]
    if args.compare is not None:
        if args.checkpoint is not None or tasks or args.out is not None or args.against is not None:
            raise ValueError("--compare takes two results folders and nothing else")
        return Request(checkpoint=None, compare=tuple(args.compare), seed=args.seed)
    if args.checkpoint is None:
        raise ValueError("no checkpoint; give a run directory, or --compare and two results folders")
    if not tasks:
        raise ValueError("--tasks names no task; give a task file or a name")
    if args.out is None:
        raise ValueError("--out is missing; name the results folder")
    for word in overrides:
        if word.partition("=")[0] not in OVERRIDES:
            raise ValueError(f"override {word!r}: evaluation knows {', '.join(OVERRIDES)}")
    for name in ("max_new_tokens", "limit", "batch_size", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    check_directory(args.checkpoint)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: exists and is no directory")
    if args.data is not None and not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder")
    if args.against is not None and args.against.absolute() == args.out.absolute():
        raise ValueError("--against is the folder of --out; compare with another one")
    names = {
        "metric": "metric",
        "rule": "rule",
        "max_new_tokens": "max_new_tokens",
        "limit": "limit",
        "think": "thinking",
    }
    given = {field: getattr(args, name) for name, field in names.items()}
    changes = {name: value for name, value in given.items() if value is not None}
    return Request(
        checkpoint=args.checkpoint,
        tasks=tasks,
        changes=changes,
        data=args.data,
        out=args.out,
        against=args.against,
        seed=args.seed,
        batch_size=args.batch_size,
        threads=args.threads,
        deterministic=args.deterministic,
        codec=args.codec,
        vae=args.vae,
        overrides=overrides,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, and turn what happened into an exit status."""
    try:
        request = parse(argv)
        if request.compare is not None:
            return compare(request.compare, seed=request.seed)
    except ValueError as error:
        return refused(error)
    say_starting("evaluate", request.checkpoint)
    return run_on_ranks(partial(run, request))


def compare(folders: tuple[Path, Path], *, seed: int) -> int:
    """Print how the second folder differs from the first; its changes.jsonl and its page say of which samples."""
    from megatron_omni.evaluation.compare import compare as compared
    from megatron_omni.evaluation.compare import comparison_table, write_changes
    from megatron_omni.evaluation.page import write_page
    from megatron_omni.evaluation.results import CHANGES

    before, after = folders
    comparisons = compared(before, after, seed=seed)
    write_changes(after / CHANGES, comparisons)
    print(comparison_table(comparisons))
    print(f"\nto leaf through: {write_page(after, before)}")
    return 0


def run(request: Request) -> int:
    """Evaluate; the exit status."""
    from megatron_omni.evaluation.evaluate import evaluate, held_out_sets
    from megatron_omni.evaluation.task import load_tasks
    from megatron_omni.generation.load import open_checkpoint

    assert request.checkpoint is not None and request.out is not None
    tasks = load_tasks(
        request.tasks, eval_sources=held_out_sets(request.checkpoint), data=request.data, changes=request.changes
    )
    summary = evaluate(
        open_checkpoint(request.checkpoint, overrides=request.overrides),
        tasks,
        out=request.out,
        batch_size=request.batch_size,
        threads=request.threads,
        deterministic=request.deterministic,
        changes=[word for word in request.overrides if word.startswith("data.")],
        against=request.against,
        seed=request.seed,
        codec=request.codec,
        vae=request.vae,
    )
    if summary is not None and not any(task.count for task in summary.tasks.values()):
        print(f"error: no sample of any task could be used; {request.out} says why of each", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
