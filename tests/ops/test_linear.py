"""The dense product of inference: against float64 on every engine, and whose product it takes."""

import pytest
import torch
from torch import Tensor

from megatron_omni.ops import extension
from megatron_omni.ops.grouped_gemm import grouped_gemm
from megatron_omni.ops.linear import OURS, linear, product

engines = pytest.mark.parametrize("engine", extension.cpu_engines())


def problem(rows: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * k + n)
    return tuple(torch.randn(*size, generator=generator).to(dtype) for size in ((rows, k), (n, k), (n,)))  # type: ignore[return-value]


def one_by_one(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` by summing products in order in single precision (double for double), as the plainest loop does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), len(w), dtype=wide)
    for left, right in zip(x.to(wide).t(), w.to(wide).t(), strict=True):
        total += left[:, None] * right
    return total.to(x.dtype)


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows, k, n", [(1, 64, 96), (3, 7, 5), (4, 128, 33), (8, 65, 128), (33, 512, 768)])
def test_errs_no_more_than_twice_what_others_err(rows: int, k: int, n: int, dtype: torch.dtype, engine: str) -> None:
    """Than twice PyTorch's product, whose order of summing differs with the processor, or the plainest loop."""
    x, w, bias = problem(rows, k, n, dtype)
    exact = x.double() @ w.double().t()
    plain = (one_by_one(x, w).double() - exact).norm()
    with torch.no_grad(), extension.use_cpu_engine(engine):
        for b in (None, bias):
            expected = exact if b is None else exact + b.double()
            theirs = (torch.nn.functional.linear(x, w, b).double() - expected).norm()
            ours = (linear(x, w, b).double() - expected).norm()
            # Theirs rounds once, ours again when the bias is added.
            assert ours <= 2 * max(theirs, plain) + 1e-3 * torch.finfo(dtype).eps * expected.norm()
        as_experts_have_it = w.t().contiguous()
        theirs = ((x @ as_experts_have_it).double() - exact).norm()
        ours = (product(x, as_experts_have_it).double() - exact).norm()
        assert ours <= 2 * max(theirs, plain) + 1e-3 * torch.finfo(dtype).eps * exact.norm()


@engines
def test_takes_ours_where_it_was_measured(engine: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 2, 4, 32, 129):
            x, w, _ = problem(rows, 96, 160, dtype)
            with torch.no_grad(), extension.use_cpu_engine(engine):
                got = linear(x, w)
                turned = w.t().contiguous()
                ours = grouped_gemm(x, turned[None], torch.tensor([0, rows]))
                is_ours = rows in OURS.get(engine, {}).get(dtype, ())
                assert torch.equal(product(x, turned), ours if is_ours else x @ turned)
                if is_ours:
                    assert torch.equal(
                        got, torch.ops.megatron_omni.grouped_gemm_dgrad(x, w[None], torch.tensor([0, rows]))
                    )
                    torch.testing.assert_close(got, ours)
                else:
                    assert torch.equal(got, torch.nn.functional.linear(x, w))


@pytest.mark.parametrize("engine, dtype", [(e, d) for e in extension.cpu_engines() for d in OURS.get(e, {})])
def test_the_bits_of_a_row_do_not_depend_on_how_many_there_are(engine: str, dtype: torch.dtype) -> None:
    x, w, bias = problem(300, 136, 200, dtype)
    with torch.no_grad(), extension.use_cpu_engine(engine):
        parts = [linear(x[:rows], w, bias) for rows in (4, 5, 12, 31, 64, 128, 300) if rows in OURS[engine][dtype]]
        assert len(parts) > 5
        for part in parts:
            assert torch.equal(part, parts[-1][: len(part)])


@engines
def test_leading_dimensions_and_strides_are_the_callers(engine: str) -> None:
    x, w, bias = problem(24, 40, 16, torch.float32)
    with torch.inference_mode(), extension.use_cpu_engine(engine):
        expected = torch.nn.functional.linear(x, w, bias)
        torch.testing.assert_close(linear(x.view(2, 12, 40), w, bias), expected.view(2, 12, 16))
        strided = x.t().contiguous().t()
        assert not strided.is_contiguous()
        torch.testing.assert_close(linear(strided, w, bias), expected)
    with torch.no_grad():  # what an inference-mode call kept for later
        torch.testing.assert_close(linear(x, w, bias), expected.clone())
