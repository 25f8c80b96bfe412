"""Grouped matrix product: row by row against the expert's weight, empty groups, exact zero gradients, spare rows."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.ops.extension import use_cpu_engine
from megatron_omni.ops.grouped_gemm import grouped_gemm, grouped_gemm_reference, grouped_gemm_wgrad
from tests.ops.ragged import ENGINES, counts, examples, offsets_of, sides
from tests.ops.rounding import accumulator, assert_rounded, exact, product, stored, transpose

OPS = {"op": grouped_gemm, "reference": grouped_gemm_reference}


def definition(x, w, offsets, grad):
    """y, dx, dw in float64 from the formulas, expert by expert; x and grad without their spare rows."""
    x, w, grad = x.detach().double(), w.detach().double(), grad.double()
    y, dx, dw = x.new_zeros(x.shape[0], w.shape[2]), torch.zeros_like(x), torch.zeros_like(w)
    for e in range(w.shape[0]):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], grad[rows] @ w[e].t(), x[rows].t() @ grad[rows]
    return y, dx, dw


def leaves(rows_by_expert, k, n, dtype, spare=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = sum(rows_by_expert)
    x = torch.randn(rows + spare, k, generator=generator, dtype=torch.float64)
    x[rows:] = float("nan")
    w = torch.randn(len(rows_by_expert), k, n, generator=generator, dtype=torch.float64)
    grad = torch.randn(rows + spare, n, generator=generator, dtype=torch.float64)
    grad[rows:] = float("nan")
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("rows", [(3, 2, 4), (0, 5, 0), (0, 0, 0), (1, 0, 2)])
def test_every_row_meets_its_expert(rows, name):
    product, offsets = OPS[name], offsets_of(rows)
    x, w, _ = leaves(rows, 4, 5, torch.float64)
    y = product(x, w, offsets)
    expert = [e for e, count in enumerate(rows) for _ in range(count)]
    expected = torch.stack([x[a] @ w[e] for a, e in enumerate(expert)]) if expert else x.new_zeros(0, 5)
    torch.testing.assert_close(y, expected)
    if sum(rows):
        assert torch.autograd.gradcheck(lambda x, w: product(x, w, offsets), (x, w))
    y.sum().backward()  # an expanded gradient, all strides zero
    for e, count in enumerate(rows):
        if count == 0:
            assert torch.equal(w.grad[e], torch.zeros(4, 5, dtype=torch.float64))
        else:
            expected = x.detach()[offsets[e] : offsets[e + 1]].sum(0)[:, None].expand(4, 5)
            torch.testing.assert_close(w.grad[e], expected)


@pytest.mark.parametrize("name", OPS)
def test_spare_rows_give_zero_and_get_zero(name):
    x = torch.full((5, 2), float("nan"))
    x[:3] = 1.0
    x.requires_grad_()
    w = torch.ones(2, 2, 3, requires_grad=True)
    y = OPS[name](x, w, offsets_of((1, 2)))
    assert torch.equal(y.detach(), torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0])[:, None].expand(5, 3))
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([3.0, 3.0, 3.0, 0.0, 0.0])[:, None].expand(5, 2))
    assert torch.equal(w.grad[:, 0, 0], torch.tensor([1.0, 2.0]))


def check_against_float64(rows, k, n, spare, dtype, engine, seed):
    offsets, used = offsets_of(rows), sum(rows)
    x, w, grad = leaves(rows, k, n, dtype, spare, seed)
    with use_cpu_engine(engine):
        y = grouped_gemm(x, w, offsets)
        dx, dw = torch.autograd.grad(y, (x, w), grad)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    assert not y.detach()[used:].any() and not dx[used:].any()
    wide = accumulator(dtype)
    for e, count in enumerate(rows):
        mine = slice(int(offsets[e]), int(offsets[e + 1]))
        a, b, g = exact(x[mine]), exact(w[e]), exact(grad[mine])
        assert_rounded(y[mine], stored(product(a, b, wide), dtype), f"y of expert {e}")
        assert_rounded(dx[mine], stored(product(g, transpose(b), wide), dtype), f"dx of expert {e}")
        assert_rounded(dw[e], stored(product(transpose(a), g, wide), dtype), f"dw of expert {e}")
        assert count or not dw[e].any()


@examples(60)
@given(
    rows=counts,
    k=sides,
    n=sides,
    spare=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    engine=st.sampled_from(ENGINES),
    seed=st.integers(0, 99),
)
def test_errs_by_its_roundings_at_most(rows, k, n, spare, dtype, engine, seed):
    check_against_float64(rows, k, n, spare, dtype, engine, seed)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, k, n", [((500, 3), 130, 70), ((40, 0, 8), 1100, 330), ((7,), 2051, 65), ((1700,), 33, 600)]
)
def test_shapes_of_several_blocks(rows, k, n, dtype, engine):
    """More rows, columns and contraction than one block of the kernels holds."""
    check_against_float64(rows, k, n, 1, dtype, engine, 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_gradient_into_a_buffer(dtype, engine):
    rows, offsets = (37, 0, 5), offsets_of((37, 0, 5))
    x, w, grad = leaves(rows, 67, 130, dtype, spare=2)
    exact = definition(x[:42], w, offsets, grad[:42])[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    before = torch.randn(exact.shape, dtype=wide, generator=torch.Generator().manual_seed(1))
    out = before.clone()
    with use_cpu_engine(engine):
        grouped_gemm_wgrad(x.detach(), grad, offsets, out=out)
        assert torch.equal(out[1], before[1])  # no row of expert 1: untouched
        torch.testing.assert_close(out, (exact + before).to(wide), rtol=1e-5, atol=1e-5)
        out.fill_(float("nan"))
        grouped_gemm_wgrad(x.detach(), grad, offsets, out=out, accumulate=False)
    torch.testing.assert_close(out, exact.to(wide), rtol=1e-5, atol=1e-5)
    assert not out[1].any()


@pytest.mark.parametrize("dtype, rows", [(torch.float32, (700, 0, 420, 3)), (torch.bfloat16, (1400, 0, 703))])
@pytest.mark.parametrize("k, n", [(576, 2048), (2048, 576)])
def test_large_rows(dtype, rows, k, n):
    """Results and gradients to rows beyond the size from which they are stored past the caches."""
    check_against_float64(rows, k, n, 1, dtype, ENGINES[0], 0)


def test_large_weight_gradient():
    """Beyond the size from which gradients are stored past the caches."""
    rows, offsets = (9, 0, 4, 16), offsets_of((9, 0, 4, 16))
    x, w, grad = leaves(rows, 1024, 2048, torch.float32)
    (dw,) = torch.autograd.grad(grouped_gemm(x, w, offsets), (w,), grad)
    torch.testing.assert_close(dw, definition(x, w, offsets, grad)[2].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k, n", [(96, 200), (130, 130)])  # 130: two columns are left for a task of their own
def test_same_bits_on_any_number_of_threads(k, n):
    rows = (300, 0, 17, 95)
    x, w, grad = leaves(rows, k, n, torch.float32)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y = grouped_gemm(x, w, offsets_of(rows))
        results.append((y.detach(), *torch.autograd.grad(y, (x, w), grad)))
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_nothing_asked_nothing_computed():
    rows = (4, 3)
    x, w, _ = leaves(rows, 8, 8, torch.float32)
    y = grouped_gemm(x, w.detach(), offsets_of(rows))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    y = grouped_gemm(x.detach(), w, offsets_of(rows))
    assert torch.autograd.grad(y.sum(), w)[0].shape == w.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_and_compile(dtype):
    rows = (5, 0, 9)
    x, w, grad = leaves(rows, 16, 24, dtype)
    offsets = offsets_of(rows)
    ops = torch.ops.megatron_omni
    torch.library.opcheck(ops.grouped_gemm.default, (x, w, offsets))
    torch.library.opcheck(ops.grouped_gemm_dgrad.default, (grad, w.detach(), offsets))
    torch.library.opcheck(ops.grouped_gemm_wgrad.default, (x.detach(), grad, offsets))
    out = torch.zeros(3, 16, 24)
    torch.library.opcheck(ops.grouped_gemm_wgrad_out.default, (x.detach(), grad, offsets, out, True))
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    expected, got = (torch.autograd.grad(f(x, w, offsets), (x, w), grad) for f in (grouped_gemm, compiled))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def good():
    return {"x": torch.zeros(5, 4), "w": torch.zeros(2, 4, 3), "offsets": offsets_of((2, 3))}


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("x", torch.zeros(5, 4, dtype=torch.int32), "x: dtype"),
        ("x", torch.zeros(5, 4, 1), "x: has 3 dimensions"),
        ("x", torch.zeros(4, 5).t(), "x: must be contiguous"),
        ("x", torch.zeros(5, 6), "w: side 1 is 4, x has 6 columns"),
        ("x", torch.zeros(5, 4, dtype=torch.bfloat16), "w: dtype"),
        ("w", torch.zeros(4, 3), "w: has 2 dimensions"),
        ("w", torch.zeros(2, 3, 4).transpose(1, 2), "w: must be contiguous"),
        ("offsets", offsets_of((2, 3)).int(), "offsets: dtype"),
        ("offsets", offsets_of((5,)), "offsets: has 2 entries, must have 3"),
        ("offsets", torch.tensor([0, 3, 2]), "offsets: must ascend from 0"),
        ("offsets", torch.tensor([-1, 3, 5]), "offsets: must ascend from 0"),
        ("offsets", torch.tensor([0, 3, 6]), "offsets: ends at 6, past 5"),
    ],
)
def test_bad_input_names_the_argument(name, value, message):
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**(good() | {name: value}))


def test_bad_buffers_name_the_argument():
    x, dy, offsets = torch.zeros(5, 4), torch.zeros(5, 3), offsets_of((2, 3))
    with pytest.raises(ValueError, match="out: must be"):
        grouped_gemm_wgrad(x, dy, offsets, out=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="out: dtype"):
        grouped_gemm_wgrad(x.bfloat16(), dy.bfloat16(), offsets, out=torch.zeros(2, 4, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out: must be contiguous"):
        grouped_gemm_wgrad(x, dy, offsets, out=torch.zeros(2, 3, 4).transpose(1, 2))
    with pytest.raises(ValueError, match="dy: is"):
        grouped_gemm_wgrad(x, dy[:4], offsets, out=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="offsets: has 3 entries for 3 experts"):
        grouped_gemm_reference(torch.zeros(2, 2), torch.zeros(3, 2, 2), offsets_of((1, 1)))


def test_threads_are_used():
    """One more thread exists after the first product large enough for two: torch's pool starts them when needed."""
    program = (
        "import os, torch\n"
        "from megatron_omni.ops.grouped_gemm import grouped_gemm\n"
        "torch.set_num_threads(2)\n"
        "x, w, offsets = torch.ones(100, 256), torch.ones(1, 256, 120), torch.tensor([0, 100])\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "assert grouped_gemm(x, w, offsets).eq(256).all()\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1"]
