"""Every figure of the kernels' goals in one run, on one and on two CPU threads, as a page for benchmarks/results/.

    python -m benchmarks.bench_kernels --out PAGE.md [--json ROWS.json] [--minutes 11] [--threads 1 2]

Grouped products against ``F.grouped_mm`` (bench_grouped_gemm.py), permutation and the whole routed layer against
everyone who is here (bench_moe.py), time against assignments and null slots (bench_moe_linear.py). The first table sets
each goal beside what was reached and beside the highest ratio that this processor allows: the rate of its multipliers,
measured on registers alone (peak.cpp), over the other side's rate in the same run. Pieces that the minutes do not allow
are named. For a machine with nothing else to do: two threads are timed by the wall clock.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.warm_heap import shared_environment, with_warm_heap

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]

BEST = "torch's better"  # of F.grouped_mm and torch.mm per expert
AVX512_GOALS = [
    # shape, dtype, direction, against, goal
    ("coarse", "fp32", "fwd", "grouped_mm", 2.0),
    ("coarse", "fp32", "fwd", "grouped_mm medium", 1.1),
    ("coarse", "bf16", "fwd", "grouped_mm", 1.1),
    ("32 rows", "fp32", "fwd", "grouped_mm", 1.8),
    ("32 rows", "bf16", "fwd", "grouped_mm", 1.5),
    ("8 rows", "bf16", "fwd", "grouped_mm", 2.0),
    *[(s, d, "wgrad", "grouped_mm", 1.0) for s in ("coarse", "32 rows", "8 rows") for d in ("fp32", "bf16")],
]
AVX2_GOALS = [
    ("coarse", "fp32", "fwd", BEST, 1.3),
    ("32 rows", "fp32", "fwd", BEST, 1.3),
    ("8 rows", "fp32", "fwd", BEST, 1.8),
    *[(s, d, "wgrad", BEST, 1.0) for s in ("coarse", "32 rows", "8 rows") for d in ("fp32", "bf16")],
    *[(f"{rows} of few", "fp32", "fwd", "read", 0.8) for rows in (1, 2, 4, 8)],
]
PRODUCT_GOALS = {"avx512": AVX512_GOALS, "avx2": AVX2_GOALS}
LAYER_GOALS = {
    "avx512": [("coarse", "fp32", 1.8), ("fine", "fp32", 1.8), ("fine", "bf16", 1.4), ("coarse", "bf16", 1.05)],
    "avx2": [("coarse", "fp32", 1.2), ("fine", "fp32", 1.4)],
}
HIGH_SHARE, REACHED_SHARE = 0.65, 0.85
"""Where torch reaches the first share of the multipliers' peak, the second is what we have to reach."""
PERMUTE_GOAL, LINEAR_GOAL, NULL_GOAL = 2.0, 0.05, (0.45, 0.55)
SLOW = ("hf qwen3_moe eager",)  # an order of magnitude behind, and half of the run
ALONE = {"avx2": ("bf16",)}
"""Dtypes in which nobody but ``omni`` computes the layer, by engine: torch's products take a hundred times as long there."""


def with_engine(rows: list[Row], peaks: dict[tuple[str, int], float]) -> list[Row]:
    """The rows with ``engine`` and, where products are counted, ``share_of_peak``: of the multipliers, measured here."""
    from megatron_omni.ops.extension import cpu_engine

    engine, named = cpu_engine(), []
    for row in rows:
        peak = peaks.get((row["dtype"], row["threads"]), 0.0)
        share = row["gflops"] / peak if peak and row["gflops"] and "permute" not in row.get("op", "") else None
        named.append({**row, "engine": engine, "share_of_peak": share})
    return named


