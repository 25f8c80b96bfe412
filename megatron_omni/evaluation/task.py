"""Tasks: what is asked, what is expected, and how answers are scored.

A task is a YAML file (:class:`TaskConfig`; several in one file under ``tasks``), a JSONL file of records with a metric, a
set that is shipped (``sets/``), or a held-out set of the checkpoint's recipe that names a metric. Records are those of
training (data/record.py) with two more keys:

    expected   the reference, or a list of them; else the record's final assistant turn
    options    of a choice: a list of texts, or {letter: text}

:func:`open_task` reads every row once: what can never be scored is one error, before a model is loaded. A row that cannot
be read at all is skipped later, and counted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_omni.config.data import EvalSourceConfig, SourceConfig
from megatron_omni.config.load import load_config, read_mapping
from megatron_omni.config.ranges import file_path, number, out_of_range
from megatron_omni.config.shards import shard_paths
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sizes import spoken_answer
from megatron_omni.data.sources import Source, check_name, open_source
from megatron_omni.evaluation.judges.load import JudgeOf, open_judge
from megatron_omni.evaluation.picture_task import (
    DrawingConfig,
    has_one_picture,
    open_drawing_metric,
    open_picture_judge,
    swept,
)
from megatron_omni.generation.request import MAX_STOP_STRINGS, Sampling
from megatron_omni.scoring import Metric, nearest, open_metric
from megatron_omni.scoring.choice import LETTERS, letter_of
from megatron_omni.scoring.rules import Rule, open_rule

SETS = Path(__file__).with_name("sets")


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are chosen, as generation/request.py has it; the default is greedy."""

    temperature: float = number(0.0, at_least=0)
    top_p: float = number(1.0, above=0, at_most=1)
    top_k: int = number(0, at_least=0)
    min_p: float = number(0.0, at_least=0, at_most=1)
    repetition_penalty: float = number(1.0, above=0)
    seed: int = number(0, at_least=0)
    """With the row it names a sample's draws."""


@dataclass(kw_only=True)
class FewShotConfig:
    """Examples before the question."""

    data: str = file_path()
    """A JSONL file of records with answers, beside the task's data; its media are put before the question's."""
    count: int = number(1, at_least=1, at_most=1000)
    """The first so many records of it."""


