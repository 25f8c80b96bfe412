"""Draws what rows of evaluation ask for, with the thought that stands in them.

The answer of a row is given up to its picture; one forward reads the hidden states of the block, which are those that an
answer of the model's own would have (tests/distributed/test_blocks.py). The noise of a picture follows from the row's id.
Rows are dealt to the ranks, each of which computes whole pictures; ``gathered`` brings them together.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from examples.draw.scenes import SIZE_PX
from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.data.builders import sample_builder
from megatron_omni.data.collate import collate
from megatron_omni.data.sources import JsonlSource
from megatron_omni.generation.image import Picture, draw
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.picture import PictureWanted

BATCH = 16
Pixels = NDArray[np.uint8]


class Artist:
    """A checkpoint that draws; all ranks make it and draw together."""

    def __init__(self, checkpoint: Checkpoint, codec: Any) -> None:
        self.checkpoint, self.codec = checkpoint, codec
        self.model = checkpoint.load_model().eval()
        assert checkpoint.recipe.model.image is not None
        self.config = checkpoint.recipe.model.image
        recipe = deepcopy(checkpoint.recipe)  # of task supervised, whose samples have no pictures to draw
        recipe.task, recipe.generative = "generative", GenerativeConfig()
        self.builder = sample_builder(recipe, checkpoint.builder.tokenizer)

    def draw(
        self, path: Path, *, limit: int | None = None, steps: int | None = None, guidance: float | None = None
    ) -> list[Pixels]:
        """[3, 64, 64] of each row of a file, in its order, on every rank."""
        source = JsonlSource(path, name=path.stem)
        numbers = range(len(source) if limit is None else min(limit, len(source)))
        mine = numbers[dist.get_rank() :: dist.get_world_size()]
        made: dict[int, Pixels] = {}
        wanted = PictureWanted(steps=steps, text_guidance=guidance)
        for start in range(0, len(mine), BATCH):
            some = mine[start : start + BATCH]
            pictures = self._drawn([source[number] for number in some], wanted)
            made |= dict(zip(some, pictures))
        return [picture for _, picture in sorted(gathered(made).items())]

    @torch.no_grad()
    def _drawn(self, records: Sequence[Any], wanted: PictureWanted) -> list[Pixels]:
        """Of one batch."""
        builder = self.builder
        batch = collate([builder.build_sample(record) for record in records], pad_id=builder.pad_id, rule=builder.rule)
        drawn = batch.drawn
        assert drawn is not None and len(drawn) == len(records)
        _, hidden, vision = self.model(batch, step=0, stochastic=False, drawn=True)
        pictures = [
            Picture(
                name=record.id, size=(SIZE_PX, SIZE_PX), settings=wanted.settings(self.config.sampling),
                hidden=rows, vision=shown, source=source,
            )
            for record, rows, shown, source in zip(records, hidden, vision, drawn.sources)
        ]  # fmt: skip
        found = dict(draw(self.model.image, self.codec, pictures, batch_size=BATCH))
        return [found[number].numpy() for number in range(len(records))]


def gathered(found: dict[int, Any]) -> dict[int, Any]:
    """Of all ranks."""
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    return {number: one for some in everything for number, one in some.items()}
