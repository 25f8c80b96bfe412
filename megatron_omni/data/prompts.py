"""The prompts of one optimizer step at a time, for reinforcement: what is answered by the model and judged afterwards.

Order, plans, stand-ins and the cursor are those of loader.py. A prompt keeps its record: rewards get its further keys and
its final answer as columns. Its number in the run's order names it on every layout, and any rank can build any prompt by
it: a checkpoint holds numbers, not media.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.loader import Loader, StepLoader
from megatron_omni.data.mixture import Draw
from megatron_omni.data.picture_codec_crops import PictureLoader
from megatron_omni.data.plan import Cursor, Row, Skip
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.responses import Group
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import SampleSize
from megatron_omni.data.sound_crops import SoundLoader
from megatron_omni.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompt(Sample):
    """A record without its final answer, ready to be answered."""

    record: Record
    row: int
    """Number of the record in its source."""
    source: int
    """Number of the source in the recipe."""
    number: int = -1
    """In the order of the run."""


class Prompts(tuple[Prompt, ...]):
    """Those of a micro-batch, longest first by plan."""

    @property
    def num_samples(self) -> int:
        """Prompts."""
        return len(self)


class PromptStep(NamedTuple):
    """A step: what this rank has of it, and the numbers of all."""

    own: list[Prompts]
    numbers: list[list[int]]
    """Of every micro-batch of the step, on all ranks the same; loader.dealt says whose."""


class PromptBuilder(SampleBuilder):
    """Sizes are those of prompts, with room for the longest response behind them."""

    indexed = False  # an index counts the answer in

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(recipe, tokenizer)
        self.max_new_tokens = recipe.reinforce.max_new_tokens

    def size(self, record: Record) -> SampleSize:
        """Size of the prompt, from media headers; RecordError or MediaError for what cannot be used."""
        size = self.prompt_size(asked(record))
        text, image, video, audio = size[:4]
        self.sizes.check_length((text + self.max_new_tokens, image, video, audio), where=record.where)
        return size

    def build_sample(self, record: Record) -> Sample:
        """The prompt."""
        prompt = self.build_prompt(record)
        counts = [int((prompt.modality == kind).sum()) for kind in range(4)]
        self.sizes.check_length((counts[0] + self.max_new_tokens, *counts[1:]), where=record.where)  # type: ignore[arg-type]
        return prompt


def asked(record: Record) -> Record:
    """The record without its final answer."""
    last = record.messages[-1].role == "assistant"
    record = replace(record, messages=record.messages[:-1]) if last else record
    if not record.messages or record.messages[-1].role != "user":
        raise RecordError(
            record.where, field="messages", value=[m.role for m in record.messages], problem="asks nothing",
            fix="end with a user turn, and the answer if there is one", reason="bad_roles",
        )  # fmt: skip
    return record


class PromptLoader(Loader[Prompts]):
    """Prompts, step by step."""

    def next_step(self) -> PromptStep:
        """The next step."""
        step = self._next()
        numbers = [[row[0].sample_id for row in rows] for rows in step.plan.micro_batches]
        return PromptStep(step.batches, numbers)

    def prompt(self, number: int) -> Prompt:
        """The prompt of a number, whoever read it first; ValueError where no record can stand for it, DataEnded behind the last."""
        skips: list[Skip] = []
        return self._batch([[self._place(number, skips)]], skips)[0]

    def draw_further(self, count: int) -> list[int]:
        """The next ``count`` numbers of the order, which move the cursor on; DataEnded where it has not so many."""
        numbers = [*range(self._cursor.next_sample, self._cursor.next_sample + count)]
        for number in numbers:
            self._place(number, [])
        self._cursor = Cursor(self._cursor.next_sample + count)
        self._workers.forget()
        return numbers

    def mark(self) -> tuple[Cursor, Any]:
        """Where the order stands, for :meth:`go_back`."""
        return self._cursor, copy.deepcopy((self._skipped, self._tried))

    def go_back(self, mark: tuple[Cursor, Any]) -> None:
        """As if nothing had been read since."""
        self._cursor, (self._skipped, self._tried) = mark
        self._workers.forget()

    def collate(self, groups: list[tuple[Prompt, Group]]) -> OmniBatch:
        """A micro-batch of prompts with their responses, a row each."""
        return collate(
            [group.sample for _, group in groups],
            pad_id=self.builder.tokenizer.pad_id,
            sample_ids=[prompt.number for prompt, _ in groups],
            source_ids=[prompt.source for prompt, _ in groups],
            multiple_of=self.length_multiple,
            rule=self.builder.rule,
        )

    def _builder(self, recipe: Recipe, tokenizer: Tokenizer | None) -> SampleBuilder:
        return PromptBuilder(recipe, tokenizer)

    def _batch(self, rows: list[Row], skips: list[Skip]) -> Prompts:
        found = self._decoded_rows(rows, skips)
        return Prompts(replace(as_prompt(sample), number=place.sample_id) for _, place, sample in found)

    def _built(self, draw: Draw) -> Prompt:
        record = self.sources[draw.source][draw.row]
        sample = self.builder.build_sample(record)
        return Prompt(**vars(sample), record=record, row=draw.row, source=draw.source)


def loader_kind(recipe: Recipe) -> type[Loader[Any]]:
    """What reads the data that the recipe's task trains on."""
    return PromptLoader if recipe.task == "reinforce" else step_loader_kind(recipe)


def step_loader_kind(recipe: Recipe) -> type[StepLoader]:
    """What reads records as they are, held-out ones too."""
    return {"codec": SoundLoader, "picture_codec": PictureLoader}.get(recipe.task, StepLoader)


def as_prompt(sample: Sample) -> Prompt:
    """The same: what the loader of prompts decodes is one."""
    assert isinstance(sample, Prompt)
    return sample