@dataclass(kw_only=True)
class TaskConfig:
    """A task file."""

    name: str = ""
    """Names the task in tables and files; empty: the file's name."""
    data: str = file_path()
    """Records, as ``path`` of a recipe's source; relative to the task file, or to ``--data``."""
    root: str = file_path("")
    """Folder that media paths are relative to; empty: that of the records."""
    group: str = ""
    """Tasks of a group have a mean."""
    kind: Literal["text", "speech", "image"] = "text"
    """``speech``: a speech generator speaks the records' spoken answers, and ``judge`` hears what is scored. ``image``: pictures
    are drawn, and compared with the records' targets or seen by ``judge``."""
    judge: str = ""
    """Of kind ``speech``: ``words``, ``voice``, or ``FILE.py:NAME`` of yours (judges/load.py). Of kind ``image``: ``FILE.py:NAME``
    (picture_task.py)."""
    judge_settings: dict[str, Any] = field(default_factory=dict)
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    """Of kind ``image``: steps and guidance, and a sweep over them."""
    metric: str = ""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    rule: str = ""
    """How the answer is taken from the text (rules.py); empty: the metric's own."""
    system_prompt: str = ""
    """System turn; empty: the recipe's. A record's own follows it."""
    thinking: bool | None = None
    """True: the system prompt that asks for a thought comes first (paper, A.3). False: answers begin behind an empty
    thought. None: as the checkpoint was trained. No part of what a task is: both ways can be compared."""
    few_shot: FewShotConfig | None = None
    show_options: bool = False
    """Write a record's options as lettered lines behind its question; else the question has them already."""
    shuffle_options: int | None = None
    """Seed of another order of the options for every row; needs ``show_options``."""
    max_new_tokens: int = number(128, at_least=1, at_most=10**6)
    """Longest answer; less where the model's sequence leaves less room."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer and are no part of it."""
    limit: int | None = number(None, at_least=1)
    """The first so many records; null: all."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a record asks and what is right."""

    record: Record
    """Its conversation, up to the question."""
    expected: tuple[str, ...]
    options: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task that has been checked."""

    name: str
    file: str
    config: TaskConfig
    source: Source
    metric: Metric
    rule: Rule
    rule_name: str
    sampling: Sampling
    examples: tuple[Question, ...]
    digest: str
    judge: JudgeOf | None = None
    """Of kind ``speech``, and of kind ``image`` where the metric needs one."""

    def __len__(self) -> int:
        """Rows that are asked."""
        return len(self.source) if self.config.limit is None else min(self.config.limit, len(self.source))

    def question(self, row: int) -> Question:
        """RecordError for a row that cannot be used."""
        return _QUESTIONS[self.config.kind](self.source[row])


def load_tasks(
    words: Sequence[str],
    *,
    eval_sources: Sequence[EvalSourceConfig] = (),
    data: Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> list[Task]:
    """The tasks that a command line names: files, shipped sets, held-out sets of a recipe.

    ``changes`` are fields of :class:`TaskConfig` that the command line gives to all of them. ValueError that names the
    file, the field or row, and the fix.
    """
    tasks: list[Task] = []
    for word in words:
        for file, config, folder in _configs(word, eval_sources, changes or {}):
            tasks += [open_task(one, file=file, folder=data or folder) for one in _swept(config, file)]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise ValueError(f"two tasks are called {task.name!r}; give each its own name")
    _check_groups(tasks)
    return tasks


def _swept(config: TaskConfig, file: str) -> list[TaskConfig]:
    """The task, or that of each value of its sweep."""
    try:
        found = list(swept(config.drawing))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return [dataclasses.replace(config, name=config.name + said, drawing=drawing) for said, drawing in found]


def _check_groups(tasks: Sequence[Task]) -> None:
    for task in tasks:
        for other in tasks:
            together = task.config.group and task.config.group == other.config.group
            if together and task.metric.higher_is_better and not other.metric.higher_is_better:
                raise ValueError(
                    f"group {task.config.group!r}: {task.name} ({task.config.metric}) is better when higher and "
                    f"{other.name} ({other.config.metric}) when lower, so that their mean says nothing; give them "
                    "different groups"
                )


def shipped_sets() -> list[str]:
    """Names of the sets that come with the package."""
    return sorted(path.stem for path in SETS.glob("*.yaml"))


def _configs(
    word: str, eval_sources: Sequence[EvalSourceConfig], changes: Mapping[str, Any]
) -> list[tuple[str, TaskConfig, Path]]:
    """(file, task, folder that its paths are relative to) of a word of the command line."""
    path = Path(word)
    if path.suffix in (".yaml", ".yml"):
        return [(str(path), config, path.parent) for config in _read(path, changes)]
    if path.is_file():
        values = {"name": path.name.partition(".jsonl")[0], "data": path.name, **changes}
        return [(str(path), load_config(TaskConfig, [(str(path), values)], []), path.parent)]
    if word in shipped_sets():
        return [(word, config, Path()) for config in _read(SETS / f"{word}.yaml", changes)]
    for source in eval_sources:
        if source.name == word:
            return [(f"data.eval_sources.{word}", held_out_config(source, changes), Path())]
    known = [*shipped_sets(), *(source.name for source in eval_sources)]
    raise ValueError(
        f"--tasks {word}: no such file, and no set of that name; {nearest(word, known)}, or name a YAML or JSONL file"
    )


def held_out_config(source: EvalSourceConfig, changes: Mapping[str, Any] | None = None) -> TaskConfig:
    """The task of a held-out set of a recipe: training and the command make it of the same fields."""
    values = {
        "name": source.name,
        "data": source.path,
        "root": source.root,
        "metric": source.metric or "",
        "metric_settings": dict(source.metric_settings),
        "rule": source.rule,
        "max_new_tokens": source.max_new_tokens,
        "limit": source.limit,
        **(changes or {}),
    }
    return load_config(TaskConfig, [(f"data.eval_sources.{source.name}", values)], [])


def _read(path: Path, changes: Mapping[str, Any]) -> list[TaskConfig]:
    """The tasks of a YAML file: one, or several under ``tasks``, by name, which share the file's other fields."""
    common = read_mapping(path, "task file")
    several = common.pop("tasks", None)
    if several is None:
        return [_checked(path, {"name": path.stem, **common}, changes)]
    if not isinstance(several, dict) or not all(isinstance(fields, dict) for fields in several.values()):
        raise ValueError(
            f"{path}: tasks is no mapping of task names to their fields; write tasks: {{NAME: {{data: FILE}}}}"
        )
    return [_checked(path, {**common, **fields, "name": str(name)}, changes) for name, fields in several.items()]


def _checked(path: Path, values: dict[str, Any], changes: Mapping[str, Any]) -> TaskConfig:
    config = load_config(TaskConfig, [(str(path), values), ("command line", dict(changes))], [])
    if problem := next(out_of_range(config), None):
        raise ValueError(f"{path}: {config.name}: {problem}")
    return config


