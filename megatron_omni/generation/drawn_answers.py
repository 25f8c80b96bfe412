"""Answers with pictures: a language model writes, blocks of its answers are drawn, on the same ranks.

    prompt .. [lead] | block .. text .. end        ``begin: block`` (and ``record``, whose lead is that of the record's own answer)
    prompt .. | text .. [TASK0] block .. text      ``begin: model``; a block in the place of the end where there was none by then

The engine tells the hidden states of every block (blocks.py). Pictures are dealt as prompts are: those of a model replica's own
prompts are drawn by one rank of its last pipeline stage, which has the generator whole. So every rank may know which picture became
what, and none but that one computes it.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

import torch.distributed as dist
from torch import Tensor, nn

from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample
from megatron_omni.data.template import answer_ids
from megatron_omni.generation.batches import Result
from megatron_omni.generation.blocks import from_bytes
from megatron_omni.generation.image import Picture, draw
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.outline import outline, source_rows
from megatron_omni.generation.picture import PictureWanted
from megatron_omni.generation.replica import unwrapped
from megatron_omni.generation.request import Block
from megatron_omni.generation.spoken_answers import continued
from megatron_omni.models.generators.vae import PictureCodec, load_picture_codec
from megatron_omni.parallel.groups import place_in
from megatron_omni.parallel.sharing import PeerFailed

NO_PICTURE = "the answer has no picture"
LINE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class DrawnFacts:
    """What became of one picture of an answer."""

    sample: int
    """Of the request's samples."""
    number: int
    """Of the sample's pictures."""
    facts: dict[str, Any]
    """How it was drawn: width, height, seed, steps, guidance and so on."""
    note: str = ""
    """What is to be said of it."""
    error: str | None = None
    """Why it could not be drawn."""


Take = Callable[[int, DrawnFacts, Tensor], None]
"""(number of the record, facts, pixels [3, H, W] uint8) of each picture, on the rank that draws it."""


class AnswerDrawer:
    """The generator of a language model that draws, and its codec of pictures."""

    def __init__(self, wanted: PictureWanted, checkpoint: Checkpoint) -> None:
        """ValueError for a model that draws nothing, and for a codec that is not there or not the model's."""
        config = checkpoint.recipe.model.image
        if config is None:
            raise ValueError(f"{checkpoint.directory}: the model draws nothing (model.image is null); leave --draw out")
        folder = wanted.vae or config.vae
        if folder is None:
            raise ValueError(
                f"{checkpoint.directory}: names no codec of pictures (model.image.vae is null); give its folder with --vae"
            )
        self.wanted, self.config, self.checkpoint = wanted, config, checkpoint
        self.tokenizer = checkpoint.builder.tokenizer
        self.block_ids = config.block_ids(self.tokenizer.specials)
        self.settings = wanted.settings(config.sampling)
        place = place_in(checkpoint.pg)
        self.paints = place.is_last_stage and place.is_first
        """This rank draws its replica's pictures."""
        # Where nothing is drawn it is loaded, too: a folder that is damaged or another model's shows at once, on every rank.
        self.codec: PictureCodec = load_picture_codec(folder)
        self.codec.check(config)

    # ------------------------------------------------------------------------------------------------ before the answer

    def built(self, record: Record, *, think: bool | None) -> Sample:
        """The prompt of ``record``, with what stands before a block that comes at once."""
        prompt = self.checkpoint.builder.build_prompt(record, think=think)
        return continued(prompt, self._lead(record))

    def asked(self, record: Record, prompt: Sample) -> Block:
        """The block of the answer to ``prompt``."""
        first = self.wanted.begin != "model"
        most = 1 if first and self.wanted.begin == "block" else self.wanted.most
        return Block(
            ids=self.block_ids, where="first" if first else "end", most=most, vision=source_rows(record, prompt)
        )

    def _lead(self, record: Record) -> list[int]:
        if self.wanted.begin == "model":
            return []
        if self.wanted.begin == "block":
            return self.tokenizer.encode(self.wanted.lead) if self.wanted.lead else []
        answer = record.messages[-1]
        if not answer.num_drawn:
            raise RecordError(
                record.where, field="messages", value=answer.content, problem="draws nothing, and answers were to begin as it",
                fix="write <generate> into the answer, and name its target", reason="no_picture",
            )  # fmt: skip
        ids = answer_ids(answer, self.tokenizer, self.block_ids)
        return ids[: ids.index(self.block_ids[0])]

    # ------------------------------------------------------------------------------------------------ the pictures

    def draw(
        self,
        model: nn.Module,
        records: Callable[[int], Record],
        answers: Mapping[int, Sequence[Result]],
        *,
        take: Take,
        batch_size: int = 8,
        progress: bool = True,
    ) -> dict[int, list[DrawnFacts]]:
        """Draw the blocks of ``answers``, the same on every rank; what became of each, on every rank. All ranks together.

        Whatever ``take`` raises ends all ranks, the others with PeerFailed.
        """
        mine, failure = dict[int, list[DrawnFacts]](), None
        if self.paints:
            pg = self.checkpoint.pg
            own = [n for i, n in enumerate(sorted(answers)) if i % pg.dp.size() == pg.dp.rank()]
            try:
                mine = self._drawn(model, records, {n: answers[n] for n in own}, take, batch_size, progress)
            except Exception as error:
                failure = error
        parts: list[dict[int, list[DrawnFacts]] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine if failure is None else None)
        if failure is not None:
            raise failure
        if None in parts:
            raise PeerFailed("a rank that draws failed, and says why")
        return {n: facts for part in parts if part is not None for n, facts in part.items()}

    def _drawn(
        self,
        model: nn.Module,
        records: Callable[[int], Record],
        answers: Mapping[int, Sequence[Result]],
        take: Take,
        batch_size: int,
        progress: bool,
    ) -> dict[int, list[DrawnFacts]]:
        image = unwrapped(model).image
        assert image is not None
        image.eval()
        self.codec.to(image.null_caption.weight.device)
        told: dict[int, list[DrawnFacts]] = {n: [] for n in answers}
        pictures, owners = list[Picture](), list[tuple[int, DrawnFacts]]()
        for number, samples in answers.items():
            for picture, facts in self._pictures(records(number), number, samples):
                pictures.append(picture)
                owners.append((number, facts))
        shown = Progress(len(pictures), self.settings.steps) if progress and pictures else None
        batch = draw(
            image, self.codec, pictures, batch_size=batch_size, on_step=shown.step if shown else lambda _: None
        )
        left = set(range(len(pictures)))
        try:
            for i, pixels in batch:
                left.discard(i)
                number, facts = owners[i]
                take(number, facts, pixels)
                told[number].append(facts)
                if shown is not None:
                    shown.done()
        except ValueError as error:  # numbers that are not finite: of the weights, so of all that is left
            for i in left:
                number, facts = owners[i]
                told[number].append(replace(facts, error=str(error)))
        if shown is not None:
            shown.finish()
        return {n: sorted(facts, key=lambda one: (one.sample, one.number)) for n, facts in told.items()}

    def _pictures(self, record: Record, number: int, samples: Sequence[Result]) -> Iterator[tuple[Picture, DrawnFacts]]:
        """Of the answer to ``record``, which is named by its id, or by its number where it has none."""
        if not any(result.blocks for result in samples):
            return
        drawn = outline(record, self.checkpoint.builder, self.config, wanted=self.wanted.size)
        width = self.checkpoint.recipe.model.hidden_size
        for result in samples:
            for event in result.blocks:
                index = self.wanted.most * result.sample + event.number
                picture = Picture(
                    name=record.id or str(number),
                    number=index,
                    size=drawn.size,
                    settings=self.settings,
                    hidden=from_bytes(event.hidden, width),
                    vision=from_bytes(event.vision, width),
                    source=drawn.source,
                )
                facts = facts_of(picture, self.checkpoint)
                yield picture, DrawnFacts(sample=result.sample, number=event.number, facts=facts, note=drawn.note)


