"""The pictures of answers as files, each written by the rank that draws it, and what a line says of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from megatron_omni.data.record import Record
from megatron_omni.generation.batches import Result
from megatron_omni.generation.drawn_answers import AnswerDrawer, DrawnFacts, first_error
from megatron_omni.generation.picture import numbered
from megatron_omni.generation.png import write_png


def drawn_into(
    drawing: AnswerDrawer,
    model: nn.Module,
    records: Callable[[int], Record],
    answers: Mapping[int, Sequence[Result]],
    *,
    file: Callable[[int], str],
    batch_size: int,
) -> dict[int, dict[str, Any]]:
    """Draw the pictures of ``answers``, the same on every rank, into ``file`` of their number, or files called after it where
    there are several; what a line says of each: {"images", "drawing"}. All ranks together."""
    names = {n: numbered(file(n), [len(result.blocks) for result in samples]) for n, samples in answers.items()}

    def take(number: int, facts: DrawnFacts, pixels: Tensor) -> None:
        write_png(names[number][facts.sample][facts.number], pixels, facts.facts, prompt=question_of(records(number)))

    drawn = drawing.draw(model, records, answers, take=take, batch_size=batch_size)
    return {n: _line(names[n], drawn.get(n, []), first_error(drawn, n)) for n in answers}


def _line(names: Sequence[Sequence[str]], drawn: Sequence[DrawnFacts], error: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"images": [names[one.sample][one.number] for one in drawn if one.error is None]}
    facts: dict[str, Any] = {"error": error} if error is not None else {}
    if notes := [one.note for one in drawn if one.note]:
        facts["note"] = notes[0]
    return said | ({"drawing": facts} if facts else {})


def question_of(record: Record) -> str:
    """The text of the last question."""
    return next((message.content for message in reversed(record.messages) if message.role == "user"), "")