@dataclass
class Found:
    """What the pieces left behind."""

    peaks: dict[tuple[str, int], float] = field(default_factory=dict)
    """GFLOP/s of the multipliers by (dtype, threads); 0 where unknown."""
    products: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)
    linear: list[tuple[str, int, str, float, float]] = field(default_factory=list)
    """(dtype, threads, table, largest deviation from a line, share of the time at half the slots null)."""
    skipped: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Whose results differ from the reference: not timed."""


def multiplier_peaks(threads: int) -> dict[str, float]:
    """GFLOP/s by dtype from peak.cpp for the engine that runs; zeros where it cannot be compiled or lacks instructions."""
    from megatron_omni.ops.extension import cpu_engine

    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/peak"
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        command = [*compiler, "-O2", "-pthread", str(ROOT / "benchmarks" / "peak.cpp"), "-o", program]
        if subprocess.run(command, capture_output=True).returncode:
            return {"fp32": 0.0, "bf16": 0.0}
        out = subprocess.run([program, str(threads), cpu_engine()], capture_output=True, text=True, check=True).stdout
    return dict(zip(("fp32", "bf16"), map(float, out.split()), strict=True))


def measure_peaks(found: Found, threads: int) -> None:
    """Measure the peaks and keep the highest so far: a neighbour of the machine can only lower one."""
    for dtype, rate in multiplier_peaks(threads).items():
        found.peaks[dtype, threads] = max(rate, found.peaks.get((dtype, threads), 0.0))


def pieces(found: Found, *, repeats: int) -> list[tuple[str, Callable[[int], None]]]:
    """(name, measurement on so many threads), the ones that matter most first."""
    import torch

    from benchmarks import bench_grouped_gemm, bench_moe, bench_moe_linear
    from benchmarks.bench_moe import OPS, OURS, Report
    from benchmarks.measure import clock_name
    from benchmarks.moe_problem import DTYPES, make_problem
    from benchmarks.moe_shapes import GOALS
    from megatron_omni.ops.extension import cpu_engine

    cpu = torch.device("cpu")

    def products(threads: int) -> None:
        for name, sizes in {**bench_grouped_gemm.SHAPES, **bench_grouped_gemm.FEW_ROWS}.items():
            for dtype in bench_grouped_gemm.DTYPES:
                found.products += bench_grouped_gemm.measure(name, sizes, dtype, threads=threads, rounds=repeats + 2)

    def layer(name: str, dtype: str) -> Callable[[int], None]:
        def run(threads: int) -> None:
            report = Report(GOALS[name], clock_name(cpu, threads), float("nan"), float("nan"))
            problem = make_problem(GOALS[name], dtype=DTYPES[dtype], device=cpu)
            for what in ("permute+unpermute", "layer"):
                op = OPS[what]
                alone = what == "layer" and dtype in ALONE.get(cpu_engine(), ())
                left = {who: c for who, c in op.contenders.items() if who == OURS or not (alone or who in SLOW)}
                op = replace(op, contenders=left)
                bench_moe.measure(what, op, problem, report, dtype=dtype, threads=threads, repeats=repeats)
            found.wrong += report.wrong
            found.layers += [row | {"name": name} for row in report.rows]

        return run

    def linear(dtype: str) -> Callable[[int], None]:
        def run(threads: int) -> None:
            report = bench_moe_linear.run(
                GOALS["linear"], dtype=dtype, device="cpu", threads=threads, repeats=repeats + 2
            )
            worst, half, _ = bench_moe_linear.statements(report)
            found.linear.append((dtype, threads, bench_moe_linear.table(report), worst, half))

        return run

    layers = [
        (f"layer, {name}, {dtype}", layer(name, dtype)) for dtype in ("bf16", "fp32") for name in ("coarse", "fine")
    ]
    return [("products", products), *layers, *[(f"linear, {dtype}", linear(dtype)) for dtype in ("bf16", "fp32")]]


def goal_rows(found: Found) -> list[list[str]]:
    """(figure, threads, reached, goal, highest possible, verdict)."""
    lines = []

    from megatron_omni.ops.extension import cpu_engine

    def add(figure: str, threads: int, ratio: float, goal: float, most: float) -> None:
        verdict = "met" if ratio >= goal else "missed" if not 0 < most < goal else "beyond this processor"
        if most and 1 / most > HIGH_SHARE:  # torch is near the peak
            verdict = "met" if ratio >= goal or ratio / most >= REACHED_SHARE else "missed"
        lines.append([figure, str(threads), f"{ratio:.2f}", f"{goal:g}", f"{most:.2f}" if most else "-", verdict])

    threads_seen = sorted({row["threads"] for row in [*found.products, *found.layers]})
    for threads in threads_seen:
        for shape, dtype, direction, against, goal in PRODUCT_GOALS.get(cpu_engine(), []):
            key = {"shape": shape, "dtype": dtype, "direction": direction, "threads": threads}
            sides = ("grouped_mm", "torch.mm") if against == BEST else (against,)
            rows = [r for r in found.products if key.items() <= r.items() and r["contender"] in sides]
            for row in sorted(rows, key=lambda r: r["median_ms"])[:1]:
                most = 0.0 if against == "read" else found.peaks.get((dtype, threads), 0.0) / row["gflops"]
                add(f"{direction} {shape}, {dtype}, {against}", threads, row["ratio_to_omni"], goal, most)
        for name, dtype, goal in LAYER_GOALS.get(cpu_engine(), []):
            key = {"name": name, "dtype": dtype, "op": "layer", "direction": "forward+backward", "contender": "torch"}
            for row in (r for r in found.layers if key.items() <= r.items() and r["threads"] == threads):
                most = found.peaks.get((dtype, threads), 0.0) / row["gflops"]
                add(f"whole layer {name}, {dtype}, torch", threads, row["ratio_to_omni"], goal, most)
        for row in found.layers:
            if (row["op"], row["contender"], row["threads"]) == ("permute+unpermute", "megatron", threads):
                figure = f"{row['op']} {row['direction']}, {row['name']}, {row['dtype']}, megatron"
                add(figure, threads, row["ratio_to_omni"], PERMUTE_GOAL, 0.0)
    for dtype, threads, _, worst, half in found.linear:
        shown = "met" if worst <= LINEAR_GOAL else "missed"
        lines.append([f"time linear in assignments, {dtype}", str(threads), f"{worst:.1%}", "5%", "-", shown])
        shown = "met" if NULL_GOAL[0] <= half <= NULL_GOAL[1] else "missed"
        lines.append([f"time left at half null, {dtype}", str(threads), f"{half:.3f}", "0.45 to 0.55", "-", shown])
    return lines


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def product_table(rows: list[Row]) -> str:
    """Ratios to ``F.grouped_mm`` and to the others by name, and our rate, by shape and direction."""
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in rows:
        line = cells.setdefault((row["dtype"], row["shape"], row["threads"]), {})
        way = row["direction"]
        if row["contender"] == "omni":
            line[way + " GFLOP/s"] = f"{row['gflops']:.0f}"
        else:
            mine = f"{row['ratio_to_omni']:.2f}"
            short = {"grouped_mm": "", "torch.mm": "mm ", "grouped_mm medium": "medium "}.get(row["contender"], "read ")
            line[way] = ", ".join(filter(None, [line.get(way), short + mine]))
    ways = [f"{way}{unit}" for way in ("fwd", "dgrad", "wgrad") for unit in ("", " GFLOP/s")]
    return markdown(
        ["dtype", "rows an expert", "threads", *ways],
        [[*map(str, key), *(line.get(way, "") for way in ways)] for key, line in cells.items()],
    )


def layer_table(rows: list[Row]) -> str:
    """Our time, and everybody's over it."""
    who = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != "omni"))
    cells: dict[tuple[str, str, str, str, int], dict[str, str]] = {}
    for row in rows:
        key = (row["op"], row["direction"], row["name"], row["dtype"], row["threads"])
        line = cells.setdefault(key, {})
        if row["contender"] == "omni":
            rate = f"{row['gbytes_s']:.1f} GB/s" if "permute" in row["op"] else f"{row['gflops']:.0f} GFLOP/s"
            line |= {"omni ms": f"{row['median_ms']:.1f}", "rate": rate, "peak MiB": f"{row['peak_mb']:.0f}"}
        else:
            line[row["contender"]] = f"{row['ratio_to_omni']:.2f}"
    columns = ["omni ms", "rate", "peak MiB", *who]
    return markdown(
        ["op", "direction", "shape", "dtype", "threads", *columns],
        [[*map(str, key), *(line.get(c, "") for c in columns)] for key, line in cells.items()],
    )


