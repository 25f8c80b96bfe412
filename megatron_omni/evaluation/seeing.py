"""Tasks of kind ``image``: the pictures of records are drawn, and compared with their targets or seen by a judge.

    record -> prompt, block (generation/drawn_answers.py) -> picture -> PNG -> metric of pictures, or judge and metric of texts

Row n of a task is drawn into ``pictures/TASK/n.png`` of the results folder by the rank that has the generator; the leader of a
replica reads it there, puts ``n.wanted.png`` beside it and scores. All ranks draw a window of rows together. What is of a
whole set (fd_judge, fid) is computed of these files at the end, on rank 0.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from megatron_omni.data.decode.media import MediaError
from megatron_omni.data.picture_crops import check_target, cut_of, pixels_of
from megatron_omni.data.record import Record, RecordError, internal_error, loaded
from megatron_omni.data.sample import Sample
from megatron_omni.evaluation.asking import media_of, outcome, shown, whole_text
from megatron_omni.evaluation.picture_metrics import JudgeScore, PictureMetric, SetMetric
from megatron_omni.evaluation.results import Line, SampleResult, SkippedSample, TaskSummary
from megatron_omni.evaluation.running import Times
from megatron_omni.evaluation.task import Question, Task
from megatron_omni.generation.batches import Result, generate_windows
from megatron_omni.generation.drawn_answers import AnswerDrawer, DrawnFacts, first_error
from megatron_omni.generation.drawn_files import question_of
from megatron_omni.generation.engine import EngineLimits
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.outline import outline
from megatron_omni.generation.picture import PictureWanted
from megatron_omni.generation.png import write_png
from megatron_omni.generation.request import Wanted
from megatron_omni.parallel.groups import replica
from megatron_omni.scoring.metric import UNCOUNTED, Scored

PICTURES = "pictures"
Finished = Callable[[str, Line], None]


def drawer_of(checkpoint: Checkpoint, task: Task, vae: Path | None) -> AnswerDrawer:
    """What draws the rows of a task. ValueError for a checkpoint that draws nothing, and for a codec that is not its own."""
    drawing = task.config.drawing
    begin = drawing.begin or ("model" if task.config.thinking else "block")
    wanted = PictureWanted(
        steps=drawing.steps,
        shift=drawing.shift,
        text_guidance=drawing.text_guidance,
        image_guidance=drawing.image_guidance,
        seed=task.sampling.seed,
        begin=begin,
        most=1,
        vae=vae,
    )
    return AnswerDrawer(wanted, checkpoint)


def see_all(
    checkpoint: Checkpoint,
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    vae: Path | None,
    out: Path,
    batch_size: int,
    deterministic: bool,
    finished: Finished,
    done: Mapping[str, set[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Times:
    """Draw and score every row that is not ``done``; all ranks together. ``finished`` is called on the leader that scored it."""
    start, step = time.perf_counter(), 0.0
    total = sum(len(task) - len(done[task.name]) for task in tasks)
    behind = 0
    for task in tasks:
        rows = _Rows(task, drawer_of(checkpoint, task, vae), out, finished, done[task.name])
        windows = generate_windows(
            model, rows.build_prompt, range(len(task)), wanted=rows.wanted, tokenizer=checkpoint.builder.tokenizer,
            pg=checkpoint.pg, batch_size=batch_size, limits=EngineLimits(deterministic=deterministic),
        )  # fmt: skip
        for numbers, answers in windows:
            began = time.perf_counter()
            (out / PICTURES / task.name).mkdir(parents=True, exist_ok=True)
            drawn = rows.drawer.draw(model, rows.record, answers, take=rows.take, batch_size=batch_size, progress=False)
            step += time.perf_counter() - began
            rows.score(answers, drawn)
            behind += len(set(numbers) - done[task.name])
            progress(behind, total)
    return Times(wall=time.perf_counter() - start, step=step)


def summary_of_set(task: Task, summary: TaskSummary, lines: Mapping[int, Line], out: Path) -> TaskSummary:
    """``summary`` with the score of a metric of whole sets, which is read off the results folder; others as they are."""
    if not isinstance(task.metric, SetMetric):
        return summary
    seen = [line for _, line in sorted(lines.items()) if isinstance(line, SampleResult)]
    if len(seen) < 2:
        return summary
    drawn, wanted = (_Files([out / getattr(line, name) for line in seen]) for name in ("drawn", "wanted"))
    judge = task.judge.open() if task.judge is not None else None
    score = task.metric.of_sets(drawn, wanted, judge)
    return replace(summary, score=score, count=len(seen), not_scored=0)


def read_picture(file: Path) -> Tensor:
    """uint8 [3, H, W] of a PNG of ours."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


