"""A results folder: what an evaluation leaves, and how it is read again. No torch.

    asked.json            what the answers depend on: checkpoint, tasks, settings; another evaluation is refused
    parts/N.jsonl         a line for each sample as it finishes, written by the leader of replica N; merged into
    samples/TASK.jsonl    a line for each sample of a task, by row: :class:`SampleResult` or :class:`SkippedSample`
    summary.json          :class:`Summary`
    table.md              the summary as a table
    changes.jsonl         with --against: the samples whose score is another

A line is written with one call and flushed, so a process that is killed leaves at most one line unfinished, at the end of
a part; the next start drops it and asks that sample again.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from megatron_omni.foreign import parse_json, read_json

FORMAT = 1
"""Of summary.json and the lines of samples/."""
ASKED, PARTS, SAMPLES, SUMMARY, TABLE, CHANGES = (
    "asked.json", "parts", "samples", "summary.json", "table.md", "changes.jsonl",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """One sample that was answered."""

    row: int
    """Place in the task's data, from 0."""
    id: str
    """The record's own ``id``; empty where it has none."""
    prompt: list[dict[str, str]]
    """Turns that were asked, ``{"role", "content"}``, system turn and examples included; media as ``<image>`` markers."""
    media: list[dict[str, str]]
    """``{"kind": "image" | "audio" | "video", "path"}`` of the markers, in their order."""
    expected: list[str]
    """References; any of them is right."""
    options: list[str] | None
    """Of a choice, in the order of their letters."""
    answer: str
    """The whole text, with the thought."""
    thought: str | None
    """Text between ``<think>`` and ``</think>``; None without it."""
    extracted: str | None
    """What the task's rule took from the answer behind the thought; None where it found nothing."""
    score: float | None
    """Of this sample; None where it does not count (an empty reference of WER)."""
    correct: bool | None
    """Where the metric knows right and wrong."""
    statistics: list[float] | None
    """What the metric adds up over samples to the task's score."""
    finish_reason: str
    """``stop`` or ``length``."""
    seconds: float
    """From the submission to the end of the answer; samples are computed side by side."""
    tokens: int
    """Of the answer."""
    drawn: str = ""
    """Of kind ``image``: the drawn picture, in the results folder."""
    wanted: str = ""
    """The picture that it is compared with, in the results folder."""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """One sample that could not be used, and why."""

    row: int
    id: str
    skipped: str
    """The reason, as in the data's counters: ``missing_media``, ``too_long``, ..."""
    message: str


Line = SampleResult | SkippedSample


@dataclass(kw_only=True)
class TaskSummary:
    """One task's outcome."""

    file: str
    """The task file, or the data of a bare JSONL task."""
    digest: str
    """SHA-256 over the task's settings and the bytes of its data and examples, without where they lie."""
    metric: str
    metric_settings: dict[str, Any]
    metric_version: str
    """Metric, version, normaliser and libraries."""
    rule: str
    """How the answer is taken from the text."""
    higher_is_better: bool
    score: float | None
    """None where no sample counts."""
    stderr: float | None
    """Standard error: of the mean, or of 1,000 bootstrap draws of the samples where the score is no mean."""
    count: int
    """Samples that count."""
    skipped: dict[str, int]
    """Samples that could not be used, by reason."""
    unparsed: int
    """Answers in which the rule found nothing. They count as wrong."""
    changed_by_rule: int
    """Answers of which the rule took something else than their whole text."""
    not_scored: int
    """Answers that do not count (an empty reference)."""
    finish_reasons: dict[str, int]
    first_prompt: str
    """The prompt of the first sample, as the template renders it; media as markers."""
    group: str


@dataclass(kw_only=True)
class GroupSummary:
    """Tasks that are reported together."""

    score: float | None
    """Mean of the tasks' scores, each counting the same."""
    tasks: list[str]


@dataclass(kw_only=True)
class CheckpointFacts:
    """Whose answers these are."""

    path: str
    iteration: int | None
    digest: str
    """SHA-256 of the checkpoint's manifest, which has the hash of every file."""


@dataclass(kw_only=True)
class Summary:
    """``summary.json``."""

    format: int = FORMAT
    checkpoint: CheckpointFacts
    version: str
    """Of this package."""
    ranks: int
    wall_seconds: float
    """From the first request to the end of the last answer, of this start."""
    step_seconds: float
    """Of those, inside ``Engine.step()`` on rank 0."""
    tasks: dict[str, TaskSummary]
    groups: dict[str, GroupSummary]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of ``summary.json``."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n"


def read_summary(folder: Path) -> Summary:
    """The summary of a results folder; ValueError where there is none, or of another format."""
    path = folder / SUMMARY
    if not path.is_file():
        raise ValueError(f"{folder}: no {SUMMARY} there; give the --out folder of an evaluation that has finished")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path}: no summary of format {FORMAT}; evaluate again with this version")
    values["checkpoint"] = CheckpointFacts(**values["checkpoint"])
    values["tasks"] = {name: TaskSummary(**task) for name, task in values["tasks"].items()}
    values["groups"] = {name: GroupSummary(**group) for name, group in values["groups"].items()}
    return Summary(**values)


def read_samples(folder: Path, task: str) -> list[Line]:
    """The lines of a task's samples, by row; none where there is no file."""
    path = folder / SAMPLES / f"{task}.jsonl"
    if not path.is_file():
        return []
    return [to_line(values) for values in _whole_lines(path)]


def to_line(values: Mapping[str, Any]) -> Line:
    """The line of its JSON values."""
    return SkippedSample(**values) if "skipped" in values else SampleResult(**values)


def write_line(file: TextIO, task: str, line: Line) -> None:
    """Append to a part; what is written is on its way to the disk when this returns."""
    file.write(json.dumps({"task": task, **dataclasses.asdict(line)}, ensure_ascii=False) + "\n")
    file.flush()


def merge_parts(folder: Path, tasks: Mapping[str, object]) -> dict[str, dict[int, Line]]:
    """What the folder holds of ``tasks``, by row, and the parts taken into ``samples/``. Only one process calls this."""
    found: dict[str, dict[int, Line]] = {
        task: {line.row: line for line in read_samples(folder, task)} for task in tasks
    }
    parts = sorted((folder / PARTS).glob("*.jsonl"))
    for part in parts:
        for values in _whole_lines(part):
            task = values.pop("task")
            line = to_line(values)
            found[task].setdefault(line.row, line)
    if parts:
        (folder / SAMPLES).mkdir(exist_ok=True)
        for task, lines in found.items():
            write_samples(folder, task, lines)
        for part in parts:
            part.unlink()
    return found


def write_samples(folder: Path, task: str, lines: Mapping[int, Line]) -> None:
    """Replace ``samples/TASK.jsonl``: a reader sees the old one or the new one."""
    path = folder / SAMPLES / f"{task}.jsonl"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for _, line in sorted(lines.items()):
            file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")
    partial.replace(path)


def _whole_lines(part: Path) -> Iterator[dict[str, Any]]:
    with part.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):  # the last one may have been interrupted
                yield parse_json(line, f"{part}:{number}")


def counted(lines: Mapping[int, Line]) -> tuple[list[SampleResult], dict[str, int]]:
    """The samples that were answered, by row, and how many were skipped, by reason."""
    in_order = [line for _, line in sorted(lines.items())]
    skipped = Counter(line.skipped for line in in_order if isinstance(line, SkippedSample))
    return [line for line in in_order if isinstance(line, SampleResult)], dict(sorted(skipped.items()))
