"""The parts of a check, each a process of its own with a limit of time: what is run, and what came of it.

A part that fails or takes too long ends alone, with its children; the others go on. Its first cause (the first line of its
log that names an error) and its log stand in the report. What the parts that ended early leave of their time, the later ones
may use; a part that hangs cannot take theirs.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0
"""Of all parts together, unless the caller says otherwise; the shares of :data:`PARTS` are seconds of it."""
CAUSE = re.compile(
    r"^E  +\S|^FAILED |^ERROR |^\S*(Error|Exception|Interrupt)\b.*|\berror\b\s*:|^error\b|Segmentation|Aborted"
)
TESTS_OF_A_TWIN = "permute or release_route or counter_uniform or few or wrong_offsets"


@dataclass(frozen=True)
class Part:
    """One thing to find out."""

    name: str
    title: str
    seconds: float
    """Its share of ``MINUTES``."""
    gpu: tuple[str, ...]
    """Arguments of the Python interpreter; ``{out}`` is the file for its figures."""
    cpu: tuple[str, ...]
    """The same as a twin that needs no GPU."""
    environment: dict[str, str] = field(default_factory=dict)


PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--junitxml={out}.xml")
PARTS = (
    Part(
        "build", "csrc compiles", 150,
        ("setup.py", "--quiet", "build_ext", "--inplace"),
        ("-c", "from tests.ops.cuda_emulation import Kernels; Kernels().workspace(1, 1)"),
        {"OMNI_BUILD_CUDA": "1"},
    ),
    Part(
        "ops", "every kernel against float64", 90,
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={out}.xml", "tests/ops/test_cuda_ops.py"),
        (*PYTEST, "tests/ops/test_cuda_emulated.py", "-k", TESTS_OF_A_TWIN),
    ),
    Part(
        "step", "a training step", 100,
        ("-m", "benchmarks.gpu_check.step", "--out", "{out}"),
        ("-m", "benchmarks.gpu_check.step", "--out", "{out}", "--steps", "2"),
    ),
    Part(
        "kernels", "the kernels' speed", 90,
        ("-m", "benchmarks.gpu_check.kernels", "--out", "{out}"),
        ("-m", "benchmarks.gpu_check.kernels", "--out", "{out}", "--rounds", "2"),
    ),
    Part(
        "decode", "a decoding step", 55,
        ("-m", "benchmarks.gpu_check.decode", "--out", "{out}"),
        ("-m", "benchmarks.gpu_check.decode", "--out", "{out}", "--tokens", "3", "--batches", "1", "2"),
    ),
)  # fmt: skip
"""The most important first."""


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    title: str
    status: str
    """``passed``, ``failed``, ``timed out``, or ``skipped`` where no time was left."""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    cause: str = ""
    log: str = ""
    """File with all that it printed."""
    result: dict[str, Any] = field(default_factory=dict)


def run_parts(
    parts: Sequence[Part], out: Path, *, dry_run: bool, minutes: float, say: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run the parts in turn, all within ``minutes``; ``say`` hears of each as it ends."""
    outcomes: list[Outcome] = []
    begin, planned = time.monotonic(), 0.0
    whole = sum(part.seconds for part in parts)
    for part in parts:
        planned += part.seconds / whole * minutes * 60
        limit = begin + planned - time.monotonic()
        outcomes.append(run_part(part, out, dry_run=dry_run, limit=limit))
        say(outcomes[-1])
    return outcomes


def run_part(part: Part, out: Path, *, dry_run: bool, limit: float) -> Outcome:
    """One part, ended with its children after ``limit`` seconds."""
    outcome = Outcome(part.name, part.title, "skipped", limit_seconds=max(0.0, limit), cause="no time was left")
    if limit < 1:
        return outcome
    figures, log = out / f"{part.name}.json", out / f"{part.name}.log"
    arguments = [word.replace("{out}", str(figures)) for word in (part.cpu if dry_run else part.gpu)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"PYTHONUNBUFFERED": "1"} | (part.environment if not dry_run else {})
    outcome.log, start = log.name, time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
            outcome.status = "passed" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, outcome.status = None, "timed out"
        finally:
            end_session(process)
    outcome.seconds = time.monotonic() - start
    outcome.result, failure = read_figures(part, figures)
    text = log.read_text(encoding="utf-8", errors="replace")
    outcome.cause = ""
    if outcome.status == "timed out":
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")
        outcome.cause = f"not done after {limit:.0f} s; it printed last: {last[:200]}"
    elif outcome.status == "failed":
        outcome.cause = first_cause(text) or f"exit status {status}, and no line of its log names an error"
    elif failure:
        outcome.status, outcome.cause = "failed", failure
    return outcome


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a part: it leads a session of its own, in which its children are."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_cause(text: str) -> str:
    """The first line that names an error."""
    return next((line.strip()[:300] for line in text.splitlines() if CAUSE.search(line)), "")


def read_figures(part: Part, figures: Path) -> tuple[dict[str, Any], str]:
    """What a part wrote, and why that is not enough."""
    if part.name == "build":
        return {}, ""
    if part.name == "ops":
        return read_tests(figures.with_name(figures.name + ".xml"))
    if not figures.is_file():
        return {}, "it wrote no figures"
    result: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return result, ""


def read_tests(path: Path) -> tuple[dict[str, Any], str]:
    """Counts of a JUnit file; tests that were all skipped show nothing."""
    if not path.is_file():
        return {}, "pytest wrote no results"
    cases = list(ElementTree.parse(path).iter("testcase"))
    kinds = [
        next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed") for case in cases
    ]
    failed = [case.get("name", "") for case, kind in zip(cases, kinds) if kind in ("failure", "error")]
    reasons = [child.get("message", "") for case in cases for child in case if child.tag == "skipped"]
    counts = {
        "passed": kinds.count("passed"),
        "failed": len(failed),
        "skipped": kinds.count("skipped"),
        "failures": failed[:50],
    }
    return counts, "" if counts["passed"] else f"no test ran: {reasons[0] if reasons else 'none was collected'}"
