"""The evaluation of a checkpoint into a results folder (results.py): start, go on after a kill, finish, compare."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_omni.checkpoint.commit import CHECKPOINTS, MANIFEST, iteration_dir, tracked_step, write_text
from megatron_omni.checkpoint.distributed import RUN_CONFIG
from megatron_omni.config.data import EvalSourceConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.data.codes import codec_fingerprint
from megatron_omni.evaluation.compare import check_comparable, compare, comparison_table, write_changes
from megatron_omni.evaluation.hearing import check_kinds, hear_all
from megatron_omni.evaluation.page import write_page
from megatron_omni.evaluation.results import (
    ASKED,
    CHANGES,
    PARTS,
    SAMPLES,
    SUMMARY,
    TABLE,
    CheckpointFacts,
    Line,
    Summary,
    merge_parts,
    write_line,
    write_samples,
)
from megatron_omni.evaluation.running import Times, ask_all, limits_for
from megatron_omni.evaluation.seeing import drawer_of, see_all, summary_of_set
from megatron_omni.evaluation.summary import groups_of, summarise, table, unused
from megatron_omni.evaluation.sweep import write_sweep
from megatron_omni.evaluation.task import Task
from megatron_omni.foreign import read_bytes, read_json
from megatron_omni.generation.load import Checkpoint
from megatron_omni.parallel.groups import replica

SAY_SECONDS = 30.0
"""Between two lines of progress, where they are not one line of a terminal."""


def evaluate(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    *,
    out: Path,
    batch_size: int,
    threads: int,
    deterministic: bool = False,
    changes: Sequence[str] = (),
    against: Path | None = None,
    seed: int = 0,
    codec: Path | None = None,
    vae: Path | None = None,
) -> Summary | None:
    """Ask what ``out`` has no line of, then score and write; all ranks together. The summary, on rank 0.

    ``changes`` are overrides of the recipe that answers depend on, ``codec`` the folder of a speech generator's, ``vae`` that of
    the codec of pictures, by default as its recipe says. ValueError where ``out`` holds another evaluation, or ``against`` other
    tasks, before the weights are loaded.
    """
    facts = facts_of(checkpoint)
    codec = check_kinds(checkpoint, tasks, codec)
    settings: dict[str, Any] = {"changes": sorted(changes), "deterministic": deterministic}
    if thinking := {task.name: task.config.thinking for task in tasks if task.config.thinking is not None}:
        settings["thinking"] = thinking
    if codec is not None:
        settings["codec"] = codec_fingerprint(codec)
    drawing = [task for task in tasks if task.config.kind == "image"]
    if drawing:
        settings["vae"] = drawer_of(checkpoint, drawing[0], vae).codec.fingerprint
    elif vae is not None:
        raise ValueError("--vae means nothing to tasks without pictures; leave it out")
    asked = {
        "checkpoint": asdict(facts), "settings": settings, "tasks": {task.name: task.digest for task in tasks},
    }  # fmt: skip
    done = _started(out, asked, tasks, against)
    todo = sum(len(task) - len(done[task.name]) for task in tasks)
    times = Times()
    if todo:
        part = out / PARTS / f"{checkpoint.pg.dp.rank()}.jsonl"
        with part.open("a", encoding="utf-8") if replica(checkpoint.pg).rank() == 0 else open(os.devnull, "w") as file:

            def finished(task: str, line: Line) -> None:
                write_line(file, task, line)

            progress = _Progress() if dist.get_rank() == 0 else lambda done, total: None
            if codec is not None:
                times = hear_all(
                    checkpoint, tasks, codec=codec, out=out, batch_size=batch_size, deterministic=deterministic,
                    finished=finished, done=done, progress=progress,
                )  # fmt: skip
            else:
                model = checkpoint.load_model()
                times = ask_all(
                    model,
                    checkpoint.builder,
                    [task for task in tasks if task.config.kind == "text"],
                    pg=checkpoint.pg,
                    limits=limits_for(batch_size, deterministic=deterministic),
                    finished=finished,
                    done=done,
                    threads=threads,
                    progress=progress,
                )
                times += see_all(
                    checkpoint, model, drawing, vae=vae, out=out, batch_size=batch_size, deterministic=deterministic,
                    finished=finished, done=done, progress=progress,
                )  # fmt: skip
    if dist.get_world_size() > 1:
        dist.barrier()  # a network file system shows what is written when its file is closed
    if dist.get_rank() != 0:
        return None
    settings |= {"batch_size": batch_size, "threads": threads, "parallel": asdict(checkpoint.recipe.parallel)}
    return _finish(out, tasks, facts, times, settings, against, seed)


def held_out_sets(path: Path) -> list[EvalSourceConfig]:
    """``data.eval_sources`` of the recipe of a run or checkpoint directory; none where that is not found."""
    step = tracked_step(path / CHECKPOINTS)
    config = (path if step is None else iteration_dir(path / CHECKPOINTS, step)) / RUN_CONFIG
    return load_recipe(config).data.eval_sources if config.is_file() else []


def facts_of(checkpoint: Checkpoint) -> CheckpointFacts:
    """Which checkpoint this is, wherever it lies."""
    directory = checkpoint.directory
    step = directory.name.removeprefix("iter_")
    return CheckpointFacts(
        path=str(directory.absolute()),
        iteration=int(step) if step.isdigit() else None,
        digest=sha256(read_bytes(directory / MANIFEST)).hexdigest(),
    )


def _started(out: Path, asked: dict[str, Any], tasks: Sequence[Task], against: Path | None) -> dict[str, set[int]]:
    """The rows that ``out`` has, from rank 0 for all; ValueError on all for a folder of another evaluation."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            if against is not None:
                check_comparable(asked["tasks"], against)
            box = [_rows_there(out, asked, tasks)]
        except (ValueError, OSError) as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def _rows_there(out: Path, asked: dict[str, Any], tasks: Sequence[Task]) -> dict[str, set[int]]:
    out.mkdir(parents=True, exist_ok=True)
    if (out / ASKED).is_file():
        _require_same(out, read_json(out / ASKED), asked)
    elif (out / SAMPLES).exists() or (out / PARTS).exists():
        raise ValueError(f"{out}: holds results without {ASKED}, so nobody knows of what; give another --out")
    (out / PARTS).mkdir(exist_ok=True)
    (out / SAMPLES).mkdir(exist_ok=True)
    write_text(out / ASKED, json.dumps(asked, indent=1) + "\n")
    there = merge_parts(out, {task.name: None for task in tasks})
    return {task: set(lines) for task, lines in there.items()}


