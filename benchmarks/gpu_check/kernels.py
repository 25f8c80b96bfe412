"""The kernels' goals on a GPU, against torch in the same run; on a CPU the same programs with small sizes, without goals.

    python -m benchmarks.gpu_check.kernels --out kernels.json [--rounds 7]

Products are timed on groups of one size, so that cuBLAS's batched product (``torch.bmm``) can take part; few rows an expert, as in
decoding, also against a plain read of the weights, which bounds them. The routed layer and the permutation are bench_moe's,
with its check of every result. All contenders take turns; figures are medians, a ratio is the other side's time over ours.
Goals (``GOALS``) are ours to reach on a Hopper device and are named with the figure that was reached.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SIZES = {  # E, rows an expert, K, N: the 7B's first product, Qwen3-30B's, and the 7B's two of a decoded token
    "coarse": (4, 1536, 3584, 37888),
    "fine": (128, 256, 2048, 1536),
    "few rows": (4, 2, 3584, 37888),
    "few rows, down": (4, 2, 18944, 3584),
}
SMALL = {
    "coarse": (4, 48, 64, 96),
    "fine": (16, 8, 32, 48),
    "few rows": (4, 2, 64, 96),
    "few rows, down": (4, 2, 96, 64),
}
GOALS = [
    # figure, of whom, at least
    ("coarse fwd", "torch.bmm", 0.9),
    ("coarse dgrad", "torch.bmm", 0.9),
    ("coarse wgrad", "torch.bmm", 0.85),
    ("coarse fwd", "grouped_mm", 1.0),
    ("coarse dgrad", "grouped_mm", 1.0),
    ("fine fwd", "grouped_mm", 1.0),
    ("fine wgrad", "grouped_mm", 0.85),
    ("few rows fwd", "read", 0.8),
    ("few rows, down fwd", "read", 0.8),
    ("layer fine", "torch", 1.2),
    ("permute fine", "copy", 0.85),
    ("unpermute fine", "copy", 0.85),
]
LIMIT = 3e-2
"""||difference|| / ||result|| of two contenders' bf16 products, at most."""


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write; status 1 where a contender of ours is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of the figures")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contender (default 7)")
    options = parser.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    import torch

    from benchmarks.measure import copy_ceiling, gemm_ceiling
    from megatron_omni.platform.device import accelerator_present

    device = torch.device("cuda" if accelerator_present() else "cpu")
    torch.manual_seed(0)
    rows: list[Row] = []
    sizes = SIZES if accelerator_present() else SMALL
    copy = copy_ceiling(device=device, threads=1)
    for name, shape in sizes.items():
        for found in products(name, shape, device=device, rounds=options.rounds):
            rows.append(found)
            print(
                f"{found['figure']:24} {found['contender']:12} {found['ms']:9.4f} ms {found['ratio']:6.2f}", flush=True
            )
    more, wrong = layers(device, rounds=options.rounds, copy=copy)
    rows += more
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "copy_gb_s": copy / 1e9,
        "best_product_tflops": gemm_ceiling(torch.bfloat16, device=device, threads=1) / 1e12,
        "goals": goals(rows) if accelerator_present() else [],
        "wrong": wrong,
        "rows": rows,
    }
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def products(name: str, shape: tuple[int, int, int, int], *, device: Any, rounds: int) -> list[Row]:
    """Rows of every direction; ValueError where two contenders differ."""
    import torch

    from megatron_omni.ops.grouped_gemm import grouped_gemm

    experts, each, k, n = shape
    x, dy, w = (
        torch.randn(*size, device=device, dtype=torch.bfloat16)
        for size in ((experts * each, k), (experts * each, n), (experts, k, n))
    )
    offsets = torch.arange(experts + 1, device=device) * each
    ends, grouped, ops = offsets[1:].int(), torch.nn.functional.grouped_mm, torch.ops.megatron_omni
    x3, dy3, wt = x.view(experts, each, k), dy.view(experts, each, n), w.transpose(1, 2)
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "fwd": {
            "omni": lambda: grouped_gemm(x, w, offsets),
            "grouped_mm": lambda: grouped(x, w, offs=ends),
            "torch.bmm": lambda: torch.bmm(x3, w),
        },
        "dgrad": {
            "omni": lambda: ops.grouped_gemm_dgrad(dy, w, offsets),
            "grouped_mm": lambda: grouped(dy, wt, offs=ends),
            "torch.bmm": lambda: torch.bmm(dy3, wt),
        },
        "wgrad": {
            "omni": lambda: ops.grouped_gemm_wgrad(x, dy, offsets),
            "grouped_mm": lambda: grouped(x.t(), dy, offs=ends),
            "torch.bmm": lambda: torch.bmm(x3.transpose(1, 2), dy3),
        },
    }
    if name.startswith("few"):
        bits = w.view(torch.int32)
        ways = {"fwd": ways["fwd"] | {"read": bits.max}}
    flops = 2.0 * experts * each * k * n
    rows: list[Row] = []
    for way, runs in ways.items():
        check(f"{name} {way}", runs)
        for who, ms, ratio in in_turn(runs, device=device, rounds=rounds):
            rows.append(
                {"figure": f"{name} {way}", "contender": who, "shape": list(shape), "ms": ms, "ratio": ratio,
                 "tflops": None if who == "read" else flops / ms * 1e-9}
            )  # fmt: skip
    return rows


