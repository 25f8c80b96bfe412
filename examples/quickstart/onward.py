"""What goes on from the quickstart (``make reason``, ``make speak``): its options, its start, and what its scores name."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from examples.quickstart.repeat import GOALS
from examples.quickstart.run import FAST_OUT, OUT, Steps


def parser(description: str, *, controls: str) -> argparse.ArgumentParser:
    """The options that all have; ``controls`` says what those are."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--fast", action="store_true", help="two minutes: shows that everything runs, not that it learns")
    made.add_argument("--overwrite", action="store_true", help="start over where a finished run lies already")
    made.add_argument("--controls", action="store_true", help=f"also {controls}")
    return made


def begin(target: str, out: Path, *, fast: bool, overwrite: bool) -> Steps:
    """Make the quickstart where it is missing, and ``out`` anew for ``make TARGET``; a finished run there is kept unless told."""
    if (out / "scores.json").exists() and not (overwrite or fast):
        sys.exit(
            f"error: {out} holds a finished run. `make {target} OVERWRITE=1` (or --overwrite) deletes it; or rename it"
        )
    steps = Steps()
    start_from_quickstart(steps, fast=fast)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return steps


def start_from_quickstart(steps: Steps, *, fast: bool) -> None:
    """Make the quickstart where it is missing; one below its goals is refused."""
    folder = FAST_OUT if fast else OUT
    if not (folder / "scores.json").exists():
        steps.run("make the quickstart", "-m", "examples.quickstart.run", *["--fast"] * fast)
    if fast:
        return
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    low = below_goals(scores)
    if low:
        sys.exit(
            f"error: {folder} is below the quickstart's goals: {', '.join(low)}. What it does not see or hear cannot be "
            "thought or spoken about; `make quickstart OVERWRITE=1` trains it anew"
        )


def below_goals(scores: dict[str, dict[str, float]]) -> list[str]:
    """Tasks whose held-out score is below the quickstart's goal, each with both figures."""
    found = {task: scores.get(task, {}).get("held_out", 0.0) for task in GOALS}
    return [f"{task} {score:.3f} (goal {GOALS[task]:.2f})" for task, score in found.items() if score < GOALS[task]]


def commit() -> str:
    """Of this checkout; empty without git."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def sha256_of(files: list[Path]) -> str:
    """Of the names and bytes of files, in their order."""
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
