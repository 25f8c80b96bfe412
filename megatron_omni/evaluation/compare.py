"""Two results folders of the same tasks: what got better, what worse, and whether that may be chance.

Samples are paired by row. Their scores are compared one by one; the tasks' by a paired bootstrap (uncertainty.py).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_omni.evaluation.results import SampleResult, Summary, TaskSummary, read_samples, read_summary
from megatron_omni.evaluation.summary import aligned
from megatron_omni.evaluation.uncertainty import Paired, paired, sign_test
from megatron_omni.scoring import open_metric

SHOWN_CHANGES = 10
SHOWN_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class Change:
    """A sample whose score is another; a line of changes.jsonl."""

    task: str
    row: int
    id: str
    better: bool
    before: float | None
    after: float | None
    expected: list[str]
    answer_before: str
    answer_after: str


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """One task in both folders."""

    task: str
    common: int
    """Samples that count in both."""
    better: int
    worse: int
    difference: Paired | None
    sign_p: float
    changes: list[Change]


def check_comparable(tasks: dict[str, str], other: Path) -> Summary:
    """The summary of the folder ``other``; ValueError unless it has the tasks of these digests, naming which it has not."""
    summary = read_summary(other)
    missing = [name for name in tasks if name not in summary.tasks]
    if missing:
        have = ", ".join(summary.tasks)
        raise ValueError(f"{other}: has no results of {', '.join(missing)} (it has {have}); compare the same tasks")
    changed = [name for name, digest in tasks.items() if summary.tasks[name].digest != digest]
    if changed:
        raise ValueError(
            f"{other}: {', '.join(changed)} is another task there (its settings, records or examples differ); compare results "
            "of the same task files"
        )
    return summary


def compare(before: Path, after: Path, *, seed: int = 0) -> list[TaskComparison]:
    """The tasks of ``after``, against those of ``before``; ValueError where they are not the same."""
    summary = read_summary(after)
    check_comparable({name: task.digest for name, task in summary.tasks.items()}, before)
    return [_task(before, after, name, task, seed) for name, task in summary.tasks.items()]


def _task(before: Path, after: Path, name: str, task: TaskSummary, seed: int) -> TaskComparison:
    old, new = (_counting(folder, name) for folder in (before, after))
    rows = sorted(old.keys() & new.keys())
    changes = [_change(name, old[row], new[row], task) for row in rows if old[row].score != new[row].score]
    better = sum(change.better for change in changes)
    metric = open_metric(task.metric, task.metric_settings)
    statistics = [[side[row].statistics or [] for row in rows] for side in (old, new)]
    return TaskComparison(
        task=name,
        common=len(rows),
        better=better,
        worse=len(changes) - better,
        difference=paired(metric, statistics[0], statistics[1], seed=seed),
        sign_p=sign_test(better, len(changes) - better),
        changes=changes,
    )


def _counting(folder: Path, task: str) -> dict[int, SampleResult]:
    lines = read_samples(folder, task)
    return {line.row: line for line in lines if isinstance(line, SampleResult) and line.statistics is not None}


def _change(name: str, old: SampleResult, new: SampleResult, task: TaskSummary) -> Change:
    risen = (new.score or 0.0) > (old.score or 0.0)
    return Change(
        task=name, row=new.row, id=new.id, better=risen == task.higher_is_better, before=old.score, after=new.score,
        expected=new.expected, answer_before=old.answer, answer_after=new.answer,
    )  # fmt: skip


def write_changes(path: Path, comparisons: Sequence[TaskComparison]) -> None:
    """One changed sample a line."""
    lines = [json.dumps(asdict(change), ensure_ascii=False) for one in comparisons for change in one.changes]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def comparison_table(comparisons: Sequence[TaskComparison]) -> str:
    """Markdown: a row a task, and the first changes of each."""
    rows = [("task", "before", "after", "difference", "95 %", "p", "better", "worse", "p (sign)", "samples")]
    for one in comparisons:
        d = one.difference
        figures = ("-",) * 5 if d is None else (
            f"{d.first:.4f}", f"{d.second:.4f}", f"{d.second - d.first:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", f"{d.p:.3f}",
        )  # fmt: skip
        rows.append((one.task, *figures, str(one.better), str(one.worse), f"{one.sign_p:.3f}", str(one.common)))
    changes = [change for one in comparisons for change in one.changes]
    if not changes:
        return aligned(rows) + "\n\nno sample's score changed"
    shown: list[tuple[str, ...]] = [("task", "row", "", "expected", "before", "after")]
    for change in changes[:SHOWN_CHANGES]:
        texts = (change.expected[0], change.answer_before, change.answer_after)
        verdict = "better" if change.better else "worse"
        shown.append((change.task, str(change.row), verdict, *map(_short, texts)))
    more = len(changes) - SHOWN_CHANGES
    rest = f"\n\nand {more} more samples changed" if more > 0 else ""
    return f"{aligned(rows)}\n\n{aligned(shown)}{rest}"


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 3]}..."