def processor() -> str:
    """The CPU as the kernel names it."""
    facts = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    return (
        f"{named.get('model name', platform.processor())}, family {named.get('cpu family')}, model {named.get('model')}"
    )


def commit() -> str:
    """The commit in use, marked where csrc or megatron_omni differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "--", "csrc", "megatron_omni/ops", "megatron_omni/models/moe", "benchmarks/*.py"
    )
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def page(found: Found, *, command: str, loads: list[str], minutes: float) -> str:
    """The results page."""
    import torch

    peaks = "; ".join(f"{dtype}, {n} thread(s): {rate:.0f} GFLOP/s" for (dtype, n), rate in found.peaks.items())
    text = [
        "# MoE kernels on a CPU: every goal in one run",
        f"    {command}",
        f"Commit {commit()}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {minutes:.1f} minutes. {processor()}, "
        f"{os.cpu_count()} hardware threads; torch {torch.__version__}. Load average before and after: "
        f"{', '.join(loads)} (one thread of ours counts as 1). Environment of all sides: "
        + " ".join(f"{k}={v}" for k, v in shared_environment().items())
        + ". One thread: thread CPU time; two: wall time. Medians of interleaved rounds.",
        f"Multipliers at their peak (benchmarks/peak.cpp): {peaks}.",
        "## Goals",
        "The highest possible ratio is the multipliers' peak over the other side's rate in this run.",
        markdown(
            ["figure, against", "threads", "reached", "goal", "highest possible here", "verdict"], goal_rows(found)
        ),
        "## Grouped products",
        "Times of `F.grouped_mm` over ours; mm: of `torch.mm` per expert; medium: of `F.grouped_mm` under "
        '`set_float32_matmul_precision("medium")`; read: of a plain read of the weights.',
        product_table(found.products),
        "## Permutation and the routed layer",
        "Everybody's time over ours; without " + ", ".join(SLOW) + " (an order of magnitude slower).",
        layer_table(found.layers),
        "## Time against assignments and null slots",
        *[f"{dtype}, {threads} thread(s):\n\n```\n{table}\n```" for dtype, threads, table, _, _ in found.linear],
    ]
    if found.wrong:
        text.append("WRONG, not timed: " + "; ".join(found.wrong) + ".")
    if found.skipped:
        text.append("Not measured, for want of minutes: " + "; ".join(found.skipped) + ".")
    return "\n\n".join(text) + "\n"


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--json", type=Path, help="also write all rows there")
    parser.add_argument("--minutes", type=float, default=11.0, help="start no piece after this long (default 11)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default 1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    options = parser.parse_args()
    start, found = time.monotonic(), Found()
    loads = [f"{os.getloadavg()[0]:.1f}"]
    import torch

    torch.manual_seed(0)
    work = pieces(found, repeats=options.repeats)
    longest: dict[str, float] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        measure_peaks(found, threads)
        for name, measure in work:
            begin = time.monotonic()
            if begin - start + longest.get(name, 0.0) > 60 * options.minutes:
                found.skipped.append(f"{name} on {threads} thread(s)")
                continue
            measure(threads)
            measure_peaks(found, threads)
            longest[name] = time.monotonic() - begin
            print(f"{name}, {threads} thread(s): {longest[name]:.0f} s", file=sys.stderr, flush=True)
            minutes, now = (time.monotonic() - start) / 60, [*loads, f"{os.getloadavg()[0]:.1f}"]
            command = "python -m benchmarks.bench_kernels " + shlex.join(sys.argv[1:])
            options.out.write_text(page(found, command=command, loads=now, minutes=minutes), encoding="utf-8")
            if options.json:
                options.json.write_text(
                    json.dumps(with_engine([*found.products, *found.layers], found.peaks), indent=1) + "\n",
                    encoding="utf-8",
                )
    print(f"wrote {options.out}")
    return int(bool(found.wrong))


if __name__ == "__main__":
    with_warm_heap()
    sys.exit(main())
