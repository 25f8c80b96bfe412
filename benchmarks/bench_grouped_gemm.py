"""Grouped matrix products and the experts' MLP on CPU against torch's two ways, one line a direction and contender.

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \\
        python -m benchmarks.bench_grouped_gemm [--threads 1] [--rounds 9] [--json FILE]

torch's ways are ``F.grouped_mm`` and one ``torch.mm`` per expert into its part of the result. Of few rows an expert a plain
read of the weights is timed as well (``read``): what memory gives is the bound there, for torch and for us.

The allocator settings keep large tensors on a warm heap for both sides (docs/kernels.md). All contenders run in turn,
round after round, on the clock of measure.py; printed are medians and, as the ratio, the other side's time over ours:
the median of the rounds' own ratios, since a neighbour's load hits both halves of a round. fp32 is compared with both
settings of ``set_float32_matmul_precision`` that change nothing in its accuracy on this machine. Contenders are checked
against each other before they are timed.

Shapes: E experts with M rows each, K x N weights; the MLP's are its first weight's, N = 2 F.
"""

import argparse
import functools
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import clock_name, gemm_ceiling, on_warm_heap, seconds
from megatron_omni.ops.expert_mlp import expert_mlp
from megatron_omni.ops.extension import cpu_engine
from megatron_omni.ops.grouped_gemm import grouped_gemm

