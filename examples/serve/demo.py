"""``make demo``: serve the quickstart's model with its page, and say what to try with files that its corpus made.

    python -m examples.serve.demo [--run runs/quickstart] [options of megatron-omni serve]

The model is trained first (``make quickstart``, some 20 minutes) where ``--run`` has none.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

RUN = Path("runs/quickstart")
TRIES = ("image", "speech", "sound")
"""Held-out tasks whose first record is suggested."""


def suggestions(run: Path) -> list[str]:
    """One line for each of ``TRIES``: the file to attach, the question, and the right answer."""
    lines = []
    for task in TRIES:
        path = run / "data" / "eval" / f"{task}.held_out.jsonl"
        record = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
        (file,) = [
            (path.parent / name).absolute() for kind in ("images", "audios", "videos") for name in record.get(kind, ())
        ]
        question, answer = (message["content"] for message in record["messages"][-2:])
        for marker in ("<image>", "<audio>", "<video>"):
            question = question.replace(marker, "")
        lines.append(f"attach {file} and ask {question.strip()!r}; right is {answer!r}")
    return lines


def main() -> int:
    """Train if need be, then serve; the status of the server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=RUN)
    options, words = parser.parse_known_args()
    if not (options.run / "latest_checkpointed_iteration.txt").exists() and not list(
        options.run.glob("checkpoints/iter_*")
    ):
        if options.run != RUN:
            sys.exit(f"error: {options.run} holds no checkpoint")
        print(f"{RUN} holds no trained model yet: make quickstart comes first", flush=True)
        done = subprocess.run([sys.executable, "-m", "examples.quickstart.run"], check=False)
        if done.returncode:
            return done.returncode
    print("Three things to try on the page, when the address is there, each in a new chat: the model was trained on single",
          "questions, and the right answer is one that it has not seen.", flush=True)  # fmt: skip
    for line in suggestions(options.run):
        print(f"  * {line}", flush=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_omni.cli.serve import main as serve

    return serve([str(options.run), *words])


if __name__ == "__main__":
    sys.exit(main())
