"""Exact-match score of greedy answers on a held-out source: the share of records whose answer is the expected text.

The expected text is the content of a record's final assistant turn; the model gets the conversation before it. Both are
compared after stripping white space at the ends, nothing else.

Records are dealt to the data-parallel ranks in turn, and within a window of some batches sorted by length, so that rows
of a batch need about the same padding. Every rank makes the same number of :func:`generate` calls, some perhaps with
nothing to answer, because with expert parallelism they need one another. A record that cannot be used (missing file,
too long) is logged, counted and left out of the score.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.data.decode.cpu import MediaError
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sources import Source
from megatron_omni.generation.engine import generate

logger = logging.getLogger(__name__)

BATCHES_PER_WINDOW = 8
"""Batches of prompts that are decoded and held together, to sort them by length."""


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
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size} and limit {limit}; each must be at least 1")
    total = len(source) if limit is None else min(limit, len(source))
    rank, ranks = pg.dp.rank(), pg.dp.size()
    answers: list[ScoredAnswer] = []
    skipped: Counter[str] = Counter()
    for rows in _windows(total, batch_size * ranks * BATCHES_PER_WINDOW):
        mine = _questions(builder, source, rows[rank::ranks], skipped)
        for i in range(0, -(-len(rows) // ranks), batch_size):
            asked = mine[i : i + batch_size]
            given = generate(
                model,
                [prompt for _, _, prompt in asked],
                tokenizer=builder.tokenizer,
                max_new_tokens=max_new_tokens,
                pg=pg,
            )
            for (row, record, _), ids in zip(asked, given, strict=True):
                answers.append(_scored(row, record, builder.tokenizer.decode(ids)))
    if ranks > 1:
        parts: list[tuple[list[ScoredAnswer], Counter[str]]] = [([], Counter())] * ranks
        dist.all_gather_object(parts, (answers, skipped), group=pg.dp)
        answers = [answer for part, _ in parts for answer in part]
        skipped = sum((counts for _, counts in parts), Counter())
    answers.sort(key=lambda answer: answer.row)
    return TaskScore(
        name=source.name,
        score=sum(answer.correct for answer in answers) / max(len(answers), 1),
        count=len(answers),
        skipped=dict(skipped),
        answers=answers,
    )


def _windows(total: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, total)) for start in range(0, total, size))


def _questions(
    builder: SampleBuilder, source: Source, rows: range, skipped: Counter[str]
) -> list[tuple[int, Record, Sample]]:
    """Rows, records and prompts, longest first, so that a batch that does not fit in memory is the first one."""
    questions = []
    for row in rows:
        try:
            record = source[row]
            if not record.answer:
                raise RecordError(
                    record.where, field="messages", value=record.messages[-1].role, problem="has no answer to compare",
                    fix="end the record with an assistant turn", reason="no_answer",
                )  # fmt: skip
            questions.append((row, record, builder.build_prompt(record)))
        except (RecordError, MediaError) as error:
            skipped[error.reason] += 1
            logger.warning("not scored: %s", error)
    return sorted(questions, key=lambda question: -question[2].length)


def _scored(row: int, record: Record, answer: str) -> ScoredAnswer:
    question = next(message.content for message in reversed(record.messages) if message.role == "user")
    return ScoredAnswer(row=row, question=question, expected=record.answer, answer=answer)