CPU = torch.device("cpu")
SHAPES = {
    "coarse": (8, 256, 1024, 2816),
    "32 rows": (128, 32, 512, 256),
    "8 rows": (128, 8, 512, 256),
    "tiny recipe": (4, 160, 128, 512),
}
FEW_ROWS = {f"{rows} of few": (16, rows, 1024, 2048) for rows in (1, 2, 4, 8)}
"""As in decoding: 128 MB of fp32 weights for these rows an expert, forward only."""
MLP_SHAPES = {
    "coarse mlp": (4, 768, 1024, 2 * 2816),
    "fine mlp": (128, 96, 512, 2 * 192),
    "tiny mlp": (4, 160, 128, 512),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOW_SECONDS = 1.0
Run = Callable[[], Any]


def torch_mlp(x: Tensor, w1: Tensor, w2: Tensor, ends: Tensor, row_weight: Tensor) -> Tensor:
    """The experts' MLP of plain PyTorch: two grouped products around an eager weighted SwiGLU."""
    gate, up = torch.nn.functional.grouped_mm(x, w1, offs=ends).chunk(2, dim=-1)
    a = (torch.nn.functional.silu(gate) * up * row_weight.unsqueeze(1)).to(x.dtype)
    return torch.nn.functional.grouped_mm(a, w2, offs=ends)


def products(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[dict[str, dict[str, Run]], float]:
    """Everyone's forward, dgrad and wgrad, and the FLOPs of each."""
    experts, rows, k, n = shape
    x, w = torch.randn(experts * rows, k).to(dtype), torch.randn(experts, k, n).to(dtype)
    dy = torch.randn(experts * rows, n).to(dtype)
    offsets = torch.arange(experts + 1) * rows
    ends, grouped, ops = offsets[1:].int(), torch.nn.functional.grouped_mm, torch.ops.megatron_omni

    def each(out: Callable[[], Tensor], a: Tensor, b: Tensor) -> Run:
        """One product of a and b per expert, into the expert's part of a new result."""

        def run() -> Tensor:
            whole = out()
            for part, one, other in zip(whole.view(experts, -1, whole.shape[-1]), a, b, strict=True):
                torch.mm(one, other, out=part)
            return whole

        return run

    by_expert, dy_by_expert = x.view(experts, rows, k), dy.view(experts, rows, n)
    runs: dict[str, dict[str, Run]] = {
        "fwd": {
            "omni": lambda: grouped_gemm(x, w, offsets),
            "grouped_mm": lambda: grouped(x, w, offs=ends),
            "torch.mm": each(lambda: x.new_empty(experts * rows, n), by_expert, w),
        },
        "dgrad": {
            "omni": lambda: ops.grouped_gemm_dgrad(dy, w, offsets),
            "grouped_mm": lambda: grouped(dy, w.transpose(1, 2), offs=ends),
            "torch.mm": each(lambda: x.new_empty(experts * rows, k), dy_by_expert, w.transpose(1, 2)),
        },
        "wgrad": {
            "omni": lambda: ops.grouped_gemm_wgrad(x, dy, offsets),
            "grouped_mm": lambda: grouped(x.t(), dy, offs=ends),
            "torch.mm": each(lambda: x.new_empty(experts, k, n), by_expert.transpose(1, 2), dy_by_expert),
        },
    }
    if shape in FEW_ROWS.values():
        bits = w.view(torch.int32)
        runs = {"fwd": {**runs["fwd"], "read": lambda: bits.max()}}
    return runs, 2.0 * experts * rows * k * n


def mlps(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[dict[str, dict[str, Run]], float]:
    """Ours and torch's forward + backward of the MLP with all gradients, and its FLOPs."""
    experts, rows, hidden, width = shape
    x = torch.randn(experts * rows, hidden).to(dtype).requires_grad_()
    w1 = (torch.randn(experts, hidden, width) / hidden**0.5).to(dtype).requires_grad_()
    w2 = (torch.randn(experts, width // 2, hidden) / width**0.5).to(dtype).requires_grad_()
    row_weight = torch.rand(experts * rows).requires_grad_()
    grad = torch.randn(experts * rows, hidden).to(dtype)
    offsets = torch.arange(experts + 1) * rows
    ends, leaves = offsets[1:].int(), (x, w1, w2, row_weight)

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(expert_mlp(x, w1, w2, offsets, row_weight=row_weight), leaves, grad)

    def theirs() -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch_mlp(x, w1, w2, ends, row_weight), leaves, grad)

    return {"f+b": {"omni": ours, "grouped_mm": theirs}}, 9.0 * experts * rows * hidden * width


def at_precision(precision: str, run: Run) -> Run:
    """The run under a setting of torch's fp32 products."""

    def changed() -> Any:
        torch.set_float32_matmul_precision(precision)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision("highest")

    return changed


def run_repeatedly(run: Run, repeat: int) -> None:
    """The run, so often."""
    for _ in range(repeat):
        run()


def check(one: Any, other: Any, dtype: torch.dtype) -> None:
    """Both sides computed the same thing."""
    for a, b in zip(*([r] if isinstance(r, Tensor) else r for r in (one, other)), strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm()
        limit = 3e-2 if dtype == torch.bfloat16 else 1e-4
        if not error < limit:
            raise SystemExit(f"error: results differ by {error:.2g}, more than {limit}")


def measure(
    name: str, shape: tuple[int, int, int, int], dtype: str, *, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of one shape and dtype."""
    make = mlps if name.endswith("mlp") else products
    runs, flops = make(shape, DTYPES[dtype])
    rows = []
    for direction, contenders in runs.items():
        if dtype == "fp32":
            contenders["grouped_mm medium"] = at_precision("medium", contenders["grouped_mm"])
        for who, run in contenders.items():
            if who != "read":
                check(contenders["omni"](), run(), DTYPES[dtype])
        repeat = max(1, round(2e8 / flops))  # small shapes several times: the clock is coarse
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for label, run in list(contenders.items()) * (rounds + 1):
            if times[label] and times[label][-1] * repeat > SLOW_SECONDS:
                continue  # torch's 16-bit products where it has no fast path: one sample says enough
            loop = functools.partial(run_repeatedly, run, repeat)
            spent, _ = on_warm_heap(functools.partial(seconds, loop, device=CPU, threads=threads), device=CPU)
            times[label].append(spent / repeat)
        for label, all_samples in times.items():
            samples, mine = (these[1:] or these for these in (all_samples, times["omni"]))
            median = statistics.median(samples)
            pairs = (
                zip(samples, mine, strict=True) if len(samples) == len(mine) else [(median, statistics.median(mine))]
            )
            rows.append(
                {
                    "shape": name,
                    "sizes": shape,
                    "dtype": dtype,
                    "direction": direction,
                    "threads": threads,
                    "engine": cpu_engine(),
                    "contender": label,
                    "median_ms": median * 1e3,
                    "best_ms": min(samples) * 1e3,
                    "gflops": flops / median * 1e-9,
                    "ratio_to_omni": statistics.median(a / b for a, b in pairs),
                }
            )
    return rows


def main() -> None:
    """Print the table; write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", help="only these")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        print("note: MALLOC_MMAP_THRESHOLD_ is not set; large tensors cost page faults on both sides")
    for dtype, value in DTYPES.items():
        ceiling = gemm_ceiling(value, device=CPU, threads=args.threads) * 1e-9
        print(f"best square product here, {dtype}: {ceiling:.0f} GFLOP/s ({clock_name(CPU, args.threads)})")
    print(
        f"{'dtype':5} {'shape':12} {'E, M, K, N':22} {'pass':5} {'contender':18} {'ms':>9} {'GFLOP/s':>8} {'ratio':>6}"
    )
    rows = []
    for name, shape in {**SHAPES, **FEW_ROWS, **MLP_SHAPES}.items():
        if args.shapes and name not in args.shapes:
            continue
        for dtype in DTYPES:
            for row in measure(name, shape, dtype, threads=args.threads, rounds=args.rounds):
                rows.append(row)
                print(
                    f"{dtype:5} {name:12} {shape!s:22} {row['direction']:5} {row['contender']:18} "
                    f"{row['median_ms']:9.3f} {row['gflops']:8.1f} {row['ratio_to_omni']:6.2f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