class _Files(Sequence[Tensor]):
    """Pictures of files, each read when it is asked for: thirty thousand large ones fit into no memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [read_picture(file) for file in self._files[index]]
        return read_picture(self._files[index])


@dataclass(kw_only=True)
class _Seen:
    """A row whose picture has been drawn."""

    row: int
    question: Question
    answer: Result
    drawn: Tensor
    wanted: Tensor
    source: Tensor | None


class _Rows:
    """The rows of a task under way, on one rank."""

    def __init__(self, task: Task, drawer: AnswerDrawer, out: Path, finished: Finished, done: set[int]) -> None:
        self.task, self.drawer = task, drawer
        self._out, self._finished, self._done = out, finished, done
        self._builder = drawer.checkpoint.builder
        pg = drawer.checkpoint.pg
        self._share, self._shares, self._leads = pg.dp.rank(), pg.dp.size(), replica(pg).rank() == 0
        self._judge: Callable[..., Any] | None = None
        self._start = time.perf_counter()

    # ------------------------------------------------------------------------------------------ asking and drawing

    def record(self, row: int) -> Record:
        """As it is asked, its own answer at the end."""
        return shown(self.task, row).record

    def build_prompt(self, row: int) -> Sample | None:
        """The prompt of a row, on the leader that asks it; None, and a line, for one that cannot be used."""
        if row in self._done:
            return None
        record: Record | None = None
        try:
            record = self.record(row)
            self._target(record)
            prompt = self.drawer.built(record, think=self.task.config.thinking)
            self._room(record, prompt)
            return prompt
        except (RecordError, MediaError) as error:
            self._skip(row, record, error.reason, str(error))
        except (OSError, MemoryError):  # the machine's fault, not the record's
            raise
        except Exception as error:
            fault = internal_error(self.task.source.where(row), error)
            self._skip(row, record, fault.reason, str(fault))
        return None

    def wanted(self, row: int, prompt: Sample) -> Wanted:
        """What is asked of a prompt. Where the picture comes first, nothing behind it is read."""
        record = self.record(row)
        writes = self.drawer.wanted.begin == "model"
        most = min(self.task.config.max_new_tokens, self._room(record, prompt)) if writes else 1
        block = self.drawer.asked(record, prompt)
        return Wanted(max_new_tokens=most, sampling=self.task.sampling, text=True, reasoning=True, block=block)

    def take(self, row: int, facts: DrawnFacts, pixels: Tensor) -> None:
        """Write a picture, on the rank that drew it."""
        write_png(self._out / self._file(row), pixels, facts.facts, prompt=question_of(self.record(row)))

    def _room(self, record: Record, prompt: Sample) -> int:
        """Tokens that the model may write; RecordError where there is none."""
        length = self._builder.data.seq_length
        room = length - prompt.length - len(self.drawer.block_ids)
        if room < 1:
            raise RecordError(
                record.where, field="length", value=prompt.length, problem="leaves no room for a picture",
                fix=f"raise data.seq_length ({length}) or shorten it", reason="too_long",
            )  # fmt: skip
        return room

    def _target(self, record: Record) -> Tensor:
        """What the picture is compared with, at the size that is drawn."""
        picture = self._builder.decoder.decode_image(loaded(record.targets[-1]))
        check_target(*picture.size, self.drawer.config, field="targets[0]", where=record.where)
        return pixels_of(picture, cut_of(*picture.size, self.drawer.config))

    def _file(self, row: int, kind: str = "") -> str:
        return f"{PICTURES}/{self.task.name}/{row}{kind}.png"

    def _skip(self, row: int, record: Record | None, reason: str, message: str) -> None:
        self._finished(
            self.task.name,
            SkippedSample(row=row, id=record.id if record is not None else "", skipped=reason, message=message),
        )

    # ------------------------------------------------------------------------------------------ scoring

    def score(self, answers: Mapping[int, Sequence[Result]], drawn: Mapping[int, Sequence[DrawnFacts]]) -> None:
        """Lines of this leader's share of the rows that were drawn."""
        if not self._leads:
            return
        seen: list[_Seen] = []
        for row in sorted(answers)[self._share :: self._shares]:
            if (error := first_error(drawn, row)) is not None:
                self._skip(row, self.record(row), "not_drawn", error)
            else:
                seen.append(self._seen(row, answers[row][0]))
        for one, verdict in zip(seen, self._scored(seen), strict=True):
            self._finished(self.task.name, self._line(one, *verdict))

    def _seen(self, row: int, answer: Result) -> _Seen:
        question = shown(self.task, row)
        wanted = self._target(question.record)
        write_png(self._out / self._file(row, ".wanted"), wanted, {})
        source = outline(question.record, self._builder, self.drawer.config).source
        return _Seen(
            row=row,
            question=question,
            answer=answer,
            drawn=read_picture(self._out / self._file(row)),
            wanted=wanted,
            source=source,
        )

    def _scored(self, seen: Sequence[_Seen]) -> list[tuple[str | None, str | None, Scored]]:
        """Of each the judge's text, what the rule took from it, and its score."""
        metric = self.task.metric
        if isinstance(metric, SetMetric):
            return [(None, None, UNCOUNTED) for _ in seen]
        if isinstance(metric, PictureMetric):
            return [(None, None, self._compared(metric, one)) for one in seen]
        if not seen:
            return []
        assert self.task.judge is not None
        judge: Callable[..., Any] = self._judge or self.task.judge.open()
        self._judge = judge
        pictures = [one.drawn.numpy() for one in seen]
        if isinstance(metric, JudgeScore):
            wanted = [one.wanted.numpy() for one in seen]
            sources = [None if one.source is None else one.source.numpy() for one in seen]
            prompts = [question_of(one.question.record) for one in seen]
            given = judge(pictures, wanted, sources, prompts)
            return [(None, None, scored) for scored in metric.of_numbers(given, len(seen))]
        texts = list(judge(pictures))
        if len(texts) != len(seen) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"judge = {self.task.config.judge!r} gave {len(texts)} values for {len(seen)} pictures; it must return a text "
                "for each"
            )
        return [self._judged(text, one.question) for text, one in zip(texts, seen)]

    def _judged(self, text: str, question: Question) -> tuple[str, str | None, Scored]:
        extracted = self.task.rule(text, question.options)
        return text, extracted, self.task.metric.score(extracted, question.expected, question.options)

    def _compared(self, metric: PictureMetric, one: _Seen) -> Scored:
        if metric.against == "target":
            return metric.of_picture(one.drawn, one.wanted)
        return UNCOUNTED if one.source is None else metric.of_picture(one.drawn, one.source)

    def _line(self, one: _Seen, said: str | None, extracted: str | None, scored: Scored) -> SampleResult:
        question, answer = one.question, one.answer
        *asked, _ = question.record.messages
        record = dataclasses.replace(question.record, messages=tuple(asked))
        writes = self.drawer.wanted.begin == "model"
        return SampleResult(
            row=one.row,
            id=record.id,
            prompt=[{"role": m.role, "content": m.content} for m in asked],
            media=media_of(record),
            expected=list(question.expected),
            options=None if question.options is None else list(question.options),
            answer=said if said is not None else whole_text(answer) if writes else "",
            thought=(answer.reasoning or None) if writes else None,
            extracted=extracted,
            **outcome(scored),
            finish_reason=answer.reason if writes else "stop",
            seconds=round(time.perf_counter() - self._start, 4),
            tokens=answer.usage.completion if writes and answer.usage is not None else 0,
            drawn=self._file(one.row),
            wanted=self._file(one.row, ".wanted"),
        )
