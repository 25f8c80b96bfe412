"""The estimators against A.4: forward factor, gradient factor, expectation over B, and bias on cubic objectives."""

import pytest
import torch

from megatron_omni.ops.gradient_estimator import (
    KEEP_PROBABILITY,
    argmax_among_remaining,
    row_gradient_factor,
    scale_forward,
    slot_scale,
)
from megatron_omni.ops.permute import build_permutation, unpermute


def test_delta_compares_with_what_is_left():
    """Draw order 2, 0, 1, null: slot 2 was not the best; slot 0 was, of what was left; a tie goes to the lower
    index."""
    z = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    rank = torch.tensor([[1, 2, 0, 3]])
    assert argmax_among_remaining(z, rank).tolist() == [[True, True, False, True]]
    swapped = torch.tensor([[1, 3, 0, 2]])  # the tied slots in the other order: index 3 is drawn while 1 is left
    assert argmax_among_remaining(z, swapped).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("estimator", "mean"), [("paper", 1 / 3 + 2 / 3 * 5 / 8), ("grin", 1 / 3 + 2 / 3 / 4)])
def test_scale_is_one_or_a_third_with_the_right_mean(estimator, mean):
    """s in {1, 1/3}; E[s] = 3/4 (paper) or 1/2 (grin) where the draw left the argmax, 1 where it did not."""
    u = torch.rand(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta = torch.tensor([True, False]).expand(200_000, 2)
    s = slot_scale(delta, u, estimator=estimator)
    assert set(s.flatten().tolist()) == {1.0, 1 / 3}
    assert bool((s[:, 0] == 1).all())
    assert s[:, 1].mean().item() == pytest.approx(mean, abs=5 * 0.34 / 200_000**0.5)


def combine(weights, rows, s, estimator):
    """One row per token, as the layer combines them."""
    meta = build_permutation(torch.ones(rows.shape[0], 1, dtype=torch.bool))
    effective = {"paper": lambda: weights * s, "grin": lambda: scale_forward(weights, s), "none": lambda: weights}
    factor = row_gradient_factor(s, estimator=estimator)
    return unpermute(rows, effective[estimator](), meta, num_tokens=rows.shape[0], gradient_factor=factor)


@pytest.mark.parametrize("estimator", ["paper", "grin", "none"])
def test_forward_and_gradient_factors(estimator):
    """paper: o_est = 2 o + detach(s o - 2 o), literally. grin: s w forward, dw without s, dE with s. none: o."""
    torch.manual_seed(0)
    s = torch.tensor([1.0, 1 / 3, 1 / 3, 1.0], dtype=torch.float64)
    weights = torch.rand(4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 3, dtype=torch.float64)
    y = combine(weights, rows, s, estimator)
    got = torch.autograd.grad(y, (weights, rows), g)
    o = weights[:, None] * rows
    if estimator == "paper":
        literal = 2 * o + (s[:, None] * o - 2 * o).detach()
        expected = torch.autograd.grad(literal, (weights, rows), g)
        torch.testing.assert_close(got[0], 2 * (rows * g).sum(1))
        torch.testing.assert_close(got[1], 2 * weights[:, None] * g)
    elif estimator == "grin":
        literal = s[:, None] * o
        expected = ((rows * g).sum(1), (s * weights)[:, None] * g)
    else:
        literal = o
        expected = torch.autograd.grad(o, (weights, rows), g)
    torch.testing.assert_close(y, literal)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def bias(estimator, *, argmax_shortcut=True, num_problems=200, num_experts=5, width=4):
    """Medians over random problems: cosine, norm ratio and relative error of the expected estimate to the exact
    gradient.

    L(z) = sum_D p_D f(p_D E_D), A.4's eq. 5, with f a random cubic and D ~ softmax(z); its gradient by autograd. The
    expectation of the estimate over D and B is enumerated.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    figures = []
    for _ in range(num_problems):
        z, experts = normal(num_experts), normal(num_experts, width)
        constant, a, b, c = normal(1), normal(width), 0.5 * normal(width), 0.3 * normal(width)

        def f(o, constant=constant, a=a, b=b, c=c):
            return constant + o @ a + o**2 @ b + o**3 @ c

        exact_z = z.clone().requires_grad_()
        p = torch.softmax(exact_z, 0)
        (exact,) = torch.autograd.grad((p * f(p[:, None] * experts)).sum(), exact_z)

        delta = ((torch.arange(num_experts) == z.argmax()) & argmax_shortcut)[None]
        estimate = torch.zeros_like(exact)
        for draw, probability in ((0.0, KEEP_PROBABILITY[estimator]), (1.0, 1 - KEEP_PROBABILITY[estimator])):
            u = torch.full((1, num_experts), draw, dtype=torch.float64)
            s = slot_scale(delta, u, estimator=estimator)[0]
            one_z = z.clone().requires_grad_()
            gate = torch.softmax(one_z, 0)
            y = combine(gate, experts, s, estimator)
            (gradient,) = torch.autograd.grad((gate.detach() * f(y)).sum(), one_z)
            estimate += probability * gradient
        cosine = torch.nn.functional.cosine_similarity(estimate, exact, dim=0)
        figures.append(torch.stack([cosine, estimate.norm() / exact.norm(), (estimate - exact).norm() / exact.norm()]))
    return torch.stack(figures).median(0).values.tolist()


def test_third_order_estimator_is_exact_for_cubics():
    """docs/model.md 2.3: without the argmax shortcut, cosine and norm ratio are 1."""
    assert bias("paper", argmax_shortcut=False) == pytest.approx([1.0, 1.0, 0.0], abs=1e-9)


def test_bias_of_the_hybrid_estimators():
    """docs/model.md 2.3: the hybrid paper form keeps direction and norm; the published code has half the norm, so half the
    error.

    The spec's own problems are not recorded (cosine 0.994 there); these give 0.9994, ratio 1.03 and 0.9981, ratio 0.52.
    """
    paper, grin = bias("paper"), bias("grin")
    assert paper[0] > 0.994 and paper[1] == pytest.approx(1.0, abs=0.05)
    assert grin[0] > 0.99 and grin[1] == pytest.approx(0.5, abs=0.03)
    assert paper[2] < 0.15 and grin[2] == pytest.approx(0.5, abs=0.03)
