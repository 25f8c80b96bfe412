"""Questions as they are asked of a model to see whether it thinks: as they are, at once, with another's thought or media.

An ``Asked`` is a record and, for a forced thought, what the answer begins with; ``prompt_of`` makes the engine's input of
it. Neighbours are of the same source: by a random cycle (``neighbours``), so that who guesses stays right by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from examples.reason.questions import SOURCES, conclusion, split, with_thought
from megatron_omni.batch import IGNORE_LABEL
from megatron_omni.data.record import Message, Record
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sources import JsonlSource


@dataclass(frozen=True)
class Asked:
    """What is asked and what counts as right."""

    record: Record
    expected: str
    thought: str | None = None
    """Forced: the answer is what follows it."""


def read_questions(folder: Path, *, limit: int | None = None) -> list[Asked]:
    """The first ``limit`` questions of each source (default all) of a set of corpus.py."""
    questions = []
    for name in SOURCES:
        source = JsonlSource(folder / f"{name}.jsonl", name=name)
        for index in range(min(len(source), limit or len(source))):
            questions.append(Asked(source[index], str(source[index].extra["solution"])))
    return questions


def at_once(asked: Asked) -> Asked:
    """Without the system turn that asks for a thought, and behind an empty one, as ``--no-think`` does."""
    messages = tuple(message for message in asked.record.messages if message.role != "system")
    return replace(asked, record=replace(asked.record, messages=messages), thought="")


def with_media_of(asked: Asked, other: Asked) -> Asked:
    """The same question about the other's media."""
    given = other.record
    return replace(asked, record=replace(asked.record, images=given.images, audios=given.audios, videos=given.videos))


def with_thought_of(asked: Asked, completion: str) -> Asked | None:
    """The question with the thought of ``completion`` forced in, which the answer should then follow.

    None where the thought comes to nothing, or to what is right here anyway.
    """
    thought, _ = split(completion)
    expected = conclusion(thought) if thought is not None else None
    if expected is None or expected == asked.expected:
        return None
    return replace(asked, expected=expected, thought=thought)


def neighbours(questions: Sequence[Asked], *, seed: int) -> list[int]:
    """For each question the number of another one of its source."""
    rng = np.random.default_rng(seed)
    partner = list(range(len(questions)))
    for source in SOURCES:
        places = rng.permutation([i for i, asked in enumerate(questions) if asked.record.source == source])
        for place, other in zip(places, np.roll(places, 1)):
            partner[place] = int(other)
    return partner


def prompt_of(asked: Asked, builder: SampleBuilder) -> Sample:
    """The engine's input: the question, and the thought as the beginning of its answer."""
    if asked.thought is None:
        return builder.build_prompt(asked.record)
    turns = [message for message in asked.record.messages if message.role != "assistant"]
    begun = Message("assistant", with_thought(asked.thought, ""))
    sample = builder.build_sample(replace(asked.record, messages=(*turns, begun)))
    learned = (sample.labels != IGNORE_LABEL).nonzero().flatten()
    return cut(sample, int(learned[-1])).without_labels()  # the last label is the end token, which is not forced


def cut(sample: Sample, last: int) -> Sample:
    """The tokens up to ``last``, which must lie behind all media."""
    end = last + 1
    return replace(
        sample,
        input_ids=sample.input_ids[:end],
        labels=sample.labels[:end],
        position_ids=sample.position_ids[:, :end],
        next_position=int(sample.position_ids[:, last].max()) + 1,
        modality=sample.modality[:end],
    )