def check(what: str, runs: dict[str, Callable[[], Any]]) -> None:
    """Everyone computes what ours does."""
    mine = runs["omni"]().float()
    for who, run in runs.items():
        if who not in ("omni", "read"):
            error = float((run().float().view_as(mine) - mine).norm() / mine.norm())
            if not error < LIMIT:
                raise ValueError(f"{what}: omni and {who} differ by {error:.2g}, more than {LIMIT}")


def in_turn(runs: dict[str, Callable[[], Any]], *, device: Any, rounds: int) -> list[tuple[str, float, float]]:
    """(contender, median milliseconds, its time over ours), everyone in turn; short ones several times a sample."""
    from benchmarks.measure import seconds

    def repeated(run: Callable[[], Any], times: int) -> None:
        for _ in range(times):
            run()

    def timed(run: Callable[[], Any], times: int) -> float:
        return seconds(lambda: repeated(run, times), device=device, threads=1)[0] / times

    for run in runs.values():
        run()  # workspaces and choices of algorithms are made
    times = {who: min(50, max(1, round(2e-3 / timed(run, 1)))) for who, run in runs.items()}
    spent: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(rounds):
        for who, run in runs.items():
            spent[who].append(timed(run, times[who]))
    mine = statistics.median(spent["omni"])
    return [(who, 1e3 * statistics.median(all_), statistics.median(all_) / mine) for who, all_ in spent.items()]


def layers(device: Any, *, rounds: int, copy: float) -> tuple[list[Row], list[str]]:
    """The routed layer and the permutation, omni and torch, and whose results were wrong."""
    import torch

    from benchmarks import bench_moe
    from benchmarks.measure import clock_name
    from benchmarks.moe_problem import make_problem
    from benchmarks.moe_shapes import NAMED, Shape

    shapes = {"fine": NAMED["qwen3-30b"], "coarse": NAMED["uni-moe-2"].scaled(2)}
    if device.type == "cpu":
        shapes = {"fine": Shape(hidden=32, ffn=24, experts=8, tokens=64, mean_k=2)}
    rows: list[Row] = []
    wrong: list[str] = []
    for name, shape in shapes.items():
        problem = make_problem(shape, dtype=torch.bfloat16, device=device)
        report = bench_moe.Report(shape, clock_name(device, 1), float("nan"), float("nan"))
        for what in ("permute", "unpermute", "layer"):
            op = bench_moe.OPS[what]
            op = replace(op, contenders={who: c for who, c in op.contenders.items() if who in ("omni", "torch")})
            bench_moe.measure(what, op, problem, report, dtype="bf16", threads=1, repeats=rounds)
        wrong += [f"{name}: {line}" for line in report.wrong]
        for row in report.rows:
            if row["direction"] != ("forward+backward" if row["op"] == "layer" else "forward"):
                continue
            figure = f"{row['op']} {name}"
            rows.append({"figure": figure, "contender": row["contender"], "shape": str(shape), "ms": row["median_ms"],
                         "ratio": row["ratio_to_omni"], "gb_s": row["gbytes_s"]})  # fmt: skip
            if row["contender"] == "omni" and row["op"] != "layer":
                share = row["gbytes_s"] * 1e9 / copy  # of the rate of a copy: the other side's time over ours, again
                rows.append({"figure": figure, "contender": "copy", "shape": str(shape),
                             "ms": row["median_ms"] * share, "ratio": share})  # fmt: skip
    return rows, wrong


def goals(rows: list[Row]) -> list[Row]:
    """Every goal with what was reached; None where it was not measured."""
    reached = {(row["figure"], row["contender"]): row["ratio"] for row in rows}
    found = []
    for figure, who, least in GOALS:
        ratio = reached.get((figure, who))
        found.append(
            {
                "figure": figure,
                "against": who,
                "goal": least,
                "reached": ratio,
                "met": ratio is not None and ratio >= least,
            }
        )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
