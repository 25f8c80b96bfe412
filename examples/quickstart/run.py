"""The quickstart: corpus, tokenizer, index, training of the tiny recipe on 2 ranks, scores, pictures, an answer.

    python -m examples.quickstart.run [--fast]

Every step is a command that can be typed by itself; it is printed before it runs. runs/quickstart then holds the run
directory of the training (metrics.jsonl, tensorboard/, checkpoints/) and beside it data/, tokenizer.model, scores.json,
answers.jsonl, losses.png, expert_use.png, scores.png and timings.json. A second run starts over.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

OUT = Path("runs/quickstart")
"""As in the recipes."""
RECIPE = "recipes/tiny/quickstart.yaml"
FAST_RECIPE = "recipes/tiny/quickstart_fast.yaml"
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
    """Runs the commands in order, timing each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def run(self, name: str, *words: str) -> None:
        """One command; a failure ends the quickstart with its status."""
        print(f"\n== {name} ==\n$ python {shlex.join(words)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, *words], env=self.environment, check=False).returncode
        if status:
            sys.exit(f"error: {name} failed with status {status}; its message is above")
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f"-- {name}: {self.seconds[name]:.0f} s", flush=True)


def torchrun(*words: str) -> list[str]:
    """The launcher's words for the ranks of this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS), "-m", *words]


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--fast", action="store_true", help="a few minutes: shows that everything runs, not that it learns"
    )
    fast = parser.parse_args().fast
    if OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir(parents=True)
    memory, steps, start = PeakMemory(), Steps(), time.perf_counter()

    corpus, tokenizer = f"{OUT}/data", f"{OUT}/tokenizer.model"
    steps.run("compose the corpus", "-m", "examples.quickstart.compose", "--out", corpus, *["--fast"] * fast)
    text = f"{corpus}/tokenizer_corpus.txt"
    steps.run("train the tokenizer", "-m", "examples.quickstart.tokenizer", "--corpus", text, "--out", tokenizer)
    recipe = FAST_RECIPE if fast else RECIPE
    steps.run("index the corpus", "tools/prepare_data.py", recipe, "--workers", str(NUM_RANKS))
    steps.run("train", *torchrun("megatron_omni.cli.train", recipe))
    steps.run("score", *torchrun("examples.quickstart.score", str(OUT)))
    picture = f"{corpus}/eval/media/image.held_out/000000.png"
    question = ["--image", picture, "--prompt", "<image> what is it?", "--out", f"{OUT}/answer"]
    steps.run("ask about a picture", "-m", "megatron_omni.cli.generate", str(OUT), *question)

    timings = {
        "seconds": steps.seconds,
        "total_seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(memory.close(), 2),
    }
    (OUT / "timings.json").write_text(json.dumps(timings, indent=1) + "\n")
    print(f"\nall of it took {timings['total_seconds']:.0f} s and at most {timings['peak_memory_gib']} GiB of memory")
    print(f"look at {OUT}/losses.png, {OUT}/expert_use.png, {OUT}/scores.png and {OUT}/answers.jsonl")


if __name__ == "__main__":
    main()
