"""``make reason``: the quickstart's model learns to think: cold start, GSPO, pairs, DPO, GSPO again; then it is examined.

    python -m examples.reason.run [--fast] [--overwrite] [--controls] [--seeds N]

Starts from runs/quickstart, which is made where it is not there and refused below its goals (--fast: from
runs/quickstart_fast, in two minutes; that it learns is not to be seen there). Every step is a command that is printed before
it runs. runs/reason (runs/reason_fast) then holds

    data/                     questions (corpus.py)
    cold_start/ chosen        the supervised run, and a link to its checkpoint that is best on the choice set
    gspo/ pairs/ dpo/ gspo_2/ stages of recipes/tiny/reason/chain.yaml
    measured/                 what each stage answers (measure.py)
    index.html                table and curves, and rollouts.html: the same questions before and after, with their media
    scores.json               written last

--controls adds a run whose rewards are permuted and one that is supervised for as long as GSPO took; --seeds further runs of
GSPO from the same start, into seeds.json.
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
from examples.reason import report

OUT, FAST_OUT = Path("runs/reason"), Path("runs/reason_fast")
RECIPES = Path("recipes/tiny/reason")
COLD_START, GSPO, CHAIN = (str(RECIPES / name) for name in ("1_cold_start.yaml", "2_gspo.yaml", "chain.yaml"))
FAST_STEPS = {"cold_start": 60, "chain": 4}
FAST_SIZES = {"demonstrations": 40, "prompts": 40, "held_out": 12, "choice": 12}
"""Questions of each source."""
SETS = ("prompts", "demonstrations")
RUNS = ("gspo", "dpo", "gspo_2")
"""Trained stages of the chain."""


def main() -> None:
    """Run everything."""
    parser = onward.parser(__doc__ or "", controls="permuted rewards, and more supervised steps")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of GSPO in all, with other seeds")
    options = parser.parse_args()
    out = FAST_OUT if options.fast else OUT
    steps = onward.begin("reason", out, fast=options.fast, overwrite=options.overwrite)
    reason = Reason(steps, out, fast=options.fast)
    reason.train()
    reason.measure("stages", [out / "chosen", *(out / name for name in RUNS)])
    scores = reason.scores()
    if options.controls:
        reason.controls()
        scores |= report.control_scores(out)
    if options.seeds > 1:
        reason.seeds(options.seeds)
    report.write(out, scores)


class Reason:
    """The steps of one run."""

    def __init__(self, steps: Steps, out: Path, *, fast: bool) -> None:
        self.steps, self.out, self.fast = steps, out, fast
        self.started, self._began = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        tokenizer = (FAST_QUICKSTART if fast else QUICKSTART) / "tokenizer.model"
        self.moved = [f"data.tokenizer={tokenizer}"] if fast else []
        self.short = [f"train_iters={FAST_STEPS['chain']}", "optim.lr_warmup_iters=0"] if fast else []

    def sources(self, name: str) -> list[str]:
        """Overrides: the set's questions in this run's folder, where that is not the recipes'."""
        sources = [f"data.sources.{source}.path={self.out}/data/{name}/{source}.jsonl" for source in report.SOURCES]
        return [*self.moved, *sources] if self.fast else []

    def train(self) -> None:
        """Corpus, cold start with its choice, and the chain."""
        sizes = [word for name, size in FAST_SIZES.items() for word in (f"--{name.replace('_', '-')}", str(size))]
        data = ["-m", "examples.reason.corpus", "--out", f"{self.out}/data", *(sizes if self.fast else [])]
        self.steps.run("compose the questions", *data)
        words = [COLD_START, *self.sources("demonstrations")]
        if self.fast:
            words += [f"run_dir={self.out}/cold_start", f"init_from={FAST_QUICKSTART}"]
            words += [
                f"train_iters={FAST_STEPS['cold_start']}",
                f"checkpoint.save_interval={FAST_STEPS['cold_start'] // 2}",
            ]
        self.steps.run("cold start", *torchrun("megatron_omni.cli.train", *words))
        checkpoints = sorted((self.out / "cold_start" / "checkpoints").glob("iter_*"))
        self.measure("cold_start", checkpoints, "choice", "held_out", ways=("greedy", "sampled"), samples=1)
        chosen = report.choose(self.out)
        (self.out / "chosen").symlink_to(chosen.relative_to(self.out), target_is_directory=True)
        print(f"chosen: {chosen}")
        words = [CHAIN, *self.sources("prompts")]
        if self.fast:
            words += [f"run_dir={self.out}", f"init_from={self.out}/chosen", *self.short]
        self.steps.run("GSPO, pairs, DPO, GSPO", "-m", "megatron_omni.cli.chain", *words)

    def measure(self, name: str, runs: list[Path], *sets: str, ways: tuple[str, ...] = (), samples: int = 4) -> None:
        """What runs or checkpoints answer, into measured/NAME.json; held-out questions unless ``sets`` are named."""
        folders = [f"{self.out}/data/{one}" for one in sets or ("held_out",)]
        words = [*map(str, runs), "--questions", *folders, "--out", str(report.measured(self.out, name))]
        words += ["--samples", str(samples), *(["--ways", *ways] if ways else [])]
        self.steps.run(f"measure {name}", *torchrun("examples.reason.measure", *words))

    def scores(self) -> dict[str, Any]:
        """Of the stages; seconds are those until now."""
        return {
            "seconds": round(time.perf_counter() - self._began, 1),
            "started": self.started,
            "commit": onward.commit(),
            "recipe_sha256": onward.sha256_of(sorted(RECIPES.glob("*.yaml"))),
            "checkpoint_sha256": onward.sha256_of(sorted((self.out / "gspo_2" / "checkpoints").rglob("*"))),
            **report.stage_scores(self.out),
        }

    def controls(self) -> None:
        """Permuted rewards, and the cold start for as long as GSPO took."""
        start = [f"init_from={self.out}/chosen"]
        rewards = ['reinforce.rewards=[{function: "examples/reason/rewards.py:permuted"}]']
        words = [GSPO, *self.sources("prompts"), f"run_dir={self.out}/control", *start, *rewards, *self.short]
        self.steps.run("GSPO with permuted rewards", *torchrun("megatron_omni.cli.train", *words))
        more = report.steps_in_the_time_of_gspo(self.out)
        words = [COLD_START, *self.sources("demonstrations"), f"run_dir={self.out}/sft_more", *start]
        words += [f"train_iters={more}", "checkpoint.save_interval=0", "optim.lr_warmup_iters=0"]
        self.steps.run("more supervised steps", *torchrun("megatron_omni.cli.train", *words))
        self.measure("controls", [self.out / "control", self.out / "sft_more"], ways=("greedy", "sampled"))

    def seeds(self, count: int) -> None:
        """GSPO from the same start with other seeds: other prompts and draws."""
        runs = [self.out / f"gspo_seed_{number}" for number in range(1, count)]
        for number, run in enumerate(runs, 1):
            words = [
                GSPO,
                *self.sources("prompts"),
                f"run_dir={run}",
                f"init_from={self.out}/chosen",
                f"seed={7 + number}",
            ]
            self.steps.run(f"GSPO with seed {7 + number}", *torchrun("megatron_omni.cli.train", *words))
        self.measure("seeds", [self.out / "gspo", *runs], ways=("greedy", "sampled"))
        (self.out / "seeds.json").write_text(json.dumps(report.seed_scores(self.out), indent=1) + "\n")


if __name__ == "__main__":
    main()
