"""What projectors learn from teachers, against the formulas row by row."""

import math

import pytest
import torch

from megatron_omni.losses.align import align_caption, align_visual, centred, cosines


def _rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _directional(f: list[float], g: list[float], weight: float) -> float:
    rms_f, rms_g = (math.sqrt(sum(v * v for v in row) / len(row)) for row in (f, g))
    square = sum((a / rms_f - b / rms_g) ** 2 for a, b in zip(f, g)) / len(f)
    cosine = sum(a * b for a, b in zip(f, g)) / (len(f) * rms_f * rms_g)
    assert square == pytest.approx(2 * (1 - cosine))
    return square + weight * abs(math.log(rms_f) - math.log(rms_g))


def test_captions_row_by_row() -> None:
    found, teacher = _rows(2, 4, 6, seed=0), 30 * _rows(2, 4, 6, seed=1)
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    for weight in (0.0, 0.01, 0.5):
        each = [[_directional(f, g, weight) for f, g in zip(a, b)] for a, b in zip(found.tolist(), teacher.tolist())]
        wanted = [sum(each[0]) / 4, each[1][0]]
        losses = align_caption(found, teacher, mask, norm_weight=weight)
        assert losses.tolist() == pytest.approx(wanted, rel=1e-5) and losses.dtype == torch.float32
    plain = align_caption(found, teacher, mask, metric="mse")
    assert plain.tolist() == pytest.approx([(found - teacher)[place].square().mean().item() for place in (0, (1, 0))])


def test_direction_is_all_that_counts_but_for_the_length_term() -> None:
    found, mask = _rows(1, 3, 6, seed=0), torch.ones(1, 3, dtype=torch.bool)
    assert align_caption(found, 7 * found, mask, norm_weight=0).item() == pytest.approx(0, abs=1e-6)
    assert align_caption(found, 7 * found, mask).item() == pytest.approx(0.01 * math.log(7), rel=1e-4)
    assert align_caption(found, -found, mask).item() == pytest.approx(4)
    shifted = 5 * found + 3  # of a task vector: a LayerNorm follows
    assert align_caption(centred(found), centred(shifted), mask, norm_weight=0).item() == pytest.approx(0, abs=1e-5)
    assert align_caption(found, found + 3, mask, metric="mse").item() == pytest.approx(9)


def test_rows_that_do_not_count_have_no_gradient() -> None:
    found = _rows(2, 3, 4, seed=0).requires_grad_()
    teacher = torch.zeros(2, 3, 4)
    teacher[:, 0] = 1
    mask = torch.tensor([[True, False, False]]).expand(2, -1)
    align_caption(found, teacher, mask).sum().backward()
    assert found.grad[:, 0].abs().min() > 0 and not found.grad[:, 1:].any()


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    found = torch.zeros(1, 1, 4, requires_grad=True)
    align_caption(found, torch.ones(1, 1, 4), torch.ones(1, 1, dtype=torch.bool)).backward()
    assert found.grad.isfinite().all() and found.grad.any()


def test_cosines() -> None:
    a = torch.tensor([[[1.0, 0, 0], [0, 2, 0]]])
    b = torch.tensor([[[3.0, 0, 0], [0, 1, 1]]])
    assert cosines(a, b).item() == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-5)
    assert cosines(a, b, torch.tensor([[True, False]])).item() == pytest.approx(1)


def test_vision_rows_count_as_they_are() -> None:
    rows = _rows(2, 24, 5, seed=1)
    assert align_visual(rows, 2 * rows).tolist() == pytest.approx(rows.square().mean((1, 2)).tolist(), rel=1e-5)