def open_task(config: TaskConfig, *, file: str, folder: Path) -> Task:
    """The task of ``config``, whose relative paths are relative to ``folder``; ValueError for what can never be scored."""
    where = file if file.endswith(config.name) else f"{file}: {config.name}"
    try:
        if not config.metric:
            raise ValueError("metric is missing; name one, in the task or with --metric")
        opens = open_drawing_metric if config.kind == "image" else _text_metric
        metric = opens(config.metric, config.metric_settings, folder)
        rule_name = config.rule or metric.rule
        rule = open_rule(rule_name)
        sampling = Sampling(**dataclasses.asdict(config.sampling))
        _check_fields(config, metric)
        source, files = _open(config.name, config.data, config.root, folder)
        examples: tuple[Question, ...] = ()
        if config.few_shot is not None:
            examples, more = _examples(config, config.few_shot, folder)
            files += more
        judge = None
        if config.kind == "speech":
            judge = open_judge(config.judge, config.judge_settings, folder)
        elif config.kind == "image":
            judge = open_picture_judge(config.judge, config.judge_settings, folder, metric)
        files += judge.files if judge is not None else []
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    task = Task(
        name=config.name, file=file, config=config, source=source, metric=metric, rule=rule, rule_name=rule_name,
        sampling=sampling, examples=examples, digest=_digest(config, rule_name, files), judge=judge,
    )  # fmt: skip
    _check_rows(task)
    return task


def _check_fields(config: TaskConfig, metric: Metric) -> None:
    if config.shuffle_options is not None and not config.show_options:
        raise ValueError("shuffle_options needs show_options: the order of options that a question holds is fixed")
    _check_kind(config, metric)
    if len(config.stop) > MAX_STOP_STRINGS or not all(config.stop):
        raise ValueError(f"stop has {len(config.stop)} texts; give at most {MAX_STOP_STRINGS}, none of them empty")
    if metric.asks.startswith("likelihood") and (config.thinking is not None or config.rule):
        raise ValueError(f"metric {config.metric!r} reads no answer: leave out thinking and rule")
    if metric.asks.startswith("picture") and config.rule:
        raise ValueError(f"metric {config.metric!r} compares pictures: leave out rule")


def _check_kind(config: TaskConfig, metric: Metric) -> None:
    """ValueError for what means nothing to the task's kind."""
    if config.kind == "text" and (config.judge or config.judge_settings):
        raise ValueError("judge and judge_settings hear sound; set kind: speech, or leave them out")
    if config.kind == "speech" and metric.asks != "answer":
        raise ValueError(f"metric {config.metric!r} reads no answer, and a judge hears one: give another")
    default = TaskConfig(data="")
    if given := [name for name in _NOT_OF[config.kind] if getattr(config, name) != getattr(default, name)]:
        said = {"text": "a task of answers", "speech": "a speech generator", "image": "a picture"}[config.kind]
        raise ValueError(f"{given[0]} means nothing to {said}; leave it out of a task of kind {config.kind}")


_NOT_OF = {
    "text": ("drawing",),
    "speech": ("system_prompt", "thinking", "few_shot", "stop", "shuffle_options", "show_options", "drawing"),
    "image": ("few_shot", "stop", "shuffle_options", "show_options"),
}
"""Fields that mean nothing to a kind."""


def _text_metric(name: str, settings: Mapping[str, Any], folder: Path) -> Metric:
    return open_metric(name, settings)


def _open(name: str, data: str, root: str, folder: Path) -> tuple[Source, list[Path]]:
    config = SourceConfig(name=name, path=str(folder / data), root=str(folder / root) if root else "")
    check_name(config)
    if tars := [file for file in shard_paths(config.path) if str(file).endswith(".tar")]:
        raise ValueError(f"data: {tars[0]} is a tar, and tasks are JSONL records; write its records into a JSONL file")
    return open_source(config, digest=""), list(map(Path, shard_paths(config.path)))


def _examples(config: TaskConfig, few_shot: FewShotConfig, folder: Path) -> tuple[tuple[Question, ...], list[Path]]:
    source, files = _open(config.name, few_shot.data, config.root, folder)
    if set(files) & set(map(Path, shard_paths(str(folder / config.data)))):
        raise ValueError(
            "few_shot.data is the task's own data, so questions would hold their answers; give another file"
        )
    if len(source) < few_shot.count:
        raise ValueError(f"few_shot.count is {few_shot.count}, but {few_shot.data} has {len(source)} records")
    return tuple(question_of(source[row]) for row in range(few_shot.count)), files


