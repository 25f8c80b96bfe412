"""Grouped matrix product: row by row against the expert's weight, empty groups, exact zero gradients, spare rows."""

import pytest
import torch

from megatron_omni.ops.grouped_gemm import grouped_gemm


def offsets(*counts):
    return torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("counts", [(3, 2, 4), (0, 5, 0), (0, 0, 0), (1, 0, 2)])
def test_every_row_meets_its_expert(counts):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = grouped_gemm(x, w, offsets(*counts))
    expert = [e for e, n in enumerate(counts) for _ in range(n)]
    expected = torch.stack([x[a] @ w[e] for a, e in enumerate(expert)]) if expert else x.new_zeros(0, 5)
    torch.testing.assert_close(y, expected)
    if sum(counts):
        assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, offsets(*counts)), (x, w))
    y.sum().backward()  # an expanded gradient, all strides zero
    for e, n in enumerate(counts):
        if n == 0:
            assert torch.equal(w.grad[e], torch.zeros(4, 5, dtype=torch.float64))
        else:
            assert w.grad[e].abs().max() > 0


def test_spare_rows_give_zero_and_get_zero():
    x = torch.full((5, 2), float("nan"))
    x[:3] = 1.0
    x.requires_grad_()
    w = torch.ones(2, 2, 3, requires_grad=True)
    y = grouped_gemm(x, w, offsets(1, 2))
    assert torch.equal(y.detach(), torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0])[:, None].expand(5, 3))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0])[:, None].expand(5, 2))
    assert torch.equal(w.grad[:, 0, 0], torch.tensor([1.0, 2.0]))


def test_offsets_must_fit_the_experts():
    with pytest.raises(ValueError, match="offsets: has 3 entries, must have 4"):
        grouped_gemm(torch.zeros(2, 2), torch.zeros(3, 2, 2), offsets(1, 1))
