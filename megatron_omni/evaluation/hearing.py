"""Tasks of kind ``speech``: a speech generator says the spoken answers of records, and a judge hears what is scored.

    record -> prompt and text (data/spoken.py) -> sound (generation/speaking.py) -> judge (judges/load.py) -> a text
           -> the task's rule and metric, as of any answer

The sound of row n lies in ``sounds/TASK/n.wav`` of the results folder. All ranks speak a window of rows together, each
replica its share; the leader that spoke a row judges it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_omni.data.record import RecordError
from megatron_omni.data.sizes import spoken_answer
from megatron_omni.evaluation.asking import outcome
from megatron_omni.evaluation.judges.load import SAMPLE_RATE, Judge, Wave
from megatron_omni.evaluation.results import Line, SampleResult, SkippedSample
from megatron_omni.evaluation.running import Times
from megatron_omni.evaluation.task import Question, Task
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.request import Sampling
from megatron_omni.generation.sampling import derived_seed
from megatron_omni.generation.speaking import speak_all
from megatron_omni.generation.speech import SoundEvent, SpeechEvent, SpokenEvent, Utterance
from megatron_omni.generation.wav import SoundFile
from megatron_omni.models.generators.codec import Codec, load_codec
from megatron_omni.parallel.groups import replica
from megatron_omni.scoring.voice import at_rate

SOUNDS = "sounds"
WINDOW = 64
"""Rows of a replica that are spoken before they are judged."""


def check_kinds(checkpoint: Checkpoint, tasks: Sequence[Task], codec: Path | None) -> Path | None:
    """Folder of the codec, where the tasks are of kind speech. ValueError for tasks that the checkpoint cannot do; whether it can
    draw shows in seeing.py."""
    speech = checkpoint.recipe.model.speech
    for task in tasks:
        if (task.config.kind == "speech") != (speech is not None):
            said = "speaks and answers no text" if speech is not None else "is no speech generator"
            wanted = "speech" if speech is not None else "text or image"
            raise ValueError(
                f"{task.file}: kind: {task.config.kind}, but the checkpoint {said}; give tasks of kind {wanted}"
            )
    if speech is None:
        if codec is not None:
            raise ValueError("--codec means nothing to tasks of text; leave it out")
        return None
    folder = codec or (Path(speech.codec) if speech.codec is not None else None)
    if folder is None:
        raise ValueError("--codec is missing: the checkpoint's recipe names no model.speech.codec")
    return folder


def hear_all(
    checkpoint: Checkpoint,
    tasks: Sequence[Task],
    *,
    codec: Path,
    out: Path,
    batch_size: int,
    deterministic: bool,
    finished: Callable[[str, Line], None],
    done: Mapping[str, set[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Times:
    """Speak and judge every row that is not ``done``; all ranks together. ``finished`` is called on the leader that spoke."""
    start, step = time.perf_counter(), 0.0
    todo = [(task, row) for task in tasks for row in range(len(task)) if row not in done[task.name]]
    decoder, model = load_codec(codec), checkpoint.load_model()
    judges: dict[str, Judge] = {}
    size, leads = WINDOW * checkpoint.pg.dp.size(), replica(checkpoint.pg).rank() == 0
    for first in range(0, len(todo), size):
        rows, asked = _Rows(decoder, out), []
        for task, row in todo[first : first + size]:
            prepared = prepare(task, row)
            if isinstance(prepared, SkippedSample):
                if leads and checkpoint.pg.dp.rank() == 0:
                    finished(task.name, prepared)
                continue
            rows.add(task, row, *prepared)
            asked.append(prepared[0])
        began = time.perf_counter()
        speak_all(
            model, asked, codec=decoder, tokenizer=checkpoint.builder.tokenizer, batch_size=batch_size,
            deterministic=deterministic, take=rows.take,
        )  # fmt: skip
        step += time.perf_counter() - began
        for name, line in rows.lines(judges):
            finished(name, line)
        progress(min(first + size, len(todo)), len(todo))
    return Times(wall=time.perf_counter() - start, step=step)


def prepare(task: Task, row: int) -> tuple[Utterance, Question] | SkippedSample:
    """What is spoken of a row, and what is expected; a row that cannot be used is no error."""
    try:
        question = task.question(row)
    except RecordError as error:
        return SkippedSample(row=row, id="", skipped=error.reason, message=str(error))
    speech = spoken_answer(question.record)
    assert speech is not None
    values = {
        name: getattr(task.sampling, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    sampling = Sampling(**values, seed=derived_seed(task.sampling.seed, row))
    name = f"{task.name}/{row}"
    return Utterance(name=name, prompt=speech.prompt, text=speech.spoken, sampling=sampling), question


class _Rows:
    """Rows under way: their sounds, written while they come, and how they ended."""

    def __init__(self, codec: Codec, out: Path) -> None:
        self._rate, self._out = codec.sample_rate, out
        self._asked: dict[str, tuple[Task, int, Utterance, Question]] = {}
        self._sound: dict[str, list[Tensor]] = {}
        self._ended: dict[str, SpokenEvent] = {}
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def add(self, task: Task, row: int, utterance: Utterance, question: Question) -> None:
        """A row that will be spoken, here or on another replica."""
        self._asked[utterance.name] = task, row, utterance, question

    def take(self, event: SpeechEvent) -> None:
        """What the speaker of this replica tells."""
        if isinstance(event, SoundEvent):
            self._sound.setdefault(event.name, []).append(event.wave)
        elif isinstance(event, SpokenEvent):
            self._ended[event.name], self._seconds[event.name] = event, time.perf_counter() - self._start

    def lines(self, judges: dict[str, Judge]) -> list[tuple[str, Line]]:
        """Judge what was spoken here; ``judges`` keeps those that are loaded."""
        found: list[tuple[str, Line]] = []
        for task in {asked[0].name: asked[0] for asked in self._asked.values()}.values():
            names = [name for name in self._ended if self._asked[name][0] is task]
            waves = [self._wave(name) for name in names]
            if names and task.name not in judges:
                assert task.judge is not None
                judges[task.name] = task.judge.open()
            heard = list(judges[task.name](waves)) if names else []
            if len(heard) != len(waves) or not all(isinstance(one, str) for one in heard):
                raise ValueError(
                    f"judge = {task.config.judge!r} gave {len(heard)} values for {len(waves)} sounds; it must return a text "
                    "for each"
                )
            found += [(task.name, self._line(name, said)) for name, said in zip(names, heard)]
        return found

    def _wave(self, name: str) -> Wave:
        """At the judges' rate; the sound itself goes into its file."""
        whole = torch.cat(self._sound.get(name, [torch.zeros(0)])).float()
        task, row, _, _ = self._asked[name]
        path = self._out / SOUNDS / task.name / f"{row}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = SoundFile(path, self._rate)
        file.write(whole)
        file.close()
        return at_rate(whole.numpy(), self._rate, SAMPLE_RATE)

    def _line(self, name: str, heard: str) -> Line:
        task, row, utterance, question = self._asked[name]
        ended = self._ended[name]
        if ended.error is not None:
            return SkippedSample(row=row, id=question.record.id, skipped="not_spoken", message=ended.error)
        extracted = task.rule(heard, question.options)
        scored = task.metric.score(extracted, question.expected, question.options)
        return SampleResult(
            row=row,
            id=question.record.id,
            prompt=[
                {"role": "system", "content": str(utterance.prompt)},
                {"role": "user", "content": str(utterance.text)},
            ],
            media=[],
            expected=list(question.expected),
            options=None if question.options is None else list(question.options),
            answer=heard,
            thought=None,
            extracted=extracted,
            **outcome(scored),
            finish_reason="length" if ended.cut else "stop",
            seconds=round(self._seconds[name], 4),
            tokens=ended.codes,
        )
