"""The quickstart several times over: other seeds, other kernels, one corpus; a table of what each run reaches.

    python -m examples.quickstart.repeat --seeds 3 --kernels omni torch --json FILE [--choice]

A score is worth what its spread says. Each run trains recipes/tiny/quickstart.yaml with a seed (7, 8, ...) and a choice of
model.moe.kernels into runs/quickstart_repeat/<seed>_<kernels> and is scored on the held-out sets (--choice: on the sets
that a recipe is chosen by, which is how to tune one). A run that is there already is not trained again. FILE holds, for
each run, its scores and seconds of training, and over all of them the mean and the lowest of every score.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from examples.quickstart.run import RECIPE, Steps, make_corpus, processor, step_times, torchrun

CORPUS, RUNS = Path("runs/quickstart"), Path("runs/quickstart_repeat")
FIRST_SEED = 7
GOALS = {"image": 0.90, "image_two": 0.80, "speech": 0.85, "sound": 0.90, "video": 0.85, "text": 0.60}


def repeat(seeds: int, kernels: list[str], *, choice: bool, overrides: list[str]) -> dict[str, Any]:
    """Train and score every run that is missing; the report."""
    steps = Steps()
    if not (CORPUS / "data" / "eval" / f"image.{'choice' if choice else 'held_out'}.jsonl").exists():
        make_corpus(steps, CORPUS, RECIPE, fast=False, choice=choice)
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for name in kernels:
            run_dir = RUNS / f"{seed}_{name}"
            if not (run_dir / "latest_checkpointed_iteration.txt").exists():
                settings = [f"run_dir={run_dir}", f"seed={seed}", f"model.moe.kernels={name}", *overrides]
                steps.run(f"train {run_dir.name}", *torchrun("megatron_omni.cli.train", RECIPE, *settings))
            words = ["examples.quickstart.score", str(run_dir), "--data", str(CORPUS / "data"), *["--choice"] * choice]
            steps.run(f"score {run_dir.name}", *torchrun(*words))
            runs.append({"seed": seed, "kernels": name, "scores": read_scores(run_dir, choice=choice),
                         "training_seconds": training_seconds(run_dir), **step_times(run_dir)})  # fmt: skip
    return {"processor": processor(), "cores": os.cpu_count(), "runs": runs, **summary(runs)}


def read_scores(run_dir: Path, *, choice: bool) -> dict[str, float]:
    """Task -> share of exact answers."""
    scores = json.loads((run_dir / ("scores_choice.json" if choice else "scores.json")).read_text(encoding="utf-8"))
    return {task: score if choice else score["held_out"] for task, score in scores.items()}


def training_seconds(run_dir: Path) -> float:
    """Of the step times in metrics.jsonl, the logged ones standing for those between them."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    total, last = 0.0, 0
    for record in records:
        total += record["step time"] * (record["step"] - last)
        last = record["step"]
    return round(total, 1)


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and lowest of every task's scores."""
    columns = {task: [run["scores"][task] for run in runs] for task in runs[0]["scores"]}
    return {
        "mean": {task: round(sum(values) / len(values), 4) for task, values in columns.items()},
        "lowest": {task: min(values) for task, values in columns.items()},
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: a line for each run, then mean, lowest and goal."""
    tasks = list(report["mean"])
    rows = [
        (f"seed {run['seed']}, {run['kernels']}", run["scores"], f"{run['training_seconds']:.0f}")
        for run in report["runs"]
    ]
    rows += [("**mean**", report["mean"], ""), ("**lowest**", report["lowest"], "")]
    lines = ["| run | " + " | ".join(tasks) + " | training, s |", "|---" * (len(tasks) + 2) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{scores[task]:.3f}" for task in tasks) + f" | {seconds} |"
              for name, scores, seconds in rows]  # fmt: skip
    goals = " | ".join(f"{GOALS[task]:.2f}" if task in GOALS else "-" for task in tasks)
    return "\n".join([*lines, f"| goal | {goals} | 720 |"])


def main() -> None:
    """Parse the command line, run, print the table and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 7 on")
    parser.add_argument("--kernels", nargs="+", default=["omni", "torch"], help="choices of model.moe.kernels")
    parser.add_argument("--json", type=Path, required=True, help="report to write")
    parser.add_argument("--choice", action="store_true", help="score the sets that a recipe is chosen by instead")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further recipe fields")
    options = parser.parse_args()
    report = repeat(options.seeds, options.kernels, choice=options.choice, overrides=options.set)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(report))


if __name__ == "__main__":
    main()
