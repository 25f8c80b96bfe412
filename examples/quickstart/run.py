"""The quickstart: corpus, tokenizer, index, training of the tiny recipe on 2 ranks, scores, pictures, an answer.

    python -m examples.quickstart.run [--fast] [--overwrite]

Every step is a command that can be typed by itself; it is printed before it runs. runs/quickstart (--fast:
runs/quickstart_fast) then holds the run directory of the training (metrics.jsonl, tensorboard/, checkpoints/) and beside
it data/, tokenizer.model, scores.json, answers.jsonl, losses.png, expert_use.png, scores.png and timings.json. A folder
with a trained model in it is left alone unless --overwrite says so; one without is made anew.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

OUT, FAST_OUT = Path("runs/quickstart"), Path("runs/quickstart_fast")
"""As in the recipes."""
RECIPE, FAST_RECIPE = "recipes/tiny/quickstart.yaml", "recipes/tiny/quickstart_fast.yaml"
NUM_RANKS = 2


class PeakMemory:
    """Largest sum of resident memory over this process and its descendants, sampled every five seconds.

    Not more often: reading it stops the processes for a moment.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(5.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()  # proportional share: pages shared between ranks count once
                except psutil.Error:
                    continue
                total += getattr(memory, "pss", memory.rss)
            self.peak_bytes = max(self.peak_bytes, total)

    def close(self) -> float:
        """Stop; the peak in GiB."""
        self._stop.set()
        self._thread.join()
        return self.peak_bytes / 2**30


class Steps:
    """Runs the commands in order, timing each. A stop signal goes on to the one that runs, and ends the whole."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._child: subprocess.Popen[bytes] | None = None
        self._received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
        if self._child is None:
            sys.exit(128 + number)
        self._child.send_signal(number)

    def run(self, name: str, *words: str) -> None:
        """One command; a failure ends everything with its status."""
        print(f"\n== {name} ==\n$ python {shlex.join(words)}", flush=True)
        start = time.perf_counter()
        # A session of its own: Ctrl-C in a terminal then reaches it once, through _stop.
        self._child = subprocess.Popen([sys.executable, *words], env=self.environment, start_new_session=True)
        status = self._child.wait()
        self._child = None
        if self._received is not None:
            print(f"stopped by {signal.Signals(self._received).name} during: {name}", file=sys.stderr)
            sys.exit(128 + self._received)
        if status:
            sys.exit(f"error: {name} failed with status {status}; its message is above")
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"-- {name}: {self.seconds[name]:.0f} s", flush=True)


def torchrun(*words: str) -> list[str]:
    """The launcher's words for the ranks of this machine."""
    return ["-m", "megatron_omni.platform.torchrun", "--standalone", "--nproc-per-node", str(NUM_RANKS), "-m", *words]


def make_corpus(steps: Steps, out: Path, recipe: str, *, fast: bool, choice: bool = False) -> None:
    """Corpus, tokenizer and index under `out`."""
    flags = ["--fast"] * fast + ["--choice"] * choice
    steps.run("compose the corpus", "-m", "examples.quickstart.compose", "--out", f"{out}/data", *flags)
    steps.run("add spoken answers", "-m", "examples.quickstart.spoken", "--data", f"{out}/data", *["--fast"] * fast)
    text, tokenizer = f"{out}/data/tokenizer_corpus.txt", f"{out}/tokenizer.model"
    steps.run("train the tokenizer", "-m", "examples.quickstart.tokenizer", "--corpus", text, "--out", tokenizer)
    steps.run("index the corpus", "-m", "megatron_omni.cli.prepare", recipe, "--workers", str(NUM_RANKS))


def processor() -> str:
    """Model name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def step_times(run_dir: Path) -> dict[str, Any]:
    """Mean and median seconds of the logged steps but the first, and what multiplied the experts."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = sorted(record["step time"] for record in records[1:] if "step time" in record)
    from megatron_omni.ops.extension import cpu_engine

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "engine": cpu_engine(),
        "seconds_per_step": {"mean": round(sum(times) / len(times), 4), "median": round(times[len(times) // 2], 4)},
    }


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--fast", action="store_true", help="a few minutes: shows that everything runs, not that it learns"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over where a trained model lies already")
    options = parser.parse_args()
    out, recipe = (FAST_OUT, FAST_RECIPE) if options.fast else (OUT, RECIPE)
    # The fast form is a test: it shows nothing that is worth keeping.
    if (out / "latest_checkpointed_iteration.txt").exists() and not (options.overwrite or options.fast):
        sys.exit(
            f"error: {out} holds a trained model. `make quickstart OVERWRITE=1` (or --overwrite) deletes it and starts "
            f"over; to keep it, rename {out}"
        )
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    memory, steps, start = PeakMemory(), Steps(), time.perf_counter()

    make_corpus(steps, out, recipe, fast=options.fast)
    steps.run("train", *torchrun("megatron_omni.cli.train", recipe))
    steps.run("score", *torchrun("examples.quickstart.score", str(out)))
    picture = f"{out}/data/eval/media/image.held_out/000000.png"
    question = ["--image", picture, "--prompt", "<image> what is it?", "--out", f"{out}/answer"]
    steps.run("ask about a picture", "-m", "megatron_omni.cli.generate", str(out), *question)

    timings = {
        "seconds": steps.seconds,
        "total_seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(memory.close(), 2),
        **step_times(out),
    }
    (out / "timings.json").write_text(json.dumps(timings, indent=1) + "\n")
    print(f"\nall of it took {timings['total_seconds']:.0f} s and at most {timings['peak_memory_gib']} GiB of memory")
    print(f"look at {out}/losses.png, {out}/expert_use.png, {out}/scores.png and {out}/answers.jsonl")


if __name__ == "__main__":
    main()
