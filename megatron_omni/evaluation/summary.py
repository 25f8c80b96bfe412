"""Lines of samples -> a task's summary, the groups' means and the table."""

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_omni.evaluation.asking import prompt_text
from megatron_omni.evaluation.results import GroupSummary, Line, SampleResult, SkippedSample, TaskSummary, counted
from megatron_omni.evaluation.task import Task
from megatron_omni.evaluation.uncertainty import score_of, standard_error


def summarise(task: Task, lines: Mapping[int, Line]) -> TaskSummary:
    """What the samples of a task come to."""
    answers, skipped = counted(lines)
    statistics = [line.statistics for line in answers if line.statistics is not None]
    reads_answers = task.metric.asks == "answer"
    return TaskSummary(
        file=task.file,
        digest=task.digest,
        metric=task.config.metric,
        metric_settings=task.config.metric_settings,
        metric_version=task.metric.version,
        rule=task.rule_name if reads_answers else "",
        higher_is_better=task.metric.higher_is_better,
        score=score_of(task.metric, statistics),
        stderr=standard_error(task.metric, statistics),
        count=len(statistics),
        skipped=skipped,
        unparsed=sum(line.extracted is None for line in answers) if reads_answers else 0,
        changed_by_rule=sum(map(_changed, answers)) if reads_answers else 0,
        not_scored=len(answers) - len(statistics),
        finish_reasons=dict(sorted(Counter(line.finish_reason for line in answers).items())),
        first_prompt=prompt_text(answers[0].prompt, task.config.thinking) if answers else "",
        group=task.config.group,
    )


def _changed(line: SampleResult) -> bool:
    """Whether the rule took something else than all that stands behind the thought."""
    said = line.answer if line.thought is None else line.answer.rpartition("</think>")[2]
    return line.extracted is not None and line.extracted != said.strip()


def groups_of(tasks: Mapping[str, TaskSummary]) -> dict[str, GroupSummary]:
    """Means of the tasks that name a group; None where one of them has no score."""
    groups: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if task.group:
            groups.setdefault(task.group, []).append(name)
    return {group: GroupSummary(score=_mean([tasks[name].score for name in names]), tasks=names)
            for group, names in groups.items()}  # fmt: skip


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known and len(known) == len(scores) else None


def table(tasks: Mapping[str, TaskSummary], groups: Mapping[str, GroupSummary]) -> str:
    """Markdown, for the screen too: columns have one width."""
    rows = [("task", "metric", "score", "+-", "count", "skipped", "unparsed", "cut off")]
    for name, task in tasks.items():
        rows.append(
            (
                name,
                f"{task.metric}{'' if task.higher_is_better else ' (lower is better)'}",
                _number(task.score),
                _number(task.stderr),
                str(task.count),
                str(sum(task.skipped.values())),
                str(task.unparsed),
                str(task.finish_reasons.get("length", 0)),
            )
        )
    rows += [(f"mean of {name}", "", _number(group.score), "", "", "", "", "") for name, group in groups.items()]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def unused(lines: Mapping[int, Line], where: str, *, most: int = 5) -> list[str]:
    """Which samples could not be used, for people: the first ``most``."""
    skipped = [line for _, line in sorted(lines.items()) if isinstance(line, SkippedSample)]
    said = [f"{where}: row {line.row} was not asked ({line.skipped}): {line.message}" for line in skipped[:most]]
    return said + ([f"{where}: and {len(skipped) - most} more"] if len(skipped) > most else [])