def _check_rows(task: Task) -> None:
    """ValueError for the first row that has no reference, or one that the metric cannot compare with."""
    for row in range(len(task)):
        try:
            question = task.question(row)
        except MissingColumn as error:
            raise ValueError(f"{task.name}: {error}") from error
        except RecordError:
            continue  # unreadable: skipped when its turn comes
        try:
            if task.config.show_options and question.options is None:
                raise ValueError("options is missing, which show_options writes; give the record a list of them")
            task.metric.check(question.expected, question.options)
            if task.config.shuffle_options is not None and any(o.strip() in LETTERS for o in question.options or ()):
                raise ValueError("options are letters, which shuffle_options would mix up with theirs; leave it out")
        except ValueError as error:
            raise ValueError(f"{task.source.where(row)}: {error}") from error


class MissingColumn(ValueError):
    """A record without a reference, or with one that is none."""


def question_of(record: Record) -> Question:
    """The question that a record asks; MissingColumn where it names no reference."""
    has_answer = record.messages[-1].role == "assistant"
    given = record.extra.get("expected")
    if given is None and not has_answer:
        raise MissingColumn(
            f"{record.where}: expected is missing; give the record a key expected, or end it with an assistant turn"
        )
    expected = (record.answer,) if given is None else _texts(given, record.where)
    options = _options(record.extra.get("options"), record.where)
    asked = dataclasses.replace(record, messages=record.messages[:-1]) if has_answer else record
    return Question(record=asked, expected=expected, options=options)


def spoken_question(record: Record) -> Question:
    """What a record has spoken, and what is to be heard: ``expected``, or what is said. MissingColumn without an answer
    that is spoken."""
    speech = spoken_answer(record)
    if speech is None:
        raise MissingColumn(
            f'{record.where}: no spoken answer, which a task of kind speech needs; give an assistant turn "speech"'
        )
    given = record.extra.get("expected")
    expected = (speech.spoken,) if given is None else _texts(given, record.where)
    return Question(record=record, expected=expected, options=_options(record.extra.get("options"), record.where))


def picture_question(record: Record) -> Question:
    """What a record has drawn, and what is to be seen in it: ``expected``, or the words beside it. MissingColumn for a record
    that does not ask for one picture."""
    if not has_one_picture(record):
        raise MissingColumn(
            f"{record.where}: a task of kind image needs a record that ends with one picture to draw: an answer with "
            "<generate>, and its file in targets"
        )
    given = record.extra.get("expected")
    expected = (record.answer,) if given is None else _texts(given, record.where)
    return Question(record=record, expected=expected, options=_options(record.extra.get("options"), record.where))


_QUESTIONS = {"text": question_of, "speech": spoken_question, "image": picture_question}


def _texts(given: object, where: str) -> tuple[str, ...]:
    """References as texts. A list of numbers is one reference: a segment, a box."""
    if isinstance(given, list) and given and all(_is_number(item) for item in given):
        return (json.dumps(given),)
    items = given if isinstance(given, list) else [given]
    texts = tuple(_as_text(item) for item in items)
    if not texts or None in texts:
        raise MissingColumn(f"{where}: expected = {given!r}: write a text, a number, or a list of them")
    return texts  # type: ignore[return-value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_number(item) for item in value):
        return json.dumps(value)
    return str(value) if _is_number(value) else None


def _options(given: object, where: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    if isinstance(given, dict):
        letters = sorted(str(letter).strip("(). ").upper() for letter in given)
        if letters != list(LETTERS[: len(letters)]):
            raise MissingColumn(
                f"{where}: options has the letters {', '.join(letters)}; name them A, B, ... without a gap"
            )
        by_letter = {str(letter).strip("(). ").upper(): text for letter, text in given.items()}
        given = [by_letter[letter] for letter in letters]
    if not isinstance(given, list) or not all(isinstance(item, str) for item in map(_as_text, given)):
        raise MissingColumn(f"{where}: options = {given!r}: write a list of texts, or {{letter: text}}")
    return tuple(str(item) if not isinstance(item, str) else item for item in given)


def expected_letters(question: Question) -> tuple[str, ...]:
    """Letters of the right options."""
    return tuple(letter_of(one, question.options) for one in question.expected)


def _digest(config: TaskConfig, rule_name: str, files: Sequence[Path]) -> str:
    """What scores depend on, whatever it is called and wherever it lies: settings, records, examples."""
    values = dataclasses.asdict(config) | {"rule": rule_name}
    for name in ("name", "data", "root", "group"):
        del values[name]
    if config.kind == "text":  # as it was before there was another
        del values["kind"], values["judge"], values["judge_settings"]
    if config.kind != "image":
        del values["drawing"]
    values["thinking"] = False  # a switch: with and without it is the same task
    if config.few_shot is not None:
        values["few_shot"] = config.few_shot.count
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
