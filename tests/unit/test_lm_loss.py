"""The loss is a mean over the label tokens of the global batch, however the batch is cut; its breakdown adds up."""

from dataclasses import replace

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.data import SourceConfig
from megatron_omni.losses.lm import lm_loss, loss_report, report_names
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.training.task import StepInfo
from tests.attention import segments_of

TEXT, IMAGE, VIDEO, AUDIO = Modality


def batch_of(rows: list[list[tuple[int, Modality, bool, int]]], source: int = 0) -> OmniBatch:
    """Rows of (segment, modality, labelled, source) tokens; segment -1 is padding."""
    shape = (len(rows), max(map(len, rows)))
    padded = [row + [(-1, TEXT, False, 0)] * (shape[1] - len(row)) for row in rows]
    column = lambda i: torch.tensor([[token[i] for token in row] for row in padded])  # noqa: E731
    zeros = torch.zeros(shape, dtype=torch.int64)
    return OmniBatch.of(
        input_ids=zeros,
        labels=torch.where(column(2), 1, IGNORE_LABEL),
        position_ids=zeros.expand(3, *shape),
        segment_ids=column(0),
        sample_ids=zeros,
        sample_positions=zeros,
        modality=column(1),
        source_ids=column(3),
        attention=segments_of(column(0)),
    )


ROWS = [
    [(0, TEXT, False, 0), (0, IMAGE, False, 0), (0, TEXT, True, 0), (1, TEXT, True, 1), (1, TEXT, True, 1)],
    [(0, AUDIO, False, 2), (0, VIDEO, False, 2), (0, TEXT, True, 2)],
]
LOSSES = torch.tensor([[9.0, 9.0, 1.0, 2.0, 4.0], [9.0, 9.0, 8.0, 9.0, 9.0]])


def test_loss_is_the_global_mean_whatever_the_split() -> None:
    whole = batch_of(ROWS)
    mean = lm_loss(LOSSES, whole.labels, num_label_tokens=4)
    assert mean.item() == pytest.approx((1 + 2 + 4 + 8) / 4)
    parts = [lm_loss(LOSSES[i : i + 1], whole.labels[i : i + 1], num_label_tokens=4) for i in range(2)]
    assert torch.stack(parts).sum().item() == pytest.approx(mean.item())


def test_a_step_without_labels_has_loss_zero_not_nan() -> None:
    labels = torch.full((1, 3), IGNORE_LABEL)
    assert lm_loss(torch.ones(1, 3), labels, num_label_tokens=0).item() == 0.0


def test_unlabelled_tokens_get_no_gradient() -> None:
    losses = LOSSES.clone().requires_grad_()
    lm_loss(losses, batch_of(ROWS).labels, num_label_tokens=4).backward()
    expected = [[0, 0, 0.25, 0.25, 0.25], [0, 0, 0.25, 0, 0]]
    assert losses.grad is not None and losses.grad.tolist() == expected


def test_loss_weights_of_sources_scale_gradients_and_nothing_that_is_reported() -> None:
    batch, sources = (
        batch_of(ROWS),
        [SourceConfig(name=n, path=n, loss_weight=w) for n, w in zip("abc", (1.0, 3.0, 0.5))],
    )

    def loss_and_gradient(sources: list[SourceConfig], *, training: bool) -> tuple[torch.Tensor, list[list[float]]]:
        losses = LOSSES.clone().requires_grad_()
        info = StepInfo(step=1, training=training, divisor=4)
        output, loss_function = SupervisedTask(sources).forward_step(batch, lambda *_, **__: losses, info=info)
        loss, report = loss_function(output)
        loss.backward()
        assert losses.grad is not None
        assert report[0].tolist() == [15.0, 4.0]
        return loss, losses.grad.tolist()

    loss, gradient = loss_and_gradient(sources, training=True)
    assert loss.item() == pytest.approx((1 + 3 * (2 + 4) + 0.5 * 8) / 4)
    assert gradient == [[0, 0, 0.25, 0.75, 0.75], [0, 0, 0.125, 0, 0]]
    plain = [[0, 0, 0.25, 0.25, 0.25], [0, 0, 0.25, 0, 0]]
    assert loss_and_gradient(sources, training=False)[1] == plain
    assert loss_and_gradient([replace(s, loss_weight=1.0) for s in sources], training=True)[1] == plain


def test_report_rows() -> None:
    names = report_names(["a", "b", "c"])
    rows = dict(zip(names, loss_report(LOSSES, batch_of(ROWS), num_sources=3).tolist(), strict=True))
    assert rows == {
        "lm loss": [15.0, 4.0],
        "loss/modality/text": [6.0, 2.0],
        "loss/modality/image": [1.0, 1.0],
        "loss/modality/video": [8.0, 1.0],
        "loss/modality/audio": [8.0, 1.0],
        "loss/source/a": [1.0, 1.0],
        "loss/source/b": [6.0, 2.0],
        "loss/source/c": [8.0, 1.0],
    }


def test_report_ignores_values_at_unlabelled_tokens() -> None:
    losses = LOSSES.clone()
    losses[0, 0] = float("nan")
    assert loss_report(losses, batch_of(ROWS), num_sources=3)[0].tolist() == [15.0, 4.0]
