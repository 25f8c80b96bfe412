"""Permutation: definition token by token, gradients by finite differences, empty tokens and experts, fp32 sums."""

import pytest
import torch

from megatron_omni.ops.permute import build_permutation, permute, unpermute

MAPS = {
    "mixed": [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 0, 0]],
    "unused expert": [[1, 0, 1], [1, 0, 0]],
    "nothing": [[0, 0, 0], [0, 0, 0]],
    "no tokens": [],
}


def routing_map(name):
    return torch.tensor(MAPS[name], dtype=torch.bool).view(-1, 3)


@pytest.mark.parametrize("name", MAPS)
def test_metadata_lists_every_assignment_once(name):
    routing = routing_map(name)
    meta = build_permutation(routing)
    expected = [(e, t) for e in range(3) for t in range(routing.shape[0]) if routing[t, e]]
    assert list(zip(meta.row_expert.tolist(), meta.row_token.tolist(), strict=True)) == expected
    for e in range(3):
        span = range(int(meta.offsets[e]), int(meta.offsets[e + 1]))
        assert [expected[a] for a in span] == [(e, t) for t in range(routing.shape[0]) if routing[t, e]]
    for t in range(routing.shape[0]):
        rows = meta.token_rows[int(meta.token_offsets[t]) : int(meta.token_offsets[t + 1])].tolist()
        assert [expected[a] for a in rows] == [(e, t) for e in range(3) if routing[t, e]]


@pytest.mark.parametrize("name", MAPS)
def test_rows_and_sums_token_by_token(name):
    routing = routing_map(name)
    torch.manual_seed(0)
    x = torch.randn(routing.shape[0], 4, dtype=torch.float64)
    meta = build_permutation(routing)
    rows = permute(x, meta)
    assert rows.shape == (int(routing.sum()), 4)
    for a in range(rows.shape[0]):
        assert torch.equal(rows[a], x[meta.row_token[a]])
    weights = torch.rand(rows.shape[0], dtype=torch.float64)
    y = unpermute(rows, weights, meta, num_tokens=x.shape[0])
    expected = torch.zeros_like(x)
    for a, t in enumerate(meta.row_token.tolist()):
        expected[t] += weights[a] * rows[a]
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


def test_gradients_by_finite_differences():
    meta = build_permutation(routing_map("mixed"))
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, meta), (x,))
    assert torch.autograd.gradcheck(lambda x: permute(x, meta, num_rows=9), (x,))
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, meta, num_tokens=5), (rows, weights))


def test_gradient_factor_scales_rows_and_weights_alike():
    """d rows = f w g and d weights = f <row, g>: autograd of the weighted rows with their gradient scaled by f."""
    meta = build_permutation(routing_map("mixed"))
    torch.manual_seed(0)
    factor = torch.tensor([2.0, 6.0, 2.0, 2.0, 6.0, 6.0], dtype=torch.float64)
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 3, dtype=torch.float64)
    y = unpermute(rows, weights, meta, num_tokens=5, gradient_factor=factor)
    got = torch.autograd.grad(y, (rows, weights), g)
    per_row = factor[:, None] * g[meta.row_token]
    torch.testing.assert_close(y, unpermute(rows, weights, meta, num_tokens=5))
    torch.testing.assert_close(got[0], weights[:, None] * per_row)
    torch.testing.assert_close(got[1], (rows * per_row).sum(1))


def test_spare_rows_are_zero_and_ignored():
    meta = build_permutation(routing_map("mixed"))
    x = torch.ones(5, 2, requires_grad=True)
    rows = permute(x, meta, num_rows=10)
    assert torch.equal(rows.detach()[6:], torch.zeros(4, 2)) and bool((rows[:6] == 1).all())
    poisoned = torch.cat([rows[:6].detach(), torch.full((4, 2), float("nan"))]).requires_grad_()
    y = unpermute(poisoned, torch.ones(6), meta, num_tokens=5)
    y.sum().backward()
    assert torch.equal(y.detach()[:, 0], torch.tensor([2.0, 0.0, 3.0, 1.0, 0.0]))
    assert torch.equal(poisoned.grad[6:], torch.zeros(4, 2))
    with pytest.raises(ValueError, match="num_rows: 5 output rows cannot hold 6"):
        permute(x, meta, num_rows=5)


def test_sums_of_bfloat16_rows_are_taken_in_fp32():
    """256 + 1 + 1 + 1 is 256 when every partial sum is rounded to bfloat16, and 259 -> 260 when only the end is."""
    meta = build_permutation(torch.ones(1, 4, dtype=torch.bool))
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert unpermute(rows, torch.ones(4), meta, num_tokens=1, out_dtype=torch.float32).item() == 259.0
    assert unpermute(rows, torch.ones(4), meta, num_tokens=1).item() == 260.0
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    permute(x, meta).backward(rows)
    assert x.grad.item() == 260.0
