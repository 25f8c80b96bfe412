"""Accuracy of codes and of their end, by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.run import Recipe
from megatron_omni.tasks.choice import task_of
from megatron_omni.tasks.speech import SpeechTask
from megatron_omni.training.task import StepInfo
from tests.distributed.tiny_speech import DENSE, SPEECH, batch_of


class Told:
    """Stands for the model: of the labels of each sequence, in order, some are the most probable token."""

    def __init__(self, right: list[list[bool]]) -> None:
        self.right = right

    def __call__(self, batch: OmniBatch, *, with_top: bool, **_: Any) -> Tensor:
        assert with_top
        loss = torch.ones(batch.labels.shape)
        is_top = torch.zeros(batch.labels.shape)
        for row, right in enumerate(self.right):
            is_top[row, batch.labels[row] >= 0] = torch.tensor(right, dtype=torch.float32)
        return torch.stack([loss, is_top])


def test_codes_and_ends_are_counted_apart() -> None:
    """Five labels, of which the first end is missed, and seven, of which the second is found."""
    recipe = Recipe(model=DENSE)
    recipe.data.sources = [SourceConfig(name="a", path="a")]
    task = task_of(recipe)
    assert isinstance(task, SpeechTask)
    batch = batch_of("short")
    assert [int((row >= 0).sum()) for row in batch.labels] == [5, 7]
    model = Told([[True, False, True, True, False], [True, False, False, True, True, True, True]])
    info = StepInfo(step=1, training=True, divisor=12)
    output, loss_function = task.forward_step(batch, model, info=info)  # type: ignore[arg-type]
    loss, report = loss_function(output)
    table = dict(zip(task.report_names, report.tolist(), strict=True))
    assert loss.item() == pytest.approx(1.0) and table["lm loss"] == [12.0, 12.0]
    assert table["accuracy/codes"] == [7.0, 10.0]
    assert table["accuracy/end"] == [1.0, 2.0]
    assert SPEECH.ids.codes_end in batch.labels
