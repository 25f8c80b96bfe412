"""tools/bench_moe.py on tiny shapes: for real, with its checks, its JSON, and what its ratios mean."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_moe_linear
from benchmarks.bench_moe import OPS, Report, _prepare_all, deviation, measure, recommendation, results
from benchmarks.measure import peak_bytes
from benchmarks.moe_problem import make_problem, routing_map
from benchmarks.moe_shapes import NAMED, Shape

ROOT = Path(__file__).resolve().parents[2]
KEYS = [
    "op", "direction", "contender", "dtype", "shape", "threads", "median_ms", "gflops", "gbytes_s", "peak_mb",
    "ratio_to_omni",
]  # fmt: skip
TINY = Shape(hidden=32, ffn=24, experts=5, tokens=40, mean_k=2, null_share=0.25)
CPU = torch.device("cpu")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/bench_moe.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def report(shape: Shape = TINY) -> Report:
    return Report(shape, "thread CPU time", 1e10, 1e11)


def test_sizes_that_others_refuse_leave_them_out():
    """Rows of 60 bytes: grouped_mm wants multiples of 16."""
    odd, found = Shape(hidden=30, ffn=22, experts=5, tokens=40, mean_k=2, null_share=0.25), report()
    problem = make_problem(odd, dtype=torch.bfloat16, device=CPU)
    for op in ("layer", "grouped_gemm"):
        assert "omni" in _prepare_all(op, OPS[op], problem, found)
    assert found.wrong == [] and any("16 bytes" in why for why in found.absent.values())


def test_command_line_end_to_end(tmp_path):
    target = tmp_path / "rows.json"
    sizes = {"hidden": 32, "ffn": 24, "experts": 5, "tokens": 40, "mean-k": 2, "null-share": 0.25, "skew": 0.5}
    done = bench(*(f"--{name}={size}" for name, size in sizes.items()), "--repeats", "3", "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())
    assert all(list(row) == KEYS for row in rows)
    assert {row["op"] for row in rows} == set(OPS)
    layer = {row["contender"] for row in rows if row["op"] == "layer"}
    present = {"omni", "torch", "megatron", "loop", "megatron SequentialMLP", "hf qwen3_moe eager", "torch medium"}
    assert present <= layer
    for row in rows:
        (ours,) = [
            r for r in rows if (r["op"], r["direction"], r["contender"]) == (row["op"], row["direction"], "omni")
        ]
        assert row["ratio_to_omni"] == pytest.approx(row["median_ms"] / ours["median_ms"])
        assert row["median_ms"] > 0 and row["gbytes_s"] > 0 and row["threads"] == 1 and row["dtype"] == "fp32"
        assert row["shape"] == "T40 H32 F24 E5 k2 null0.25 skew0.5"
    # 60 assignments (40 tokens x 2 slots, a quarter null), 6 x hidden x ffn FLOPs each way forward, twice backward.
    flops = {"forward": 60 * 6 * 32 * 24, "backward": 60 * 12 * 32 * 24, "forward+backward": 60 * 18 * 32 * 24}
    for row in rows:
        if row["op"] in ("layer", "expert_mlp"):
            assert row["gflops"] * row["median_ms"] * 1e6 == pytest.approx(flops[row["direction"]])
    assert "MALLOC_MMAP_THRESHOLD_=4294967296" in done.stdout and "ceilings of this machine" in done.stdout
    assert "not here: te: model.moe.kernels='te'" in done.stdout and "not here: sonic-moe" in done.stdout
    assert "for this shape use model.moe.kernels=" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--hidden, --ffn, --experts, --tokens, --mean-k: not given; name a shape"),
        (["--shape", "uni-moe-2", "--null-share", "1.5"], "--null-share 1.5: must lie in [0, 1)"),
        (["--shape", "uni-moe-2", "--mean-k", "9"], "--mean-k 9: 9 real experts per token of 4; lower it"),
        (["--shape", "qwen3-30b", "--mean-k", "2.5"], "--fixed-k with 2.5 real experts per token: give a whole number"),
        (["--shape", "uni-moe-2", "--repeats", "0"], "--repeats 0: must be positive"),
        (["--shape", "uni-moe-2", "--device", "tpu"], "--device tpu: use cpu or cuda"),
        (["--shape", "uni-moe-2", "--json", "no/such/dir/x.json"], "its directory does not exist"),
        (["--shape", "mixtral"], "invalid choice: 'mixtral'"),
    ],
)
def test_bad_input_is_refused_with_the_fix(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_help_needs_no_torch():
    code = "import runpy, sys; sys.argv = ['x', '--help']; import os; os.execve = None\n"
    code += f"try:\n    runpy.run_path({str(ROOT / 'tools' / 'bench_moe.py')!r}, run_name='tool')['main']()\n"
    code += "except SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--null-share" in done.stdout, done.stderr


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_that_is_here_passes_its_check(op, dtype):
    found = report()
    able = _prepare_all(op, OPS[op], make_problem(TINY, dtype=dtype, device=CPU), found)
    assert found.wrong == [] and "omni" in able and len(able) >= 2


@pytest.mark.parametrize("leaf", ["y", "w2", "weights"])
def test_a_wrong_contender_is_named_and_not_timed(leaf):
    """One that is off by 0.1 % in a single output or gradient."""
    honest = OPS["layer"].contenders["torch"]

    def wrong(problem):
        prepared = honest(problem)
        if leaf == "y":
            run = prepared.run
            prepared.run = lambda: run() * 1.001
        else:
            prepared.canonical[leaf] = lambda grads: grads[0] * 1.001
        return prepared

    op = replace(OPS["layer"], contenders={"omni": OPS["layer"].contenders["omni"], "wrong": wrong})
    found = report()
    measure("layer", op, make_problem(TINY, dtype=torch.float32, device=CPU), found, dtype="fp32", threads=1, repeats=1)
    assert {row["contender"] for row in found.rows} == {"omni"}
    assert len(found.wrong) == 1 and f"layer wrong: {leaf} off by 1.0e-03" in found.wrong[0] + ","


def test_references_are_the_definition():
    """The layer's reference against autograd through the formula, token by token, in float64."""
    problem = make_problem(TINY, dtype=torch.float32, device=CPU)
    leaves = [t.double().requires_grad_() for t in (problem.x, problem.w1, problem.w2, problem.weights)]
    x, w1, w2, weights = leaves
    y = torch.zeros_like(x)
    for t, e in problem.mask.nonzero().tolist():
        gate, up = (x[t] @ w1[e]).chunk(2)
        out = (torch.nn.functional.silu(gate) * up) @ w2[e]
        y = y + torch.nn.functional.one_hot(torch.tensor(t), TINY.tokens).unsqueeze(1) * (weights[t, e] * out)
    grads = torch.autograd.grad(y, leaves, problem.grad_y.double())
    want = dict(zip(("y", "x", "w1", "w2", "weights"), (y.detach(), *grads), strict=True))
    assert max(deviation(OPS["layer"].reference(problem), want).values()) < 1e-12


