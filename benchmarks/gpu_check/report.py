"""The two files of a check: ``gpu_check.json`` for programs, ``gpu_check.md`` for people."""

import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.parts import ROOT, Outcome

JSON, PAGE = "gpu_check.json", "gpu_check.md"


def machine() -> dict[str, str]:
    """What a reader must know of this machine; empty where it cannot be asked."""
    nvidia = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")), ""
    )
    return {
        "gpu": _said(nvidia).splitlines()[0] if _said(nvidia) else "none",
        "cpu": cpu or platform.processor(),
        "python": platform.python_version(),
        "commit": _said(["git", "rev-parse", "--short", "HEAD"]),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _said(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def write(out: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Both files, from what is known so far."""
    (out / JSON).write_text(
        json.dumps(facts | {"parts": [asdict(o) for o in outcomes]}, indent=1) + "\n", encoding="utf-8"
    )
    (out / PAGE).write_text(page(facts, outcomes), encoding="utf-8")


def page(facts: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Markdown."""
    lines = [
        "# GPU check" + (": dry run, nothing of this ran on a GPU" if facts["dry_run"] else ""),
        ", ".join(f"{name}: {value}" for name, value in facts.items() if name not in ("dry_run", "minutes")) + ".",
        table(
            ["part", "", "status", "s", "limit, s", "first cause"],
            [
                [o.name, o.title, o.status, f"{o.seconds:.0f}", f"{o.limit_seconds:.0f}", o.cause.replace("|", "\\|")]
                for o in outcomes
            ],
        ),
    ]
    writers = {"ops": _tests, "step": _step, "kernels": _kernels, "decode": _decode}
    for outcome in outcomes:
        if outcome.result and outcome.name in writers:
            lines += [f"## {outcome.title.capitalize()}", *writers[outcome.name](outcome.result)]
    return "\n\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _tests(found: dict[str, Any]) -> list[str]:
    failures = [f"Failed: {', '.join(found['failures'])}."] if found["failures"] else []
    return [f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped.", *failures]


def _step(found: dict[str, Any]) -> list[str]:
    times, held = found["step_s"], found["memory"]
    calls = ", ".join(f"{name} {n}" for name, n in found["waiting_calls"].items()) or "none"
    sites = [[f"`{site}`", str(n)] for site, n in found["host_waits_by_site"].items()]
    return [
        f"{found['recipe']} on one rank, {found['parameters_m']:.1f}M parameters, {found['trained_m']:.1f}M trained; "
        f"{found['tokens']} tokens a step: {times['median']:.3f} s (from {times['least']:.3f} to {times['most']:.3f}, the "
        f"first {times['first']:.1f}), {found['tokens_s']:.0f} tokens/s.",
        f"{found['kernel_launches']} kernels, {found['device_ms']:.1f} ms; calls that wait, and copies to the host: {calls}. "
        f"Host waits of a step, by the function that waits: {found['host_waits']}.",
        table(["function", "waits"], sites),
        table(
            ["GiB", "planned", "measured"],
            [
                ["before the first step", _gib(held["planned_between_steps_gib"]), _gib(held["held_before_the_first_step_gib"])],
                ["peak", _gib(held["planned_peak_gib"]), _gib(held["peak_gib"])],
            ],
        ),
        table(
            ["kernel", "calls", "ms", "share"],
            [[f"`{k['name'][:100]}`", str(k["calls"]), f"{k['ms']:.2f}", f"{k['share']:.1%}"] for k in found["kernels"]],
        ),
    ]  # fmt: skip


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _kernels(found: dict[str, Any]) -> list[str]:
    goals = [
        [g["figure"], g["against"], _ratio(g["reached"]), f"{g['goal']:g}", "met" if g["met"] else "missed"]
        for g in found["goals"]
    ]
    rows = [
        [row["figure"], row["contender"], str(row["shape"]), f"{row['ms']:.4f}", f"{row['ratio']:.2f}"]
        for row in found["rows"]
    ]
    return [
        f"{found['device']}: a copy moves {found['copy_gb_s']:.0f} GB/s, the best product {found['best_product_tflops']:.1f} "
        "TFLOP/s. A ratio is the other side's time over ours: above 1, ours is faster.",
        *([table(["figure", "against", "reached", "goal", ""], goals)] if goals else []),
        table(["figure", "contender", "shape", "ms", "ratio"], rows),
    ]


def _ratio(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _decode(found: dict[str, Any]) -> list[str]:
    rows = [
        [str(r["batch"]), r["decoding"], f"{r['ms_a_token']:.2f}", f"{r['prompt_ms']:.1f}", f"{r['same_answers']:.0%}"]
        for r in found["decode"]
    ]
    return [
        f"{found['parameters_m']:.1f}M parameters, a prompt of {found['prompt_tokens']} tokens with a picture and a sound. "
        f"One read of the language model's weights takes {found['weights_read_ms']:.2f} ms here.",
        table(["prompts", "decoding", "ms a token", "prompt, ms", "answers as ragged"], rows),
    ]
