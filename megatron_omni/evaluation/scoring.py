"""Exact-match score of greedy answers on a held-out source: the share of records whose answer is the expected text.

The expected text is the content of a record's final assistant turn; the model gets the conversation before it. Both are
compared after stripping white space at the ends, nothing else.

A record that cannot be used (missing file, too long) is logged, counted and left out of the score.
"""

import logging
from collections import Counter
from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.data.decode.cpu import MediaError
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sources import Source
from megatron_omni.generation.batches import generate_all, shared

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """One record's outcome."""

    row: int
    """Place in the source."""
    question: str
    """Last user turn, with its media markers."""
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Exact match of the stripped texts."""
        return self.answer.strip() == self.expected.strip()


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Score of one source; the same on every rank."""

    name: str
    score: float
    """Correct answers / ``count``; 0 where nothing could be scored."""
    count: int
    skipped: dict[str, int]
    """Records left out, by reason."""
    answers: list[ScoredAnswer]
    """In the order of the source."""


def score_source(
    model: nn.Module,
    builder: SampleBuilder,
    source: Source,
    *,
    pg: ProcessGroupCollection,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    limit: int | None = None,
) -> TaskScore:
    """Score the first ``limit`` records (None: all) of ``source``; all ranks call this together."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all records")
    skipped: Counter[str] = Counter()

    def build_prompt(row: int) -> Sample | None:
        try:
            return _prompt(builder, source[row])
        except (RecordError, MediaError) as error:
            skipped[error.reason] += 1
            logger.warning("not scored: %s", error)
            return None

    given = generate_all(
        model,
        build_prompt,
        len(source) if limit is None else min(limit, len(source)),
        batch_size=batch_size,
        pg=pg,
        tokenizer=builder.tokenizer,
        max_new_tokens=max_new_tokens,
    )
    everywhere: Counter[str] = sum(shared({pg.dp.rank(): skipped}, pg).values(), Counter())
    answers = [_scored(row, source[row], builder.tokenizer.decode(ids)) for row, ids in sorted(given.items())]
    return TaskScore(
        name=source.name,
        score=sum(answer.correct for answer in answers) / max(len(answers), 1),
        count=len(answers),
        skipped=dict(everywhere),
        answers=answers,
    )


def _prompt(builder: SampleBuilder, record: Record) -> Sample:
    if not record.answer:
        raise RecordError(
            record.where, field="messages", value=record.messages[-1].role, problem="has no answer to compare",
            fix="end the record with an assistant turn", reason="no_answer",
        )  # fmt: skip
    return builder.build_prompt(record)


def _scored(row: int, record: Record, answer: str) -> ScoredAnswer:
    question = next(message.content for message in reversed(record.messages) if message.role == "user")
    return ScoredAnswer(row=row, question=question, expected=record.answer, answer=answer)