@pytest.mark.parametrize(
    "shape",
    [
        TINY,
        replace(TINY, mean_k=1.2, null_share=0.0),
        replace(TINY, mean_k=4.5, null_share=0.0, skew=2.0),
        replace(TINY, null_share=0.9),
        replace(TINY, mean_k=3, null_share=0.0, fixed_k=True),
    ],
    ids=str,
)
def test_routing_maps_have_exactly_the_assignments_asked_for(shape):
    mask = routing_map(shape)
    k = mask.sum(1)
    assert int(k.sum()) == shape.assignments == round(40 * shape.mean_k * (1 - shape.null_share))
    assert (k.unique().numel() == 1) == shape.fixed_k
    if shape.skew:
        assert mask[:, 0].sum() > mask[:, -1].sum()


def test_named_shapes_scale():
    small = NAMED["qwen3-30b"].scaled(4)
    assert (small.hidden, small.ffn, small.experts, small.assignments) == (512, 192, 128, 8 * 4096)
    for shape in NAMED.values():
        shape.check()


def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        a = torch.zeros(1 << 20)  # 4 MiB
        b = a + 1  # 8
        del a  # 4
        return b * 2  # 8

    assert 0 <= peak_bytes(run, device=CPU) - (8 << 20) < 1024  # and a few bytes for the scalars


def test_recommendation_names_the_fastest_choice_and_the_faster_outsider():
    found = report()
    for contender, ms in (("omni", 2.0), ("torch", 3.0), ("scattermoe", 1.0)):
        row = {"op": "layer", "direction": "forward+backward", "contender": contender, "median_ms": ms}
        found.rows.append(row)
    text = recommendation(found)
    assert text.startswith("for this shape use model.moe.kernels=omni: 2.00 ms") and "torch takes 1.50 times" in text
    assert "scattermoe, which cannot be chosen, is 2.00 times as fast" in text
    assert "not measured" in recommendation(report())


def test_line_fit_recovers_a_line_and_sees_a_bend():
    constant, slope, worst = bench_moe_linear.line_fit([100, 200, 400], [3.0, 5.0, 9.0])
    assert (constant, slope) == pytest.approx((1.0, 0.02)) and worst < 1e-12
    assert bench_moe_linear.line_fit([100, 200, 400], [3.0, 5.0, 17.0])[2] > 0.1


def test_linear_mode_times_every_mean_k_and_null_share():
    shape = Shape(hidden=16, ffn=16, experts=4, tokens=64, mean_k=1.5)
    found = bench_moe_linear.run(shape, dtype="fp32", device="cpu", threads=1, repeats=2)
    cases = ["k1", "k1.5", "k2", "k3", "k4", "k1.5 null0.25", "k1.5 null0.5"]
    assert [r["shape"].split("E4 ")[1] for r in found.rows] == cases
    text = bench_moe_linear.table(found)
    assert "linear in assignments within" in text and "null share 0 to 0.5 at mean k 1.5" in text
    assert all(math.isfinite(r["median_ms"]) and list(r) == KEYS for r in found.rows)


def test_results_come_back_in_our_layout():
    """Another library's weights are transposed and fused; what it gives is compared by our names, all of it."""
    problem = make_problem(TINY, dtype=torch.float32, device=CPU)
    found = results(OPS["layer"].contenders["hf qwen3_moe eager"](problem), problem.grad_y)
    assert list(found) == ["y", "x", "w1", "w2", "weights"]
    assert max(deviation(found, OPS["layer"].reference(problem)).values()) < 1e-5
