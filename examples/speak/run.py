"""``make speak``: a tiny speech generator learns the quickstart's voices through the paper's stages, and is listened to.

    python -m examples.speak.run [--fast] [--overwrite] [--controls]

Starts from runs/quickstart, which is made where it is not there and refused below its goals (--fast: from
runs/quickstart_fast, in two minutes beyond that; that it learns is not to be seen there). The codec is the committed asset.
Every step is a command that is printed before it runs. runs/speak (runs/speak_fast) then holds

    data/                        records with codes (corpus.py), questions that are answered aloud (asked.py)
    single/                      a dense model of one voice
    several/                     from it: five voices, styles, pieces of long texts
    voice_a/ voice_b/ voice_c/   from it: one voice each
    upcycled/ mixture/           four experts out of these four, and their training
    anneal/                      the last stage, which is measured
    loop/                        the quickstart's model, which learns to write spoken turns
    measured/                    what the judges heard (measure.py, loop.py), with sounds
    index.html                   scores and players
    scores.json                  written last (report.py)

--controls trains the dense model of `several` for as much more time as the mixture and its annealing had, into controls.json.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from examples.quickstart import onward
from examples.quickstart.run import FAST_OUT as FAST_QUICKSTART
from examples.quickstart.run import OUT as QUICKSTART
from examples.quickstart.run import Steps, torchrun
from examples.reason.report import busy
from examples.speak import report
from examples.speak.sounds import CODEC, CONTINUED, SINGLE, VOICES

OUT, FAST_OUT = Path("runs/speak"), Path("runs/speak_fast")
RECIPES = Path("recipes/tiny/speech")
STAGES = {
    "single": ("1_single.yaml", "quickstart", (SINGLE,)),
    "several": ("2_several.yaml", "single", (*VOICES, "styled", "long")),
    "voice_a": (f"2a_{CONTINUED[0]}.yaml", "single", CONTINUED[:1]),
    "voice_b": (f"2b_{CONTINUED[1]}.yaml", "single", CONTINUED[1:2]),
    "voice_c": (f"2c_{CONTINUED[2]}.yaml", "single", CONTINUED[2:]),
    "mixture": ("3_mixture.yaml", "upcycled", (*VOICES, "styled", "long")),
    "anneal": ("4_anneal.yaml", "mixture", ("anneal", "styled", "long")),
    "loop": ("5_loop.yaml", "quickstart", ("asked",)),
}
"""Name -> recipe, what it starts from, sources."""
EXPERTS = ("voice_a", "voice_b", "voice_c", "several")
FAST_STEPS = 4
FAST_PLANTED = 4


def main() -> None:
    """Run everything."""
    options = onward.parser(__doc__ or "", controls="the dense model trained for as long").parse_args()
    out = FAST_OUT if options.fast else OUT
    steps = onward.begin("speak", out, fast=options.fast, overwrite=options.overwrite)
    speak = Speak(steps, out, fast=options.fast)
    speak.train()
    speak.measure()
    scores = speak.scores()
    if options.controls:
        speak.controls()
    report.write(out, scores)


class Speak:
    """The steps of one run."""

    def __init__(self, steps: Steps, out: Path, *, fast: bool) -> None:
        self.steps, self.out, self.fast = steps, out, fast
        self.quickstart = FAST_QUICKSTART if fast else QUICKSTART
        self.started, self._began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()

    def train(self) -> None:
        """Corpus and stages."""
        data, fast = f"{self.out}/data", ["--fast"] * self.fast
        self.steps.run("compose the corpus", "-m", "examples.speak.corpus", "--out", data, *fast)
        words = ["--quickstart", str(self.quickstart), "--out", data, *fast]
        self.steps.run("compose questions", "-m", "examples.speak.asked", *words)
        for name in STAGES:
            if name == "mixture":
                self._upcycle()
            self._stage(name)

    def _stage(self, name: str, *more: str, run: str = "") -> None:
        recipe, start, sources = STAGES[name]
        words = [str(RECIPES / recipe)]
        if self.fast:
            words += [f"run_dir={self.out}/{run or name}", f"train_iters={FAST_STEPS}", "optim.lr_warmup_iters=0"]
            words += [f"data.tokenizer={self.quickstart}/tokenizer.model"]
            words += [f"data.sources.{source}.path={self.out}/data/train/{source}.jsonl" for source in sources]
            if name != "loop":
                words.append(f"model.speech.text_table={self.quickstart}")
            if "long" in sources and name == "several":
                words.append("data.sources.long.from_sample=0")
            if not more and name != "single":
                words.append(f"init_from={self.quickstart if start == 'quickstart' else self.out / start}")
        self.steps.run(run or name, *torchrun("megatron_omni.cli.train", *words, *more))

    def _upcycle(self) -> None:
        experts = [str(self.out / name) for name in EXPERTS]
        words = ["--out", f"{self.out}/upcycled", "--dtype", "fp32", "--experts", *experts]
        self.steps.run("upcycle", "-m", "megatron_omni.cli.upcycle", *words)

    def measure(self) -> None:
        """Nature and codec, the dense model, the last one, the loop."""
        (self.out / report.MEASURED).mkdir(exist_ok=True)
        planted = ["--planted", str(FAST_PLANTED)] * self.fast
        self._measure("reference", "--reference", *planted)
        self._measure("dense", str(self.out / "several"), "--parts", "named")
        self._measure("speech", str(self.out / "anneal"))
        words = [str(self.out / "loop"), str(self.out / "anneal"), "--data", f"{self.out}/data"]
        words += ["--out", str(report.measured(self.out, "loop"))]
        self.steps.run("measure the loop", *torchrun("examples.speak.loop", *words))

    def _measure(self, name: str, *words: str) -> None:
        rest = ["--data", f"{self.out}/data", "--out", str(report.measured(self.out, name))]
        self.steps.run(f"measure {name}", *torchrun("examples.speak.measure", *words, *rest))

    def scores(self) -> dict[str, Any]:
        """Seconds are those until now."""
        return {
            "seconds": round(time.perf_counter() - self._began, 1),
            "started": self.started,
            "commit": onward.commit(),
            "recipe_sha256": onward.sha256_of(sorted(RECIPES.glob("*.yaml"))),
            "checkpoint_sha256": onward.sha256_of(sorted((self.out / "anneal" / "checkpoints").rglob("*"))),
            "codec_sha256": onward.sha256_of(sorted(CODEC.glob("codec.*"))),
            **report.scores_of(self.out),
        }

    def controls(self) -> None:
        """The dense model of `several` for as much more time as mixture and annealing had."""
        seconds = sum(busy(self.out / name) for name in ("mixture", "anneal"))
        steps = report.read_metrics(self.out / "several" / "metrics.jsonl")[-1]["step"]
        more = max(1, round(seconds / busy(self.out / "several") * steps))
        words = [f"run_dir={self.out}/dense_more", f"init_from={self.out}/several", f"train_iters={more}"]
        words += ["data.sources.long.from_sample=0", "optim.lr=1.0e-3", "optim.min_lr=0.0"]
        self._stage("several", *words, run="dense_more")
        self._measure("dense_more", str(self.out / "dense_more"), "--parts", "named")
        found = {"iterations": more, **report.named_scores(report.read(self.out, "dense_more")["named"])}
        (self.out / "controls.json").write_text(json.dumps({"dense_more": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
