"""GSPO's advantages, loss and gradient against their definition written as loops over sequences and tokens, in float64."""

import math

import pytest
import torch
from torch import Tensor

from megatron_omni.losses.gspo import advantages, gspo_loss

LOW, HIGH = 3e-4, 4e-4
LENGTHS = [4, 1, 6, 3, 5, 2]
NONE = math.nan


CHANGES = [1e-3, -1e-3, 1e-3, 1e-3, -1e-3, 1e-4]
"""Mean log ratio of each sequence."""


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p, old log p, reference log p, valid; padding holds anything."""
    g = torch.Generator().manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    old = -2 * torch.rand(shape, generator=g, dtype=torch.float64)
    reference = old + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
    valid = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    noise = torch.randn(shape, generator=g, dtype=torch.float64).masked_fill(~valid, 0.0)
    noise -= noise.sum(1, keepdim=True) / torch.tensor(LENGTHS)[:, None]
    new = old + torch.tensor(CHANGES, dtype=torch.float64)[:, None] + 1e-3 * noise
    return new, old, reference, valid


def definition(new, old, reference, valid, advantage, kept, *, num_sequences, low, high, kl_coeff):
    """Loss and its gradient by log p: the formulas of the module, one token at a time."""
    loss, gradient = 0.0, torch.zeros_like(new)
    for i, length in enumerate(valid.sum(1).tolist()):
        if not kept[i]:
            continue
        a = float(advantage[i])
        ratio = math.exp(sum(float(new[i, t] - old[i, t]) for t in range(length)) / length)
        clipped = min(max(ratio, 1 - low), 1 + high)
        loss -= min(ratio * a, clipped * a)
        moves = ratio * a <= clipped * a
        for t in range(length):
            if moves:
                gradient[i, t] -= ratio * a / length
            d = float(reference[i, t] - new[i, t])
            loss += kl_coeff * (math.exp(d) - d - 1) / length
            gradient[i, t] += kl_coeff * (1 - math.exp(d)) / length
    return loss / num_sequences, gradient / num_sequences


@pytest.mark.parametrize("kl_coeff", [0.0, 0.05])
@pytest.mark.parametrize("form", ["sequence", "token"])
def test_loss_and_gradient_are_those_of_the_definition(form, kl_coeff):
    new, old, reference, valid = problem()
    advantage = torch.tensor([1.5, -0.5, -2.0, 1.0, 0.7, -0.3], dtype=torch.float64)
    kept = torch.tensor([True, True, True, False, True, True])
    new = new.masked_fill(~valid, 0.0).requires_grad_()
    terms = gspo_loss(
        new, old, valid, advantage, kept, num_sequences=17, clip_low=LOW, clip_high=HIGH, form=form,
        kl_coeff=kl_coeff, reference_log_probs=reference if kl_coeff else None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.loss, new)
    loss, right = definition(
        new.detach(), old, reference, valid, advantage, kept, num_sequences=17, low=LOW, high=HIGH, kl_coeff=kl_coeff
    )
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6) and terms.loss.dtype == torch.float32
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-15)
    assert terms.clipped_high.tolist() == [True, *[False] * 5] and terms.clipped_low.nonzero().tolist() == [[1]]
    assert (gradient[~valid] == 0).all() and (gradient[3] == 0).all()


@pytest.mark.parametrize("form", ["sequence", "token"])
@pytest.mark.parametrize(
    ("change", "advantage", "moves"),
    [(1e-3, 1.0, False), (-1e-3, -1.0, False), (1e-3, -1.0, True), (-1e-3, 1.0, True), (3.5e-4, 1.0, True),
     (-3.5e-4, -1.0, False), (-2.5e-4, -1.0, True), (0.0, 1.0, True)],
)  # fmt: skip
def test_the_clip_stops_one_side_of_each_sign(change, advantage, moves, form):
    """Above by 4e-4 with A > 0 and below by 3e-4 with A < 0 the gradient is 0 exactly; on the other sides it is whole."""
    old = torch.tensor([[-1.0, -0.5, -2.0]], dtype=torch.float64)
    new = (old + change).requires_grad_()
    valid, a = torch.ones(1, 3, dtype=torch.bool), torch.tensor([advantage])
    terms = gspo_loss(
        new, old, valid, a, torch.tensor([True]), num_sequences=1, clip_low=LOW, clip_high=HIGH, form=form
    )
    (gradient,) = torch.autograd.grad(terms.loss, new)
    expected = -advantage * math.exp(change) / 3 if moves else 0.0
    torch.testing.assert_close(gradient, torch.full_like(old, expected), rtol=1e-12, atol=0.0)
    assert (terms.clipped_high.item(), terms.clipped_low.item()) == (
        not moves and advantage > 0, not moves and advantage < 0,
    )  # fmt: skip


def test_before_the_first_update_the_ratio_is_one_and_the_loss_is_minus_the_mean_advantage():
    new, _, _, valid = problem()
    found = advantages(torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]))
    terms = gspo_loss(
        new.float(), new.float(), valid, found.values.flatten(), found.kept.flatten(), num_sequences=6, clip_low=LOW,
        clip_high=HIGH,
    )  # fmt: skip
    assert (terms.ratio == 1).all() and abs(terms.loss.item()) < 1e-15
    assert not (terms.clipped_low | terms.clipped_high).any()


def test_the_divisor_is_the_callers_so_micro_batches_add_up():
    new, old, _, valid = problem()
    a, kept = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.ones(6, dtype=torch.bool)

    def loss(rows: slice) -> float:
        few = gspo_loss(
            new[rows], old[rows], valid[rows], a[rows], kept[rows], num_sequences=6, clip_low=LOW, clip_high=HIGH
        )
        return few.loss.item()

    assert loss(slice(0, 1)) + loss(slice(1, 6)) == pytest.approx(loss(slice(0, 6)), abs=1e-7)


def test_nothing_kept_is_a_loss_of_zero_with_a_gradient():
    new, old, _, valid = problem()
    new = new.requires_grad_()
    none = torch.zeros(6, dtype=torch.bool)
    terms = gspo_loss(new, old, valid, torch.ones(6), none, num_sequences=0, clip_low=LOW, clip_high=HIGH)
    terms.loss.backward()
    assert terms.loss.item() == 0.0 and new.grad is not None and not new.grad.any()


# ------------------------------------------------------------------------------------------------ advantages


def advantages_by_hand(group: list[float]) -> tuple[list[float], list[bool]]:
    given = [r for r in group if not math.isnan(r)]
    mean = sum(given) / max(len(given), 1)
    std = math.sqrt(sum((r - mean) ** 2 for r in given) / max(len(given), 1))
    kept = [not math.isnan(r) and std > 1e-6 for r in group]
    return [(r - mean) / std if k else 0.0 for r, k in zip(group, kept)], kept


GROUPS = [
    [1.0, 0.0, 0.0, 0.0], [1.5, 0.5, 0.5, 0.0], [1.0, NONE, 0.0, 0.25], [0.3, 0.3, 0.3, 0.3], [NONE] * 4,
    [0.7, NONE, NONE, NONE], [0.1 + 0.2, 0.3, 0.3, 0.3], [1e-3, 0.0, 0.0, 0.0],
]  # fmt: skip


def test_advantages_are_those_of_the_definition_and_sum_to_zero():
    found = advantages(torch.tensor(GROUPS))
    for group, values, kept in zip(GROUPS, found.values.tolist(), found.kept.tolist(), strict=True):
        right, right_kept = advantages_by_hand(group)
        assert kept == right_kept, group
        assert values == pytest.approx(right, rel=1e-5) and sum(values) == pytest.approx(0.0, abs=1e-12)
    # One winner of four: sqrt(3) and three times -1 / sqrt(3), by the population's deviation.
    assert found.values[0].tolist() == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], rel=1e-12)
    assert [int(kept.sum()) for kept in found.kept] == [4, 4, 3, 0, 0, 0, 0, 4]


def test_advantages_of_a_pair_are_plus_and_minus_one():
    found = advantages(torch.tensor([[0.2, 0.9], [0.5, 0.5], [NONE, 1.0]]))
    assert found.values.tolist() == [[pytest.approx(-1.0), pytest.approx(1.0)], [0.0, 0.0], [0.0, 0.0]]
    assert found.kept.tolist() == [[True, True], [False, False], [False, False]]
