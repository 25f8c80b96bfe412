"""A row of a task -> requests to the engine, and their results -> a line of the results folder."""

import dataclasses
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.config.thinking import THINK, THINK_END
from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.record import KINDS, LIST_FIELD, Kind, Message, Record, RecordError, internal_error
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.template import answer_beginning, asked, headed
from megatron_omni.evaluation.results import Line, SampleResult, SkippedSample
from megatron_omni.evaluation.task import Question, Task, expected_letters
from megatron_omni.generation.batches import Result
from megatron_omni.generation.request import Request
from megatron_omni.generation.sampling import derived_seed
from megatron_omni.scoring.choice import LETTERS, LikelihoodChoice
from megatron_omni.scoring.likelihood import Perplexity
from megatron_omni.scoring.metric import Scored

_FIRST_EXAMPLE = 10**12
"""Number of the first example where rows are numbered."""


@dataclass(kw_only=True)
class Asked:
    """A row whose requests are with the engine."""

    task: Task
    row: int
    question: Question
    requests: list[Request]
    labels: list[list[int]]
    """Of likelihoods, places of each request's prompt whose next token is of the answer."""
    submitted: float = 0.0
    refused: bool = False
    results: dict[int, Result] = field(default_factory=dict)
    """By request."""

    def take(self, number: int, result: Result) -> Line | None:
        """The row's line once the last of its requests has finished."""
        self.results[number] = result
        return _line(self) if len(self.results) == len(self.requests) else None

    def refuse(self, error: ValueError) -> SkippedSample:
        """What becomes of a row that the engine does not take."""
        return _skipped(self.row, self.question.record, "too_long", str(error))


def prepare(task: Task, row: int, builder: SampleBuilder, *, name: str) -> Asked | SkippedSample:
    """Decode a row's media and build its requests, called ``NAME.0``, ``NAME.1``, ...; what cannot be used is no error."""
    record: Record | None = None
    try:
        question = shown(task, row)
        think = task.config.thinking
        record = replace(question.record, messages=tuple(asked(question.record.messages, builder.data, think)))
        question = replace(question, record=record)
        if task.metric.asks == "answer":
            requests, labels = [_ask(task, row, builder.build_prompt(record, think=think), builder, f"{name}.0")], []
        else:
            answers = question.expected if task.metric.asks == "likelihood" else question.options or ()
            scored = [_likelihood(record, answer, builder, f"{name}.{i}") for i, answer in enumerate(answers)]
            requests, labels = [request for request, _ in scored], [places for _, places in scored]
        return Asked(task=task, row=row, question=question, requests=requests, labels=labels)
    except (RecordError, MediaError) as error:
        return _skipped(row, record, error.reason, str(error))
    except (OSError, MemoryError):  # the machine's fault, not the record's
        raise
    except Exception as error:
        fault = internal_error(task.source.where(row), error)
        return _skipped(row, record, fault.reason, str(fault))


def _skipped(row: int, record: Record | None, reason: str, message: str) -> SkippedSample:
    return SkippedSample(row=row, id=record.id if record is not None else "", skipped=reason, message=message)


def _ask(task: Task, row: int, prompt: Sample, builder: SampleBuilder, name: str) -> Request:
    room = builder.data.seq_length - prompt.length
    if room < 1:
        raise RecordError(
            task.source.where(row), field="length", value=prompt.length, problem="leaves no room for an answer",
            fix=f"raise data.seq_length ({builder.data.seq_length}) or shorten it", reason="too_long",
        )  # fmt: skip
    return Request(
        name=name,
        prompt=prompt,
        max_new_tokens=min(task.config.max_new_tokens, room),
        sampling=replace(task.sampling, seed=derived_seed(task.sampling.seed, row)),
        stop=tuple(task.config.stop),
        banned_ids=builder.unwritten,
        text=True,
        reasoning=True,
    )


def _likelihood(record: Record, answer: str, builder: SampleBuilder, name: str) -> tuple[Request, list[int]]:
    """A request for the log-probabilities of ``answer``; the engine says one token more, which is not used."""
    turns = tuple(replace(message, learned=False) for message in record.messages)
    sample = builder.build_sample(replace(record, messages=(*turns, Message("assistant", answer))))
    places = (sample.labels != IGNORE_LABEL).nonzero().flatten().tolist()
    return Request(name=name, prompt=sample.without_labels(), max_new_tokens=1, prompt_logprobs=0), places


# ------------------------------------------------------------------------------------------------------ what is asked


def shown(task: Task, row: int) -> Question:
    """The question as the model gets it: system turn, examples and lettered options in their places."""
    question = _with_options(task, row, task.question(row))
    return replace(question, record=_with_examples(task, question.record))


