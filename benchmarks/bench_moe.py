"""Every op of the MoE layer, and the layer, on one shape, against every alternative that is here.

For each op: prepare all contenders, check each one's output and gradients against a reference one precision up, drop
those that are wrong, then time them in turn, round after round, so that whatever else the machine does hits all alike.
Reported are medians. A row's ``ratio_to_omni`` is its time over ours: above 1, ours is faster.

Bytes are the least an op must move (each input read once, each output and each kept intermediate written once), FLOPs
those of its matrix products. Backward means all gradients; dgrad and wgrad are those of the rows and of the weights.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import moe_contenders, moe_layers, moe_problem
from benchmarks.measure import clock_name, copy_ceiling, gemm_ceiling, on_warm_heap, peak_bytes, seconds
from benchmarks.moe_contenders import Contender, Prepared, Unavailable
from benchmarks.moe_problem import DTYPES, Problem, Results, make_problem
from benchmarks.moe_shapes import Shape
from megatron_omni.ops.grouped_gemm import grouped_gemm

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Allowed ||result - reference|| / ||reference|| of every output and gradient."""
OURS = "omni"
CHOICES = (OURS, "torch", "te", "megatron")
"""Contenders that ``model.moe.kernels`` can name."""


class Work(NamedTuple):
    """What one direction of an op must do."""

    flops: float
    bytes: float


class Pass(NamedTuple):
    """One forward and one backward; either may be timed under a name."""

    forward: str | None
    backward: str
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class Op:
    """An op to measure."""

    contenders: dict[str, Contender]
    reference: Callable[[Problem], Results]
    grad: Callable[[Problem], Tensor]
    passes: tuple[Pass, ...]
    work: Callable[[Problem], dict[str, Work]]
    total: bool = False
    """Also report forward + backward."""