def _require_same(out: Path, was: dict[str, Any], asked: dict[str, Any]) -> None:
    advice = "give another --out, or remove the folder"
    if was["checkpoint"]["digest"] != asked["checkpoint"]["digest"]:
        raise ValueError(
            f"{out}: holds results of another checkpoint ({was['checkpoint']['path']}, not {asked['checkpoint']['path']}); "
            f"{advice}"
        )
    if was["tasks"].keys() != asked["tasks"].keys():
        raise ValueError(f"{out}: holds results of {_names(was)}, not of {_names(asked)}; {advice}")
    changed = [name for name, digest in asked["tasks"].items() if was["tasks"][name] != digest]
    if changed:
        raise ValueError(
            f"{out}: holds results of another task {', '.join(changed)} (its settings, records or examples have changed); "
            f"{advice}"
        )
    if was["settings"] != asked["settings"]:
        said = ", ".join(f"{name} was {was['settings'].get(name)}" for name, value in asked["settings"].items()
                         if was["settings"].get(name) != value)  # fmt: skip
        raise ValueError(f"{out}: holds results with other settings ({said}); {advice}")


def _names(asked: dict[str, Any]) -> str:
    return ", ".join(sorted(asked["tasks"]))


def _finish(
    out: Path,
    tasks: Sequence[Task],
    facts: CheckpointFacts,
    times: Times,
    settings: dict[str, Any],
    against: Path | None,
    seed: int,
) -> Summary:
    there = merge_parts(out, {task.name: None for task in tasks})
    for task in tasks:
        write_samples(out, task.name, there[task.name])
        for said in unused(there[task.name], task.name):
            print(said, file=sys.stderr)
    summaries = {
        task.name: summary_of_set(task, summarise(task, there[task.name]), there[task.name], out) for task in tasks
    }
    summary = Summary(
        checkpoint=facts,
        version=version("megatron-omni"),
        ranks=dist.get_world_size(),
        wall_seconds=round(times.wall, 3),
        step_seconds=round(times.step, 3),
        tasks=summaries,
        groups=groups_of(summaries),
        settings=settings,
    )
    text = table(summaries, summary.groups)
    write_text(out / SUMMARY, summary.to_json())
    if against is not None:
        comparisons = compare(against, out, seed=seed)
        write_changes(out / CHANGES, comparisons)
        text += f"\n\nagainst {against}:\n\n{comparison_table(comparisons)}"
    write_text(out / TABLE, text + "\n")
    print(text)
    if (figure := write_sweep(out, summaries)) is not None:
        print(f"\nthe sweep: {figure}")
    print(f"\nto leaf through: {write_page(out, against)}")
    return summary


class _Progress:
    """How many samples are done, and how long the rest will take: a line that is written over on a terminal, else one every
    :data:`SAY_SECONDS`."""

    def __init__(self) -> None:
        self._start = self._said = time.monotonic()
        self._first: int | None = None
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now
        if now - self._said < (0.2 if self._terminal else SAY_SECONDS) and done < total:
            return
        self._said = now
        rate = (done - self._first) / (now - self._start) if now > self._start else 0.0
        left = f", {_duration((total - done) / rate)} left" if rate and done < total else ""
        text = f"{done:,} of {total:,} samples, {rate:.1f} a second{left}"
        end = "\n" if done == total or not self._terminal else ""
        print(f"\r{text:<70}" if self._terminal else text, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
