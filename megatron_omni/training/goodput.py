"""Where the time of a run went, over all its starts: ``goodput.jsonl`` in the run directory and a summary at the end.

    goodput = seconds inside steps that count / seconds from the first start to the end

A step counts unless a later start ran it again. Rank 0 appends a line at every checkpoint and at the end of a start:
the seconds of each part since the start began. So when a start dies, its last line tells what was kept: the next start
continues from that very checkpoint, everything after it was lost, and so was the time until the next start began.
The parts of one start sum to its wall time: what no timer covered is *other*.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_omni.checkpoint.run_dir import GOODPUT
from megatron_omni.foreign import ForeignError, parse_json, read_text

FILE = GOODPUT
STEP_PARTS = ("forward", "backward", "communication", "optimizer")
"""Parts that are training; waiting for data, evaluation and checkpoints are not."""


class Goodput:
    """Rank 0's account of this start of the run."""

    def __init__(self, run_dir: Path, *, step: int, began: float | None = None) -> None:
        """``step`` is the one that this start continues after; ``began`` (Unix seconds) defaults to the process's start."""
        self._path = run_dir / FILE
        now = time.time()
        # The kernel counts a process's start in ticks since boot: it may lie a little in the future.
        self._began = min(psutil.Process().create_time(), now) if began is None else began
        self._from_step = step
        self._setup = now - self._began

    def note(self, step: int, seconds: Mapping[str, float], *, finished: bool = False) -> dict[str, Any]:
        """Append where the time of this start went up to ``step``; ``seconds`` by part since the loop began. ``finished``:
        nothing is left to do, so whatever comes later is an extension.
        """
        wall = time.time() - self._began
        parts = {"setup": self._setup, **seconds}
        parts["other"] = max(0.0, wall - sum(parts.values()))
        line = {"began": self._began, "from_step": self._from_step, "step": step, "wall": wall, "parts": parts}
        line |= {"finished": True} if finished else {}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def lines(self) -> list[dict[str, Any]]:
        """Every line of the run so far; a torn one, of a start that was killed while writing, is left out."""
        lines = []
        for text in read_text(self._path).splitlines():
            try:
                lines.append(parse_json(text, str(self._path)))
            except ForeignError:
                continue
        return lines


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by part over all starts, ``wall`` (first start to the last line), ``training`` (steps that count) and their
    quotient ``goodput``. ``lost`` is what starts did after the checkpoint that the next one continued from, and the time
    between starts; time between a finished run and its extension is no part of ``wall``.
    """
    starts: dict[float, list[Mapping[str, Any]]] = {}
    for line in lines:
        starts.setdefault(line["began"], []).append(line)
    ordered = [starts[began] for began in sorted(starts)]
    total: dict[str, float] = {}
    idle = 0.0
    for number, own in enumerate(ordered):
        if number + 1 < len(ordered):
            if own[-1].get("finished"):
                idle += max(0.0, ordered[number + 1][0]["began"] - own[-1]["began"] - own[-1]["wall"])
            own = [line for line in own if line["step"] <= ordered[number + 1][0]["from_step"]]
        if own:
            for part, seconds in own[-1]["parts"].items():
                total[part] = total.get(part, 0.0) + seconds
    wall = ordered[-1][-1]["began"] + ordered[-1][-1]["wall"] - ordered[0][0]["began"] - idle
    total["lost"] = max(0.0, wall - sum(total.values()))
    training = sum(total.get(part, 0.0) for part in STEP_PARTS)
    return {**total, "training": training, "wall": wall, "goodput": training / wall if wall > 0 else 0.0}


def describe(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line for the log."""
    found = summary(lines)
    starts = len({line["began"] for line in lines})
    aside = ("training", "wall", "goodput")
    parts = sorted(((name, s) for name, s in found.items() if name not in aside), key=lambda item: -item[1])
    split = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts if seconds >= 0.05)
    return (
        f"goodput {found['goodput']:.1%}: {found['training']:.1f} s of training in {found['wall']:.1f} s over {starts} "
        f"start(s); seconds: {split}"
    )