@dataclass
class Report:
    """What a run found."""

    shape: Shape
    clock: str
    copy_bytes_s: float
    gemm_flops_s: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Contender -> why it cannot run here."""
    wrong: list[str] = field(default_factory=list)
    """Contenders whose results differ from the reference; not timed."""


def _sizes(problem: Problem) -> tuple[float, float, float, float, float]:
    """Bytes of [T, H] (tokens with an expert), [A, H], [A, 2 F], used expert weights w1 and w2."""
    size, shape = problem.x.element_size(), problem.shape
    tokens = int(problem.mask.any(1).sum())
    used = int(problem.mask.any(0).sum())
    rows = problem.rows.shape[0]
    weight = used * shape.hidden * shape.ffn * size
    return tokens * shape.hidden * size, rows * shape.hidden * size, rows * 2 * shape.ffn * size, 2 * weight, weight


def _permute_work(problem: Problem) -> dict[str, Work]:
    tokens, rows, *_ = _sizes(problem)
    return {"forward": Work(0, tokens + rows), "backward": Work(0, tokens + rows)}


def _unpermute_work(problem: Problem) -> dict[str, Work]:
    tokens, rows, *_ = _sizes(problem)
    adds = 2.0 * problem.rows.numel()
    return {"forward": Work(adds, tokens + rows), "backward": Work(2 * adds, tokens + 2 * rows)}


def _round_trip_work(problem: Problem) -> dict[str, Work]:
    parts = _permute_work(problem), _unpermute_work(problem)
    return {way: Work(*map(sum, zip(*(part[way] for part in parts), strict=True))) for way in parts[0]}


def _route_work(problem: Problem) -> dict[str, Work]:
    """Logits in; mask and two fp32 matrices (weights, scale) out; back: their gradient and the weights in, one out."""
    entries = problem.grad_weights.numel()
    return {"forward": Work(0, (4 + 1 + 8) * entries), "backward": Work(0, 16 * entries)}


def _gemm_work(problem: Problem) -> dict[str, Work]:
    _, rows, inner, w1, _ = _sizes(problem)
    flops = 2.0 * problem.rows.numel() * 2 * problem.shape.ffn
    whole = problem.w1.numel() * problem.w1.element_size()
    moved = Work(flops, rows + inner + w1)
    return {"forward": moved, "dgrad": moved, "wgrad": Work(flops, rows + inner + whole)}


def _mlp_work(problem: Problem, *, outer: float) -> dict[str, Work]:
    """``outer``: bytes of the input (or of the output)."""
    _, _, inner, w1, w2 = _sizes(problem)
    flops = 6.0 * problem.rows.numel() * problem.shape.ffn
    gradients = (problem.w1.numel() + problem.w2.numel()) * problem.w1.element_size()
    forward = Work(flops, 2 * outer + inner + w1 + w2)
    backward = Work(2 * flops, 3 * outer + inner + w1 + w2 + gradients)
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "forward+backward": both}


OPS: dict[str, Op] = {
    "permute": Op(
        moe_contenders.PERMUTE, moe_problem.reference_permute, lambda p: p.grad_rows,
        (Pass("forward", "backward", ("x",)),), _permute_work,
    ),
    "unpermute": Op(
        moe_contenders.UNPERMUTE, moe_problem.reference_unpermute, lambda p: p.grad_y,
        (Pass("forward", "backward", ("rows", "weights")),), _unpermute_work,
    ),
    "permute+unpermute": Op(
        moe_contenders.ROUND_TRIP, moe_problem.reference_round_trip, lambda p: p.grad_y,
        (Pass("forward", "backward", ("x", "weights")),), _round_trip_work,
    ),
    "grouped_gemm": Op(
        moe_contenders.GROUPED_GEMM, moe_problem.reference_grouped_gemm, lambda p: p.grad_up,
        (Pass("forward", "dgrad", ("x",)), Pass(None, "wgrad", ("w",))), _gemm_work,
    ),
    "expert_mlp": Op(
        moe_contenders.EXPERT_MLP, moe_problem.reference_expert_mlp, lambda p: p.grad_rows,
        (Pass("forward", "backward", ("x", "w1", "w2")),), lambda p: _mlp_work(p, outer=_sizes(p)[1]), total=True,
    ),
    "topp_route": Op(
        moe_contenders.TOPP_ROUTE, moe_problem.reference_topp_route, lambda p: p.grad_weights,
        (Pass("forward", "backward", ("z",)),), _route_work,
    ),
    "layer": Op(
        moe_layers.LAYER, moe_problem.reference_layer, lambda p: p.grad_y,
        (Pass("forward", "backward", ("x", "w1", "w2", "weights")),), lambda p: _mlp_work(p, outer=_sizes(p)[0]),
        total=True,
    ),
}  # fmt: skip


def _require(prepared: Prepared, leaves: Sequence[str]) -> list[Tensor]:
    """Gradients for the leaves named, none for the others; the tensors named."""
    for name, tensors in prepared.leaves.items():
        for tensor in tensors:
            tensor.requires_grad_(name in leaves)
    return [tensor for name in leaves for tensor in prepared.leaves[name]]


def _both_ways(prepared: Prepared, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    with prepared.scope():
        y = prepared.run()
        return y.detach(), torch.autograd.grad(y, inputs, grad)


def results(prepared: Prepared, grad: Tensor) -> Results:
    """Output and every gradient, in our layout."""
    names = list(prepared.leaves)
    y, grads = _both_ways(prepared, _require(prepared, names), grad)
    found: Results = {"y": y}
    for name in names:
        mine, grads = grads[: len(prepared.leaves[name])], grads[len(prepared.leaves[name]) :]
        found[name] = prepared.canonical.get(name, lambda tensors: tensors[0])(list(mine))
    return found


def deviation(found: Results, reference: Results) -> dict[str, float]:
    """||found - reference|| / ||reference|| by name."""
    assert found.keys() == reference.keys(), f"{sorted(found)} against {sorted(reference)}"
    errors = {}
    for name, want in reference.items():
        assert found[name].shape == want.shape, f"{name}: {tuple(found[name].shape)} against {tuple(want.shape)}"
        norm = want.norm().item()
        errors[name] = (found[name].to(want.dtype) - want).norm().item() / (norm or 1.0)
    return errors


def _prepare_all(name: str, op: Op, problem: Problem, report: Report) -> dict[str, Prepared]:
    """The contenders that run here and are right."""
    reference = op.reference(problem)
    able: dict[str, Prepared] = {}
    for who, contender in op.contenders.items():
        try:
            prepared = contender(problem)
            found = results(prepared, op.grad(problem))
        except Unavailable as why:
            report.absent[who] = str(why)
            continue
        except Exception as why:  # another library that does not take these sizes
            if who == OURS:
                raise
            report.absent[who] = f"{type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}"
            continue
        errors = deviation(found, reference)
        allowed = TOLERANCE[prepared.rounds_to or problem.x.dtype]
        bad = {what: error for what, error in errors.items() if not error <= allowed}
        if bad:
            report.wrong.append(f"{name} {who}: " + ", ".join(f"{what} off by {e:.1e}" for what, e in bad.items()))
        else:
            able[who] = prepared
    return able


def _spent(prepared: Prepared, inputs: list[Tensor], grad: Tensor, threads: int) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    with prepared.scope():
        ahead, y = seconds(prepared.run, device=grad.device, threads=threads)
        back, _ = seconds(lambda: torch.autograd.grad(y, inputs, grad), device=grad.device, threads=threads)
    return ahead, back


def measure(name: str, op: Op, problem: Problem, report: Report, *, dtype: str, threads: int, repeats: int) -> None:
    """Check, time and append the rows of one op."""
    device, grad, work = problem.x.device, op.grad(problem), op.work(problem)
    able = _prepare_all(name, op, problem, report)
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    for one in op.passes:
        for who, prepared in able.items():
            inputs = _require(prepared, one.leaves)
            with prepared.scope():
                peaks[who, one.forward or ""] = peak_bytes(prepared.run, device=device)
            peaks[who, one.backward] = peak_bytes(partial(_both_ways, prepared, inputs, grad), device=device)
            peaks[who, "forward+backward"] = peaks[who, one.backward]
        for _ in range(repeats):
            for who, prepared in able.items():
                inputs = _require(prepared, one.leaves)
                ahead, back = on_warm_heap(partial(_spent, prepared, inputs, grad, threads), device=device)
                if one.forward:
                    times.setdefault((who, one.forward), []).append(ahead)
                times.setdefault((who, one.backward), []).append(back)
                if op.total:
                    times.setdefault((who, "forward+backward"), []).append(ahead + back)
    medians = {key: statistics.median(values) for key, values in times.items()}
    for (who, direction), value in medians.items():
        report.rows.append(
            {
                "op": name,
                "direction": direction,
                "contender": who,
                "dtype": dtype,
                "shape": str(problem.shape),
                "threads": threads,
                "median_ms": value * 1e3,
                "gflops": work[direction].flops / value / 1e9,
                "gbytes_s": work[direction].bytes / value / 1e9,
                "peak_mb": peaks[who, direction] / 2**20,
                "ratio_to_omni": value / medians[OURS, direction] if (OURS, direction) in medians else None,
            }
        )


def run(shape: Shape, *, dtype: str, device: str, threads: int, repeats: int, ops: Sequence[str]) -> Report:
    """Measure ``ops`` on ``shape``."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    kind = DTYPES[dtype]

    def our_gemm(a: Tensor, b: Tensor) -> Tensor:
        return grouped_gemm(a, b.unsqueeze(0), torch.tensor([0, a.shape[0]], device=place))

    report = Report(
        shape,
        clock_name(place, threads),
        copy_ceiling(device=place, threads=threads),
        gemm_ceiling(kind, device=place, threads=threads, others=[our_gemm]),
    )
    problem = make_problem(shape, dtype=kind, device=place)
    for name in ops:
        print(f"{name} ...", file=sys.stderr, flush=True)
        measure(name, OPS[name], problem, report, dtype=dtype, threads=threads, repeats=repeats)
    return report


