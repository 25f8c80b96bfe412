"""Compare the loss curves of runs: the first is the control, the others should follow it.

python tools/compare_losses.py control=runs/one tp2=runs/tp2 --assert-equal 1e-5
python tools/compare_losses.py runs/a runs/b --metric grad-norm --plot curves.png

Reads metrics.jsonl of each run directory. Prints, for each run, the last common value and the largest relative difference
from the control. --plot draws the curves and, below, the differences. Exit status: 0, 1 when a difference exceeds
--assert-equal or steps are missing, 2 for bad input.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_omni.foreign import parse_json, read_text

EXIT_DIFFERS, EXIT_BAD_INPUT = 1, 2

Curve = dict[int, float]
"""Step -> value."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", metavar="[NAME=]RUN_DIR", help="the control first")
    p.add_argument("--metric", default="lm loss", help="default: lm loss")
    p.add_argument("--assert-equal", type=float, metavar="REL", help="largest relative difference allowed")
    p.add_argument("--plot", type=Path, metavar="FILE.png")
    return p


def read_curve(run: Path, metric: str) -> Curve:
    """The values of ``metric`` by step; ValueError when the run has none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run}: no metrics.jsonl there; give a run directory")
    records = [parse_json(line, str(path)) for line in read_text(path).splitlines()]
    curve = {int(record["step"]): float(record[metric]) for record in records if metric in record}
    if not curve:
        names = sorted({name for record in records for name in record})
        raise ValueError(f"{path}: has no metric {metric!r}; it has {', '.join(names)}")
    return curve


def differences(curve: Curve, control: Curve) -> Curve:
    """Relative difference from ``control`` at the steps that both have."""
    return {
        step: abs(value - control[step]) / max(abs(control[step]), 1e-12)
        for step, value in sorted(curve.items())
        if step in control
    }


def compare(curves: Mapping[str, Curve], *, limit: float | None) -> tuple[list[str], bool]:
    """Lines to print, and whether every run follows the first."""
    (control_name, control), *others = curves.items()
    lines, equal = [f"{control_name:<28}{len(control):>6} steps, last {list(control.values())[-1]:.6f}"], True
    for name, curve in others:
        apart = differences(curve, control)
        worst = max(apart.values(), default=float("inf"))
        lines.append(f"{name:<28}{len(curve):>6} steps, last {list(curve.values())[-1]:.6f}, at most {worst:.1e} apart")
        if limit is not None and (worst > limit or curve.keys() != control.keys()):
            lines.append(
                f"  not equal: allowed {limit:.1e}, steps {'differ' if curve.keys() != control.keys() else 'agree'}"
            )
            equal = False
    return lines, equal


def draw(curves: Mapping[str, Curve], *, metric: str, path: Path) -> None:
    """Curves above, relative differences from the first below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(3, 2))
    (_, control), *_ = curves.items()
    for i, (name, curve) in enumerate(curves.items()):
        style = {"lw": 5, "alpha": 0.25, "color": "black"} if i == 0 else {"lw": 1.2, "ls": (0, (4, 1 + i))}
        above.plot(list(curve), list(curve.values()), label=name, **style)
        if i:
            apart = differences(curve, control)
            below.plot(list(apart), [max(value, 1e-12) for value in apart.values()], marker=".", lw=0.8, label=name)
    above.set_ylabel(metric)
    above.legend(fontsize=8, ncols=2)
    below.set_ylabel("relative difference")
    below.set_yscale("log")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Parse, compare, print."""
    options = parser().parse_args(arguments)
    try:
        named = [run.rpartition("=") for run in options.runs]
        curves = {name or path: read_curve(Path(path), options.metric) for name, _, path in named}
        if len(curves) != len(options.runs) or len(curves) < 2:
            raise ValueError("give two or more runs with different names")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    lines, equal = compare(curves, limit=options.assert_equal)
    print("\n".join(lines))
    if options.plot is not None:
        draw(curves, metric=options.metric, path=options.plot)
    return 0 if equal else EXIT_DIFFERS


if __name__ == "__main__":
    sys.exit(main())