def facts_of(picture: Picture, checkpoint: Checkpoint) -> dict[str, Any]:
    """How a picture is drawn, as its file says it: with this and the same question it can be drawn again."""
    width, height = picture.size
    return {
        "model": "/".join(checkpoint.directory.parts[-3:]),
        "width": width,
        "height": height,
        "name": picture.name,
        "number": picture.number,
        **asdict(picture.settings),
        "source": picture.source is not None,
    }


def first_error(drawn: Mapping[int, Sequence[DrawnFacts]], number: int) -> str | None:
    """Why an answer has not all of its pictures; None: it has."""
    found = drawn.get(number, ())
    return next((facts.error for facts in found if facts.error is not None), None) if found else NO_PICTURE


class Progress:
    """How far the pictures of a rank are, on standard error: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, pictures: int, steps: int, *, stream: TextIO | None = None) -> None:
        self._pictures, self._steps, self._done, self._step = pictures, steps, 0, 0
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = time.monotonic()

    def step(self, number: int) -> None:
        """A batch has done so many steps."""
        self._step = number
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else LINE_SECONDS):
            self._shown = now
            self._show("\r" if self._terminal else "\n")

    def done(self) -> None:
        """One more picture is there."""
        self._done += 1

    def finish(self) -> None:
        """The last line; none where nothing was shown before."""
        if self._terminal:
            self._show("\n")

    def text(self) -> str:
        """``drawing 2/8 pictures, step 10/60``."""
        return f"drawing {self._done}/{self._pictures} pictures, step {self._step}/{self._steps}"

    def _show(self, end: str) -> None:
        bar = ""
        if self._terminal:
            share = (self._done + self._step / self._steps) / self._pictures
            filled = min(20, int(20 * share))
            bar = f"[{'#' * filled}{'.' * (20 - filled)}] "
        self._stream.write(f"{bar}{self.text()}{'   ' if self._terminal else ''}{end}")
        self._stream.flush()
