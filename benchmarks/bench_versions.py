"""The kernels of this tree against those of another tree, built beside it: every op, interleaved, on the CPU.

    git archive COMMIT | tar x -C OTHER && (cd OTHER && python setup.py build_ext --inplace)
    python -m benchmarks.bench_versions OTHER [--threads 1] [--rounds 11] [--json FILE]

Two processes, one a tree, do the same cases on the same numbers in turn; only one of them works at a time. Printed are the
median milliseconds of both and, as the ratio, the median over the rounds of the other's time over ours: above 1 this tree
is faster. On one thread the clock is the thread's CPU time (measure.py). The engine is the one that each tree chooses.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 0.02
"""A case is repeated inside a round until it takes this long."""
PRODUCTS = {"coarse": (8, 256, 1024, 2816), "32 rows": (128, 32, 512, 256), "8 rows": (128, 8, 512, 256)}
"""Experts, rows an expert, K, N."""
MLPS = {"coarse": (4, 768, 1024, 2816), "fine": (128, 96, 512, 192), "tiny": (4, 160, 128, 256)}
"""Experts, rows an expert, hidden, expert width."""


def cases(only: str) -> dict[str, Callable[[], Any]]:
    """The cases whose name holds ``only``, on numbers that depend on nothing but the case."""
    import torch

    from megatron_omni.ops.expert_mlp import expert_mlp
    from megatron_omni.ops.grouped_gemm import grouped_gemm
    from megatron_omni.ops.permute import build_permutation, permute, unpermute

    ops = torch.ops.megatron_omni
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found: dict[str, Callable[[], Any]] = {}

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    def add_products(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
        experts, rows, k, n = shape
        x, w, dy = (t.to(dtype) for t in (drawn(experts * rows, k), drawn(experts, k, n), drawn(experts * rows, n)))
        offsets = torch.arange(experts + 1) * rows
        found[f"{name} fwd"] = lambda: grouped_gemm(x, w, offsets)
        found[f"{name} dgrad"] = lambda: ops.grouped_gemm_dgrad(dy, w, offsets)
        found[f"{name} wgrad"] = lambda: ops.grouped_gemm_wgrad(x, dy, offsets)

    def add_mlp(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
        experts, rows, hidden, width = shape
        x = drawn(experts * rows, hidden).to(dtype).requires_grad_()
        w1 = (drawn(experts, hidden, 2 * width) / hidden**0.5).to(dtype).requires_grad_()
        w2 = (drawn(experts, width, hidden) / width**0.5).to(dtype).requires_grad_()
        row_weight, offsets = torch.rand(experts * rows).requires_grad_(), torch.arange(experts + 1) * rows
        grad = drawn(experts * rows, hidden).to(dtype)
        leaves = (x, w1, w2, row_weight)
        found[f"mlp {name} f+b"] = lambda: torch.autograd.grad(
            expert_mlp(x, w1, w2, offsets, row_weight=row_weight), leaves, grad
        )

    def wanted(*names: str) -> bool:
        return any(only in name for name in names)

    for label, dtype in dtypes.items():
        for name, shape in PRODUCTS.items():
            if wanted(*(f"{name} {label} {direction}" for direction in ("fwd", "dgrad", "wgrad"))):
                add_products(f"{name} {label}", dtype, shape)
        for name, shape in MLPS.items():
            if wanted(f"mlp {name} {label} f+b"):
                add_mlp(f"{name} {label}", dtype, shape)
        tokens = drawn(4096, 1024).to(dtype)
        chosen = torch.rand(4096, 64, generator=torch.Generator().manual_seed(1)).topk(6).indices
        routing_map = torch.zeros(4096, 64, dtype=torch.bool).scatter_(1, chosen, True)

        def moved(tokens: torch.Tensor = tokens, routing_map: torch.Tensor = routing_map) -> torch.Tensor:
            permutation = build_permutation(routing_map)
            rows = permute(tokens, permutation)
            return unpermute(rows, torch.ones(len(rows)), permutation, num_tokens=len(tokens))

        found[f"permute + unpermute {label}"] = moved
    return {name: run for name, run in found.items() if only in name}


def serve(threads: int, only: str) -> None:
    """Time the cases that standard input names, a line each: ``NAME<tab>REPEATS`` -> seconds of one."""
    import torch

    sys.path.append(str(ROOT))  # behind the tree whose kernels are timed
    from benchmarks.measure import on_warm_heap

    torch.set_num_threads(threads)
    known = cases(only)
    clock = time.thread_time if threads == 1 else time.perf_counter
    print(json.dumps(list(known)), flush=True)
    for line in sys.stdin:
        name, repeats = line.rstrip("\n").split("\t")

        def sample(run: Callable[[], Any] = known[name], repeats: int = int(repeats)) -> float:
            start = clock()
            for _ in range(repeats):
                run()
            return (clock() - start) / repeats

        print(on_warm_heap(sample, device=torch.device("cpu")), flush=True)


class Tree:
    """A process that times one tree's kernels."""

    def __init__(self, path: Path, threads: int, only: str) -> None:
        if not list((path / "megatron_omni" / "ops").glob("_kernels*.so")):
            raise SystemExit(f"error: {path}: no compiled kernels; run 'python setup.py build_ext --inplace' there")
        environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--serve", "--threads", str(threads), "--only", only]
        self.process = subprocess.Popen(
            command, cwd=path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.cases: list[str] = json.loads(self._line())

    def seconds(self, name: str, repeats: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\t{repeats}\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the process of {self.process.args!r} ended; see above")
        return line


def compare(ours: Tree, theirs: Tree, name: str, rounds: int) -> dict[str, Any]:
    """One case, both trees in turn."""
    once = min(ours.seconds(name, 1), ours.seconds(name, 1))
    theirs.seconds(name, 2)
    repeats = max(1, round(LEAST_SECONDS / max(once, 1e-6)))
    pairs = []
    for number in range(rounds):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        times = {tree: tree.seconds(name, repeats) for tree in (first, second)}
        pairs.append((times[ours], times[theirs]))
    return {
        "case": name,
        "ms": 1e3 * statistics.median(a for a, _ in pairs),
        "other_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, metavar="OTHER", help="a tree with compiled kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.threads, args.only)
        return
    if args.other is None:
        parser.error("OTHER: the tree to compare with is missing")
    from benchmarks.warm_heap import with_warm_heap

    with_warm_heap()
    ours, theirs = (Tree(tree.resolve(), args.threads, args.only) for tree in (ROOT, args.other))
    rows = []
    print(f"{'case':28} {'ms':>9} {'other ms':>9} {'ratio':>6}")
    for name in (name for name in ours.cases if name in theirs.cases):
        row = compare(ours, theirs, name, args.rounds)
        rows.append(row)
        print(f"{name:28} {row['ms']:9.3f} {row['other_ms']:9.3f} {row['ratio']:6.2f}", flush=True)
    print(f"lowest ratio {min(row['ratio'] for row in rows):.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