def table(report: Report) -> str:
    """The rows for people: fastest first, with the share of the ceiling that binds the op."""
    head = f"{'op':<18}{'direction':<18}{'contender':<26}{'ms':>10}{'x omni':>8}"
    head += f"{'GFLOP/s':>10}{'GB/s':>8}{'ceiling':>9}{'peak MB':>10}"
    lines = [head, "-" * len(head)]
    order = {name: i for i, name in enumerate(OPS)}
    groups = sorted({(order[r["op"]], r["op"], r["direction"]) for r in report.rows})
    for _, op, direction in groups:
        rows = [r for r in report.rows if (r["op"], r["direction"]) == (op, direction)]
        for r in sorted(rows, key=lambda r: r["median_ms"]):
            ratio = "-" if r["ratio_to_omni"] is None else f"{r['ratio_to_omni']:.2f}"
            moves = r["gflops"] == 0 or "permute" in op
            share = r["gbytes_s"] * 1e9 / report.copy_bytes_s if moves else r["gflops"] * 1e9 / report.gemm_flops_s
            lines.append(
                f"{op:<18}{direction:<18}{r['contender']:<26}{r['median_ms']:>10.3f}{ratio:>8}"
                f"{r['gflops']:>10.1f}{r['gbytes_s']:>8.1f}{share:>8.0%}{'c' if moves else 'g'}{r['peak_mb']:>10.1f}"
            )
        lines.append("")
    lines += [
        f"shape {report.shape}: {report.shape.assignments} assignments; {report.clock}; medians, contenders in turn",
        f"ceilings of this machine, this run: copy {report.copy_bytes_s / 1e9:.1f} GB/s (c, read + write), "
        f"matrix product {report.gemm_flops_s / 1e9:.0f} GFLOP/s (g)",
    ]
    lines += [f"not here: {who}: {why}" for who, why in report.absent.items()]
    lines += [f"WRONG, not timed: {what}" for what in report.wrong]
    return "\n".join(lines)


def recommendation(report: Report) -> str:
    """Which ``model.moe.kernels`` to set for the shape, from the whole layer's forward and backward."""
    layers = [r for r in report.rows if (r["op"], r["direction"]) == ("layer", "forward+backward")]
    choices = sorted((r for r in layers if r["contender"] in CHOICES), key=lambda r: r["median_ms"])
    if not choices:
        return "no recommendation: the layer was not measured (--op layer)"
    best, *rest = choices
    text = f"for this shape use model.moe.kernels={best['contender']}: {best['median_ms']:.2f} ms forward and backward"
    if rest:
        text += f", {rest[0]['contender']} takes {rest[0]['median_ms'] / best['median_ms']:.2f} times as long"
    faster = [r for r in layers if r["contender"] not in CHOICES and r["median_ms"] < best["median_ms"]]
    if faster:
        first = min(faster, key=lambda r: r["median_ms"])
        text += f"; {first['contender']}, which cannot be chosen, is {best['median_ms'] / first['median_ms']:.2f} times as fast"
    return text


def write_json(report: Report, path: Path) -> None:
    """The rows as a JSON list."""
    path.write_text(json.dumps(report.rows, indent=1) + "\n", encoding="utf-8")