def _with_options(task: Task, row: int, question: Question) -> Question:
    if not task.config.show_options or question.options is None:
        return question
    options = list(question.options)
    expected = question.expected
    if task.config.shuffle_options is not None:
        right = [options[LETTERS.index(letter)] for letter in expected_letters(question)]
        random.Random(derived_seed(task.config.shuffle_options, row)).shuffle(options)
        expected = tuple(LETTERS[options.index(one)] for one in right)
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options))
    *before, last = question.record.messages
    pieces = last.pieces()
    pieces[-1] += lines
    last = Message(last.role, last.content + lines, parts=tuple(pieces))
    record = replace(question.record, messages=(*before, last))
    return Question(record=record, expected=expected, options=tuple(options))


def _with_examples(task: Task, record: Record) -> Record:
    """Examples' turns and media before the record's, and the system turn first."""
    system = [message for message in record.messages if message.role == "system"]
    rest = [message for message in record.messages if message.role != "system"]
    media: dict[Kind, list[Any]] = {kind: [] for kind in KINDS}
    turns: list[Message] = []
    for number, example in enumerate(task.examples):
        example = _with_options(task, _FIRST_EXAMPLE + number, example)
        turns += [message for message in example.record.messages if message.role != "system"]
        turns.append(Message("assistant", _answer_of(task, example), learned=False))
        for kind in KINDS:
            media[kind] += example.record.media(kind)
    files: dict[str, Any] = {LIST_FIELD[kind]: (*media[kind], *record.media(kind)) for kind in KINDS}
    prompt = task.config.system_prompt
    if prompt:  # a record's own comes behind it
        system = headed(system, prompt)
    return replace(record, messages=(*system, *turns, *rest), **files)


def _answer_of(task: Task, example: Question) -> str:
    """What an example answers: as its record says, or with options, the letter that is right."""
    if task.rule_name == "letter" and example.options is not None:
        return expected_letters(example)[0]
    return example.expected[0]


def prompt_text(turns: Sequence[dict[str, str]], think: bool | None) -> str:
    """A prompt as the template renders it (data/template.py), media as markers."""
    said = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return f"{said}<|im_start|>{''.join(answer_beginning(think))}"


def media_of(record: Record) -> list[dict[str, str]]:
    """Kind and path of the media, in the order of their markers."""
    files: dict[str, Iterator[Any]] = {kind: iter(record.media(kind)) for kind in KINDS}
    kinds = [kind for message in record.messages for kind in message.media()]
    return [{"kind": kind, "path": _path(next(files[kind]))} for kind in kinds]


def _path(file: object) -> str:
    return os.path.abspath(file) if isinstance(file, str) else str(file)


# ------------------------------------------------------------------------------------------------ what comes of it


def _line(asked: Asked) -> SampleResult:
    task, question = asked.task, asked.question
    first = asked.results[0]
    answer, thought, extracted, scored = "", None, None, None
    if isinstance(task.metric, Perplexity):
        scored = task.metric.of_answer(_logprobs(asked, 0))
    elif isinstance(task.metric, LikelihoodChoice):
        sums = [sum(_logprobs(asked, number)) for number in range(len(asked.requests))]
        extracted = answer = task.metric.choose(sums, question.options or ())
        scored = task.metric.score(extracted, question.expected, question.options)
    else:
        thought = first.reasoning or None
        answer = whole_text(first)
        extracted = task.rule(first.text, question.options)
        scored = task.metric.score(extracted, question.expected, question.options)
    said = task.metric.asks == "answer"
    return SampleResult(
        row=asked.row,
        id=question.record.id,
        prompt=[{"role": m.role, "content": m.content} for m in question.record.messages],
        media=media_of(question.record),
        expected=list(question.expected),
        options=None if question.options is None else list(question.options),
        answer=answer,
        thought=thought,
        extracted=extracted,
        **outcome(scored),
        finish_reason=first.reason if said else "stop",
        seconds=round(time.perf_counter() - asked.submitted, 4),
        tokens=first.usage.completion if said and first.usage is not None else 0,
    )


def outcome(scored: Scored) -> dict[str, Any]:
    """Fields of a sample's result."""
    values = dataclasses.asdict(scored)
    return values | {"statistics": None if scored.statistics is None else list(scored.statistics)}


def _logprobs(asked: Asked, number: int) -> list[float]:
    """Of the answer's tokens: the one after place p of the prompt stands at p in the list, which begins with token 1."""
    return [asked.results[number].prompt_logprobs[place] for place in asked.labels[number]]


def whole_text(result: Result) -> str:
    """Thought and answer as they were said. A thought that was not finished has no end."""
    if not result.reasoning:
        return result.text
    ended = result.text or result.reason == "stop"
    return f"{THINK}{result.reasoning}{THINK_END if ended else ''}{result.text}"
