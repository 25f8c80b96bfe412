"""``make draw``: a tiny picture generator is put behind the quickstart's model, which learns to draw, edit, repair and think.

    python -m examples.draw.run [--fast] [--overwrite] [--controls]

Starts from runs/quickstart, which is made where it is not there and refused below its goals (--fast: from
runs/quickstart_fast, in two minutes beyond that; that it learns is not to be seen there). The codec, the judge and the
text-picture pair are committed assets. Every step is a command that is printed before it runs. runs/draw (runs/draw_fast)
then holds

    data/         pictures, records, what the teachers say of them (corpus.py), latents
    pictures/     the generator learns from the teachers
    align/        projectors and the block's tokens are aligned to them, behind the frozen language model
    tasks/        all together, on four families of tasks
    anneal/       the last stage, with thoughts, which is measured
    measured/     what was drawn and what the judge saw (measure.py)
    index.html    scores, sheets, sweep, curves
    recognise.png the first drawn pictures without their prompts
    scores.json   written last (report.py)

--controls also trains `tasks` without an alignment before it, for as many steps (unaligned/), and `anneal` with the thoughts
cut out (bare/).
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from examples.draw import report
from examples.draw.corpus import bare
from examples.draw.judge import FOLDER as JUDGE
from examples.draw.pair import FOLDER as PAIR
from examples.quickstart import onward
from examples.quickstart.run import FAST_OUT as FAST_QUICKSTART
from examples.quickstart.run import OUT as QUICKSTART
from examples.quickstart.run import Steps, torchrun

OUT, FAST_OUT = Path("runs/draw"), Path("runs/draw_fast")
RECIPES = Path("recipes/tiny/draw")
CODEC = Path("examples/draw/assets/vae")
FOUR = ("draw", "edit", "restore", "edges")
STAGES = {
    "pictures": ("0_pictures.yaml", None, FOUR),
    "align": ("1_align.yaml", "quickstart", (*FOUR, "think")),
    "tasks": ("2_tasks.yaml", "align", FOUR),
    "anneal": ("3_anneal.yaml", "tasks", (*FOUR, "think")),
}
"""Name -> recipe, what it starts from, sources."""
FAST_STEPS = 4
FAST_LIMIT = 4
"""Pictures, and questions of each of the quickstart's sets."""


def main() -> None:
    """Run everything."""
    options = onward.parser(__doc__ or "", controls="no alignment, and no thoughts").parse_args()
    out = FAST_OUT if options.fast else OUT
    steps = onward.begin("draw", out, fast=options.fast, overwrite=options.overwrite)
    draw = Draw(steps, out, fast=options.fast)
    draw.train()
    draw.measure()
    facts = draw.facts()
    if options.controls:
        draw.controls()
    report.write(out, facts | report.scores_of(out))


class Draw:
    """The steps of one run."""

    def __init__(self, steps: Steps, out: Path, *, fast: bool, quickstart: Path | None = None) -> None:
        self.steps, self.out, self.fast = steps, out, fast
        self.few = ["--limit", str(FAST_LIMIT)] if fast else []
        self.quickstart = quickstart or (FAST_QUICKSTART if fast else QUICKSTART)
        self.started, self._began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()

    def train(self) -> None:
        """Corpus, latents and stages."""
        fast = ["--fast"] * self.fast
        self.steps.run("compose the corpus", "-m", "examples.draw.corpus", "--out", f"{self.out}/data", *fast)
        files = [f"{self.out}/data/train/{source}.jsonl" for source in STAGES["anneal"][2]]
        words = [str(RECIPES / STAGES["anneal"][0]), "--latents", str(CODEC), "--data", *files]
        words.append(f"data.tokenizer={self.quickstart}/tokenizer.model")
        self.steps.run("encode the pictures", "-m", "megatron_omni.cli.prepare", *words)
        for name in STAGES:
            self._stage(name)

    def _stage(self, name: str, *more: str, run: str = "") -> None:
        recipe, start, sources = STAGES[name]
        words = [str(RECIPES / recipe)]
        if run or self.fast:
            words.append(f"run_dir={self.out}/{run or name}")
        if self.fast:
            words += [f"train_iters={FAST_STEPS}", "optim.lr_warmup_iters=0"]
            words += [f"data.tokenizer={self.quickstart}/tokenizer.model"]
            words += [f"data.sources.{source}.path={self.out}/data/train/{source}.drawn-*.jsonl" for source in sources]
            if start and not any(one.startswith("init_from=") for one in more):
                words.append(f"init_from={self.quickstart if start == 'quickstart' else self.out / start}")
            if name == "align":
                words.append(f"model.image.weights={self.out}/pictures")
        self.steps.run(run or name, *torchrun("megatron_omni.cli.train", *words, *more))

    def measure(self) -> None:
        """Nature and codec, then the last model."""
        (self.out / report.MEASURED).mkdir(exist_ok=True)
        few = ["--limit", str(FAST_LIMIT)] * self.fast
        words = [
            "--reference",
            "--data",
            f"{self.out}/data",
            "--out",
            str(report.measured(self.out, "reference")),
            *few,
        ]
        self.steps.run("measure reference", "-m", "examples.draw.measure", *words)
        self._measure("anneal", "--quickstart", str(self.quickstart))

    def _measure(self, name: str, *words: str) -> None:
        rest = ["--data", f"{self.out}/data", "--out", str(report.measured(self.out, name)), *self.few]
        self.steps.run(f"measure {name}", *torchrun("examples.draw.measure", str(self.out / name), *words, *rest))

    def facts(self) -> dict[str, Any]:
        """When and of what; seconds are those until now."""
        return {
            "seconds": round(time.perf_counter() - self._began, 1),
            "started": self.started,
            "commit": onward.commit(),
            "recipe_sha256": onward.sha256_of(sorted(RECIPES.glob("*.yaml"))),
            "checkpoint_sha256": onward.sha256_of(sorted((self.out / "anneal" / "checkpoints").rglob("*"))),
            "assets_sha256": onward.sha256_of(
                sorted(one for folder in (CODEC, JUDGE, PAIR) for one in folder.iterdir())
            ),
        }

    def controls(self) -> None:
        """Without alignment, and without thoughts: the same starts otherwise, rows, steps and seed."""
        begins = [f"init_from={self.quickstart}", f"model.image.weights={self.out}/pictures"]
        begins.append("init_allow_missing=[image.caption.*,image.task.*,image.visual.*]")
        begins += [f"generative.losses.align_{kind}=0" for kind in ("task", "caption", "visual")]
        self._stage("tasks", *begins, run="unaligned")
        self._measure("unaligned", "--parts", "draw")
        train = self.out / "data" / "train"
        for path in sorted(train.glob("think.drawn-*.jsonl")):
            rows = (bare(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
            cut = path.with_name(path.name.replace("think", "bare", 1))
            cut.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self._stage("anneal", f"data.sources.think.path={train}/bare.drawn-*.jsonl", run="bare")
        self._measure("bare", "--parts", "think_without")


if __name__ == "__main__":
    main()
