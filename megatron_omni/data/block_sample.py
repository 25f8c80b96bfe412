"""Record -> sample of a run that has no language model (task ``generative`` with ``conditions`` ``cached`` or ``teachers``).

A sample is the block of each picture that the record draws and nothing else: T tokens a picture, none of them learned. Texts
are not tokenized and no medium is decoded but pictures without latents. A record that draws nothing is left out
(``no_target``).
"""

from functools import partial

import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.config.run import Recipe
from megatron_omni.data.drawn_pictures import PictureReader, Standing, learned_pictures, picture_source
from megatron_omni.data.record import Record, RecordError
from megatron_omni.data.sample import Sample, SampleBuilder
from megatron_omni.data.sizes import RecordFacts, SampleSize, SizeRule, check_drawable, measure_targets
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.positions import TextSpan, position_ids


class BlockSizeRule(SizeRule):
    """Sizes of blocks alone."""

    def conversation_size(self, facts: RecordFacts, *, where: str = "") -> SampleSize:
        """Size of the training sample; RecordError for a record that draws nothing."""
        if not facts.targets:
            raise _nothing(where)
        size = SampleSize(len(self.block) * len(facts.targets), drawn=len(facts.targets))
        self.check_length(size[:4], where=where)
        return size


class BlockBuilder(SampleBuilder):
    """Turns records that draw into blocks."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(recipe, tokenizer)
        self.reader = PictureReader(recipe, self.decoder)

    def size(self, record: Record) -> SampleSize:
        """Size of the training sample; no medium but the targets is looked at."""
        check_drawable(record, self.tokenizer)
        targets = measure_targets(record)
        facts = RecordFacts(0, has_system=False, has_answer=record.has_answer, targets=targets)
        return self.sizes.size(facts, where=record.where)

    def build_sample(self, record: Record) -> Sample:
        """The blocks of a record's pictures; RecordError or MediaError for what cannot be used."""
        check_drawable(record, self.tokenizer)
        if not learned_pictures(record):
            raise _nothing(record.where)
        block = self.sizes.block
        length = len(block) * len(record.targets)
        standing = [
            Standing(
                number,
                range(number * len(block), (number + 1) * len(block)),
                None if source is None else partial(picture_source, record, source, self.decoder),
                None,
            )
            for number, source in enumerate(record.picture_sources)
            if number in learned_pictures(record)
        ]
        ids = torch.tensor([*block] * len(record.targets), dtype=torch.int64)
        positions, next_position = position_ids([TextSpan(length)], self.rule)
        return Sample(
            input_ids=ids,
            labels=torch.full_like(ids, IGNORE_LABEL),
            position_ids=positions,
            next_position=next_position,
            modality=torch.full_like(ids, int(Modality.TEXT)),
            tiles=None,
            chunks=None,
            drawn=self.reader.read(record, standing),
        )

    def _size_rule(self, recipe: Recipe) -> SizeRule:
        return BlockSizeRule(recipe, self.tokenizer)


def _nothing(where: str) -> RecordError:
    return RecordError(
        where, field="targets", value=None, problem="draws nothing that is learned: a run without a language model learns "
        "pictures alone", fix="leave the source out, or set generative.conditions = model", reason="no_target",
    )  # fmt: skip
