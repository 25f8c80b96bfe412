"""The figure of a sweep: scores of tasks ``NAME@SETTING=VALUE`` (picture_task.py) over the values of each setting, ``sweep.png``.

One panel for each setting, one line for each task, bars of one standard error where there is one.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_omni.evaluation.results import TaskSummary

FIGURE = "sweep.png"
_SWEPT = re.compile(r"(.+)@(\w+)=([-+.\de]+)")

Point = tuple[float, float, float | None]
"""Value, score, standard error."""


def points(tasks: Mapping[str, TaskSummary]) -> dict[str, dict[str, list[Point]]]:
    """Setting -> task -> points by value, of the tasks of sweeps that have a score."""
    found: dict[str, dict[str, list[Point]]] = {}
    for name, task in tasks.items():
        if (parts := _SWEPT.fullmatch(name)) is not None and task.score is not None:
            label = f"{parts[1]} ({task.metric})"
            found.setdefault(parts[2], {}).setdefault(label, []).append((float(parts[3]), task.score, task.stderr))
    return {setting: {label: sorted(some) for label, some in lines.items()} for setting, lines in found.items()}


def write_sweep(folder: Path, tasks: Mapping[str, TaskSummary]) -> Path | None:
    """The figure in a results folder; None, and none is written, where nothing was swept."""
    panels = points(tasks)
    if not panels:
        return None
    from matplotlib.figure import Figure  # a second that other evaluations need not wait for

    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (setting, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for label, some in lines.items():
            values, scores, errors = zip(*some)
            axes.errorbar(values, scores, yerr=[error or 0.0 for error in errors], marker="o", capsize=3, label=label)
        axes.set_xlabel(setting)
        axes.set_ylabel("score")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(folder / FIGURE, dpi=120)
    return folder / FIGURE
