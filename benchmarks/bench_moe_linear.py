"""Does the layer's time follow the experts actually used? Forward and backward against mean k and null share.

Three statements, each from medians of interleaved rounds of the routed layer: time is a line in the number of
assignments (largest deviation from the least-squares line over mean k = 1, 1.5, 2, 3, 4), how much of the time at the
largest k is the line's constant (reading weights, writing their gradients), and what half the slots being null leaves
of the time at the shape's own mean k.
"""

import statistics
import sys
from dataclasses import replace
from functools import partial

import torch

from benchmarks.bench_moe import OPS, OURS, Report, Work, _both_ways, _require, _spent
from benchmarks.measure import clock_name, on_warm_heap, peak_bytes
from benchmarks.moe_problem import DTYPES, make_problem
from benchmarks.moe_shapes import Shape

MEAN_K = (1.0, 1.5, 2.0, 3.0, 4.0)
NULL_SHARES = (0.0, 0.25, 0.5)


def shapes_of(shape: Shape) -> list[Shape]:
    """The shapes to time: over mean k without null slots, and over null shares at the shape's own mean k."""
    base = replace(shape, fixed_k=False, null_share=0.0)
    ks = [replace(base, mean_k=k) for k in MEAN_K if k <= shape.experts]
    nulls = [replace(base, null_share=share) for share in NULL_SHARES]
    return list(dict.fromkeys([*ks, *nulls]))


def line_fit(assignments: list[float], times: list[float]) -> tuple[float, float, float]:
    """(constant, slope, largest relative deviation) of the least-squares line."""
    mean_a, mean_t = statistics.fmean(assignments), statistics.fmean(times)
    slope = sum((a - mean_a) * (t - mean_t) for a, t in zip(assignments, times, strict=True)) / sum(
        (a - mean_a) ** 2 for a in assignments
    )
    constant = mean_t - slope * mean_a
    worst = max(abs(constant + slope * a - t) / t for a, t in zip(assignments, times, strict=True))
    return constant, slope, worst


def run(shape: Shape, *, dtype: str, device: str, threads: int, repeats: int) -> Report:
    """Time our layer on every shape in turn, round after round."""
    torch.set_num_threads(threads)
    place, op = torch.device(device), OPS["layer"]
    report = Report(shape, clock_name(place, threads), float("nan"), float("nan"))
    cases = []
    for one in shapes_of(shape):
        print(f"{one} ...", file=sys.stderr, flush=True)
        problem = make_problem(one, dtype=DTYPES[dtype], device=place)
        if cases:  # the weights do not depend on the routing
            problem.w1, problem.w2 = cases[0][0].w1, cases[0][0].w2
        cases.append((problem, op.contenders[OURS](problem)))
    times: list[list[float]] = [[] for _ in cases]
    for repeat in range(repeats + 1):
        for (problem, prepared), found in zip(cases, times, strict=True):
            inputs = _require(prepared, op.passes[0].leaves)
            ahead, back = on_warm_heap(partial(_spent, prepared, inputs, problem.grad_y, threads), device=place)
            if repeat:  # the first round warms up
                found.append(ahead + back)
    for (problem, prepared), found in zip(cases, times, strict=True):
        value, work = statistics.median(found), op.work(problem)["forward+backward"]
        inputs = _require(prepared, op.passes[0].leaves)
        peak = peak_bytes(partial(_both_ways, prepared, inputs, problem.grad_y), device=place)
        report.rows.append(_row(problem.shape, work, value, peak, dtype=dtype, threads=threads))
    return report


def _row(shape: Shape, work: Work, value: float, peak: int, *, dtype: str, threads: int) -> dict[str, object]:
    return {
        "op": "layer",
        "direction": "forward+backward",
        "contender": OURS,
        "dtype": dtype,
        "shape": str(shape),
        "threads": threads,
        "median_ms": value * 1e3,
        "gflops": work.flops / value / 1e9,
        "gbytes_s": work.bytes / value / 1e9,
        "peak_mb": peak / 2**20,
        "ratio_to_omni": 1.0,
    }


def statements(report: Report) -> tuple[float, float, float]:
    """Largest relative deviation from a line; share of the time left at half null; the constant's share at the largest k."""
    ms = {row["shape"]: row["median_ms"] for row in report.rows}
    by_k = [one for one in shapes_of(report.shape) if one.null_share == 0 and one.mean_k in MEAN_K]
    constant, _, worst = line_fit([one.assignments for one in by_k], [ms[str(one)] for one in by_k])
    base = replace(report.shape, fixed_k=False, null_share=0.0)
    return worst, ms[str(replace(base, null_share=0.5))] / ms[str(base)], constant / ms[str(by_k[-1])]


def table(report: Report) -> str:
    """Times and the three statements."""
    shapes = shapes_of(report.shape)
    lines = [f"{'shape':<44}{'assignments':>12}{'ms':>11}{'GFLOP/s':>10}"]
    for one, row in zip(shapes, report.rows, strict=True):
        lines.append(f"{one!s:<44}{one.assignments:>12}{row['median_ms']:>11.3f}{row['gflops']:>10.1f}")
    worst, half, constant = statements(report)
    ks = [one.mean_k for one in shapes if one.null_share == 0 and one.mean_k in MEAN_K]
    lines += [
        f"routed layer, forward and backward; {report.clock}",
        f"linear in assignments within {worst:.1%} over mean k {ks[0]:g} to {ks[-1]:g}; "
        f"the constant is {constant:.1%} of the time at k = {ks[-1]:g}",
        f"null share 0 to 0.5 at mean k {report.shape.mean_k:g}: {half:.3f} of the time is left",
    ]
    return "\n".join(lines)
