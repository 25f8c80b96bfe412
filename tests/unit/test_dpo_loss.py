"""DPO's loss and gradient against the definition in float64, with each option; what it is at the reference's weights."""

import math
from itertools import product

import pytest
import torch

from megatron_omni.losses.dpo import dpo_loss, pair_sums

LENGTHS = [3, 5, 1, 4, 6, 6]
OPTIONS = [
    dict(beta=beta, label_smoothing=e, length_normalized=normalized, sft_weight=w)
    for beta, e, normalized, w in product([0.1, 0.5], [0.0, 0.2], [False, True], [0.0, 0.3])
]


def problem():
    """log p of six responses, three pairs, and the reference's sums; padding holds anything."""
    g = torch.Generator().manual_seed(1)
    log_probs = -3 * torch.rand(6, max(LENGTHS), generator=g, dtype=torch.float64)
    reference = -3 * torch.rand(3, 2, generator=g, dtype=torch.float64) * torch.tensor(LENGTHS).view(3, 2)
    return log_probs, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None], reference


def definition(log_probs, reference, *, num_pairs, beta, label_smoothing, length_normalized, sft_weight):
    """Loss and gradient by log p, a pair and a token at a time."""
    total, gradient = 0.0, torch.zeros_like(log_probs)
    for pair in range(3):
        change, lengths = [], LENGTHS[2 * pair : 2 * pair + 2]
        for side in range(2):
            d = sum(float(log_probs[2 * pair + side, t]) for t in range(lengths[side])) - float(reference[pair, side])
            change.append(d / (lengths[side] if length_normalized else 1))
        margin = beta * (change[0] - change[1])
        sigmoid = 1 / (1 + math.exp(-margin))
        total += -(1 - label_smoothing) * math.log(sigmoid) - label_smoothing * math.log(1 - sigmoid)
        by_margin = -(1 - label_smoothing) * (1 - sigmoid) + label_smoothing * sigmoid
        for side, sign in enumerate((1, -1)):
            each = sign * beta * by_margin / (lengths[side] if length_normalized else 1)
            gradient[2 * pair + side, : lengths[side]] += each
        total -= sft_weight * sum(float(log_probs[2 * pair, t]) for t in range(lengths[0])) / lengths[0]
        gradient[2 * pair, : lengths[0]] -= sft_weight / lengths[0]
    return total / num_pairs, gradient / num_pairs


def computed(log_probs, valid, reference, *, num_pairs, **options):
    return dpo_loss(pair_sums(log_probs, valid), reference, valid.sum(1).view(-1, 2), num_pairs=num_pairs, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_loss_and_gradient_are_those_of_the_definition(options):
    log_probs, valid, reference = problem()
    log_probs.requires_grad_()
    terms = computed(log_probs, valid, reference, num_pairs=7, **options)
    (gradient,) = torch.autograd.grad(terms.loss, log_probs)
    loss, right = definition(log_probs.detach(), reference, num_pairs=7, **options)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_at_the_references_weights_the_loss_is_ln_2_to_the_bit(smoothing):
    log_probs, valid, _ = problem()
    log_probs = log_probs.float()
    terms = computed(log_probs, valid, pair_sums(log_probs, valid), num_pairs=3, label_smoothing=smoothing)
    assert (terms.margins == 0).all() and terms.losses.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-15)
    assert terms.loss.item() == torch.tensor(math.log(2)).item()


def test_swapping_the_sides_flips_the_margin():
    log_probs, valid, reference = problem()
    swapped = [1, 0, 3, 2, 5, 4]
    there = computed(log_probs, valid, reference, num_pairs=3)
    back = computed(log_probs[swapped], valid[swapped], reference.flip(1), num_pairs=3)
    assert torch.equal(there.margins, -back.margins) and there.margins.abs().min() > 0


def test_a_pairs_loss_does_not_depend_on_its_batch():
    log_probs, valid, reference = problem()
    together = computed(log_probs, valid, reference, num_pairs=1)
    for pair in range(3):
        rows = slice(2 * pair, 2 * pair + 2)
        longest = int(valid[rows].sum(1).max())
        alone = computed(log_probs[rows, :longest], valid[rows, :longest], reference[pair : pair + 1], num_pairs=1)
        assert alone.losses[0].item() == together.losses[pair].item()


def test_a_pair_that_only_fills_a_step_counts_in_nothing():
    log_probs, valid, reference = problem()
    log_probs = log_probs.requires_grad_()
    without = computed(log_probs[2:], valid[2:], reference[1:], num_pairs=2, sft_weight=0.5)
    empty = valid.clone()
    empty[:2] = False
    terms = computed(log_probs, empty, reference, num_pairs=2, sft_weight=0.5)
    assert terms.loss.item() == without.loss.item() and terms.losses[0] == 0 and terms.margins[0] == 0
    assert not torch.autograd.grad(terms.loss, log_probs)[0][:2].any()
