"""Random faults on runs of two ranks, and whether what follows equals a run that nothing happened to.

    python -m tests.stress.faults --trials 100 [--seed 0] [--only kill_one damaged ...]

A trial draws a kind of fault, where it strikes, whether checkpoints are saved in the background, and on which layout the
run goes on. It passes when

* the ranks that can still run end by themselves in time, with the status they should, and the cause is printed once;
* the newest checkpoint afterwards is whole and not older than the newest before the fault;
* the run, started again with ``load: auto``, ends with the records of the undisturbed run: every number bit for bit on the
  same two ranks, losses to 1e-5 on one rank (half as many data-parallel ranks);
* every step of the final history took exactly the samples of that step in the undisturbed run, none twice.

The ranks are forked from this process (torch is imported once), so a trial costs seconds. Verdicts are computed from
files. Nothing is tried twice: a failure is printed with its seed and ends the script with status 1.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_omni.platform.device import install

install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_omni.checkpoint import commit  # noqa: E402
from megatron_omni.config.run import Recipe  # noqa: E402
from megatron_omni.parallel import groups  # noqa: E402
from megatron_omni.tasks.supervised import SupervisedTask  # noqa: E402
from megatron_omni.training import loop, setup  # noqa: E402
from megatron_omni.training.failure import leave, report_failure  # noqa: E402
from megatron_omni.training.incidents import FILE as INCIDENTS  # noqa: E402
from megatron_omni.training.setup import Run  # noqa: E402
from tests.distributed.test_resume import exact  # noqa: E402
from tests.distributed.tiny_run import make_corpus, records, tiny_recipe  # noqa: E402
from tests.stress.strikes import HOOKS, INTERVAL, STEPS, Hook, damage  # noqa: E402

TIMEOUT = 300.0
"""Seconds that a collective may take: long, since a busy machine is not a fault."""
HANG_TIMEOUT = 32.0
"""The same where a rank hangs."""
PATIENCE = 60.0
"""Seconds that the other ranks may take to end, beyond the time-out where there is one."""


@dataclass
class Start:
    """How one start of a run ended."""

    statuses: list[int]
    errors: list[str]
    """What each rank wrote to stderr."""
    seconds_to_end: float
    """From the first rank's end to the last's."""

    @property
    def causes(self) -> int:
        return sum(line.startswith("error: ") for text in self.errors for line in text.splitlines())


# ---------------------------------------------------------------------------------------------------- starting ranks


def launch(
    recipe: Recipe,
    world_size: int,
    *,
    hook: Hook | None = None,
    victim: int = 0,
    seed: int = 0,
    timeout: float = TIMEOUT,
    collective_timeout: float | None = None,
    kill_all: bool = False,
) -> Start:
    """Train ``recipe`` on forked ranks; ``hook`` runs on the victim before training. ``kill_all``: the first death is
    followed by SIGKILL to every rank. A rank that is stopped as a whole is killed like its launcher would, at the end.
    ``timeout`` is the recipe's; ``collective_timeout`` that of the collectives, where it is to be another.
    """
    context = multiprocessing.get_context("fork")
    run_dir = Path(recipe.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ranks-") as place:
        ranks = [
            context.Process(
                target=_rank,
                args=(recipe, rank, world_size, Path(place), hook if rank == victim else None, seed),
                kwargs={"timeout": timeout, "collective_timeout": collective_timeout or timeout},
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            multiprocessing.connection.wait([process.sentinel for process in ranks], timeout=600)
            first = time.monotonic()
            if kill_all:
                for process in ranks:
                    process.kill()
            for process in ranks:
                while process.is_alive() and time.monotonic() < first + PATIENCE and not _stopped_alone(process, ranks):
                    process.join(timeout=0.2)
            last = time.monotonic()
        finally:
            for process in ranks:
                process.kill()
                process.join()
        errors = [(Path(place) / f"stderr{rank}").read_text() for rank in range(world_size)]
        return Start([process.exitcode or 0 for process in ranks], errors, last - first)


def _stopped_alone(process: Any, ranks: list[Any]) -> bool:
    """Whether nothing can end this process but its launcher: it is stopped as a whole, and the others have ended."""
    others = [other for other in ranks if other is not process and other.is_alive()]
    return not others and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


def _rank(
    recipe: Recipe,
    rank: int,
    world_size: int,
    place: Path,
    hook: Hook | None,
    seed: int,
    *,
    timeout: float,
    collective_timeout: float,
) -> None:
    """One rank, ended as the command line ends it."""
    os.environ["RANK"] = str(rank)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(place / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(message)s", force=True
    )  # pytest's handlers were forked too
    torch.set_num_threads(1)
    try:
        recipe.parallel.distributed_timeout_seconds = collective_timeout
        store = dist.FileStore(str(place / "store"), world_size)
        pg = groups.initialize(recipe.parallel, store=store, rank=rank, world_size=world_size)
        recipe.parallel.distributed_timeout_seconds = timeout
        run = setup.setup(recipe, SupervisedTask(recipe.data.sources), pg=pg)
        record_samples(run, Path(recipe.run_dir) / "samples.jsonl", start=place.name)
        if hook is not None:
            hook(run, random.Random(seed))
        status = loop.train(run)
    except BaseException as error:
        leave(report_failure(error))
    sys.stdout.flush()
    os._exit(status)


def record_samples(run: Run, path: Path, *, start: str) -> None:
    """Write down which samples this rank read for which step of which start; a line is one write, so ranks can share the
    file.
    """
    if run.loader is None:
        return
    read = run.loader.next_step

    def next_step() -> Any:
        batches = read()
        ids = sorted({i for batch in batches for i in batch.sample_ids.flatten().tolist() if i >= 0})
        line = json.dumps({"start": start, "step": run.state.step + 1, "ids": ids}) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        return batches

    run.loader.next_step = next_step  # type: ignore[method-assign]


# ---------------------------------------------------------------------------------------------------- trials


class Failed(AssertionError):
    """A trial that did not pass."""


@dataclass
class Bench:
    """What the trials of a script share."""

    root: Path
    corpus: Path
    reference: list[dict[str, float]] = field(default_factory=list)
    samples: dict[int, list[int]] = field(default_factory=dict)
    checkpoint_bytes: int = 0

    def recipe(self, run_dir: Path, **overrides: Any) -> Recipe:
        """Nine steps of a small MoE on text, a checkpoint every three."""
        settings: dict[str, Any] = {
            "train_iters": STEPS,
            "model__vision": None,
            "model__audio": None,
            "checkpoint__save_interval": INTERVAL,
            "checkpoint__keep": 0,
            "parallel__expert_model_parallel_size": 2,
            **overrides,
        }
        recipe = tiny_recipe(self.corpus, run_dir, **settings)
        recipe.data.sources = recipe.data.sources[:1]
        return recipe

    def run_reference(self) -> None:
        """The run that nothing happens to."""
        directory = self.root / "undisturbed"
        start = launch(self.recipe(directory), 2)
        if start.statuses != [0, 0]:
            raise Failed(f"the undisturbed run failed: {start.errors}")
        self.reference = comparable(self.recipe(directory))
        self.samples = final_samples(directory)
        newest = directory / "checkpoints" / f"iter_{STEPS:07d}"
        self.checkpoint_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())

    def trial(self, kind: str, seed: int) -> dict[str, Any]:
        """One fault and what follows; facts about it. Raises Failed."""
        dice = random.Random(f"{kind} {seed}")
        run_dir = self.root / f"{kind}-{seed}"
        settings = {"checkpoint__async_save": dice.random() < 0.5}
        try:
            with _disk(run_dir, kind, self.checkpoint_bytes, dice) as enlarge:
                facts = self._strike(kind, run_dir, settings, dice, seed)
                enlarge()
                before = tracked(run_dir)
                facts["resumed on"] = "one rank" if dice.random() < 0.3 else "two ranks"
                self._resume(run_dir, settings, facts, before)
                self._compare(run_dir, same_layout=facts["resumed on"] == "two ranks")
        except Failed as error:
            raise Failed(f"{kind} --seed {seed}: {error}") from None
        shutil.rmtree(run_dir)
        return {"kind": kind, "seed": seed, **facts}

    def _strike(
        self, kind: str, run_dir: Path, settings: dict[str, Any], dice: random.Random, seed: int
    ) -> dict[str, Any]:
        if kind == "damaged":
            return self._damage(run_dir, dice)
        if kind in ("dead_worker", "failing_data"):
            settings["data__num_workers"] = 2
        recipe = self.recipe(run_dir, **settings)
        victim, hook = dice.randrange(2), HOOKS[kind]
        timeout = HANG_TIMEOUT if kind.startswith("hang") else TIMEOUT
        start = launch(recipe, 2, hook=hook, victim=victim, seed=seed, timeout=timeout, kill_all=kind == "kill_all")
        if start.seconds_to_end >= PATIENCE and kind != "hang_stopped":
            raise Failed(f"rank(s) did not end by themselves: {start.statuses}\n" + "\n".join(start.errors))
        other = 1 - victim
        expected = {
            "sigterm": start.statuses == [75, 75],
            "kill_one": start.statuses[victim] == -9 and start.statuses[other] == 1,
            "kill_all": set(start.statuses) <= {-9, 1},
            "hang_stopped": start.statuses[victim] == -9 and start.statuses[other] == 1,
            "dead_worker": start.statuses == [0, 0],
            "failing_data": set(start.statuses) <= {1, 2},
        }.get(kind, start.statuses == [1, 1])
        # A rank can be killed too late, when everything is done: then there is no cause to print.
        too_late = kind.startswith("kill") and 0 in start.statuses
        if not expected and not too_late:
            raise Failed(f"statuses {start.statuses}\n" + "\n".join(start.errors))
        causes = 0 if too_late else 1
        if kind in ("kill_one", "hang_looping", "non_finite", "failing_data", "disk_full") and start.causes != causes:
            raise Failed(f"statuses {start.statuses}, {start.causes} causes were printed\n" + "\n".join(start.errors))
        where = {"hang_looping": f"data: rank {victim} (there for", "hang_stopped": f": rank {victim} (silent for"}
        if where.get(kind, "") not in "\n".join(start.errors):
            raise Failed("the report does not say where the hanging rank is\n" + "\n".join(start.errors))
        if kind == "non_finite":
            self._check_incidents(run_dir)
        return {"seconds to end": round(start.seconds_to_end, 2), "async": settings["checkpoint__async_save"]}

    def _damage(self, run_dir: Path, dice: random.Random) -> dict[str, Any]:
        """A run that stopped after step 6, the newest of whose checkpoints is damaged."""
        shutil.copytree(self.root / "undisturbed", run_dir)
        shutil.rmtree(run_dir / "checkpoints" / f"iter_{STEPS:07d}")
        (run_dir / "checkpoints" / commit.TRACKER).write_text(dice.choice([f"{STEPS - INTERVAL}\n", "", "garbled"]))
        return {"damage": damage(run_dir / "checkpoints" / f"iter_{STEPS - INTERVAL:07d}", dice)}

    def _check_incidents(self, run_dir: Path) -> None:
        lines = [json.loads(line) for line in (run_dir / INCIDENTS).read_text().splitlines()]
        if len(lines) != loop.NON_FINITE_LIMIT:
            raise Failed(f"{len(lines)} incidents were recorded")
        for line in lines:
            if [sample["id"] for sample in line["samples"]] != self.samples[line["step"]]:
                raise Failed(f"the incident lists other samples than step {line['step']} took: {line}")

    def _resume(self, run_dir: Path, settings: dict[str, Any], facts: dict[str, Any], before: int | None) -> None:
        if before is not None:
            found = commit.find(run_dir)
            if found is None or ("damage" not in facts and found.name != f"iter_{before:07d}"):
                raise Failed(f"the newest checkpoint was {before}, found {found}")
        world = 1 if facts["resumed on"] == "one rank" else 2
        layout = {"parallel__expert_model_parallel_size": world}
        start = launch(self.recipe(run_dir, load="auto", **settings, **layout), world)
        if set(start.statuses) != {0}:
            raise Failed(f"the run did not go on: {start.statuses}\n" + "\n".join(start.errors))
        if "damage" in facts:
            told = sum(text.count("passing over a damaged checkpoint") for text in start.errors)
            if told != 1:
                raise Failed(f"the damaged checkpoint was reported {told} times ({facts['damage']})\n{start.errors[0]}")

    def _compare(self, run_dir: Path, *, same_layout: bool) -> None:
        found = comparable(self.recipe(run_dir))
        if same_layout and found != self.reference:
            raise Failed(f"records differ from the undisturbed run's:\n{found}\n{self.reference}")
        for mine, theirs in zip(found, self.reference, strict=True):
            for name in ("lm loss", "grad-norm"):
                if abs(mine[name] - theirs[name]) > 1e-5 * abs(theirs[name]):
                    raise Failed(f"step {mine['step']}: {name} is {mine[name]}, undisturbed {theirs[name]}")
        if (taken := final_samples(run_dir)) != self.samples:
            raise Failed(f"other samples were taken: {taken}, undisturbed {self.samples}")


def comparable(recipe: Recipe) -> list[dict[str, float]]:
    """Records without times and without the count of the very fault that a dead thread is."""
    faults = "data/thread restarts"
    return [{name: value for name, value in record.items() if name != faults} for record in exact(records(recipe))]


def tracked(run_dir: Path) -> int | None:
    return commit.tracked_step(run_dir / "checkpoints")


def final_samples(run_dir: Path) -> dict[int, list[int]]:
    """Samples of each step in the history that counts, all ranks together: of the last start that ran it."""
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    taken: dict[int, list[int]] = {}
    for step in sorted({line["step"] for line in lines}):
        own = [line for line in lines if line["step"] == step]
        taken[step] = sorted(i for line in own if line["start"] == own[-1]["start"] for i in line["ids"])
    return taken


@contextlib.contextmanager
def _disk(run_dir: Path, kind: str, checkpoint_bytes: int, dice: random.Random) -> Iterator[Callable[[], None]]:
    """For ``disk_full`` a small disk under ``run_dir``; the value enlarges it."""
    if kind != "disk_full":
        yield lambda: None
        return
    run_dir.mkdir(parents=True)
    size = int(checkpoint_bytes * dice.uniform(1.15, 2.9))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run_dir)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(run_dir)], check=True) and None
        for path in run_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        subprocess.run(["umount", str(run_dir)], check=True)


KINDS = [*HOOKS, "damaged"]


def can_mount() -> bool:
    """Whether this process may mount a small disk."""
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", place], check=True)
    return True


def make_bench(root: Path) -> Bench:
    """Corpus and undisturbed run."""
    bench = Bench(root, make_corpus(root / "corpus"))
    bench.run_reference()
    return bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    kinds = [kind for kind in options.only if kind != "disk_full" or can_mount()]
    passed: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        bench = make_bench(Path(place))
        for number in range(options.trials):
            kind, seed = kinds[number % len(kinds)], options.seed + number
            try:
                facts = bench.trial(kind, seed)
            except Failed as error:
                failed += 1
                print(f"FAILED {error}", flush=True)
                continue
            except Exception:
                failed += 1
                print(f"FAILED {kind} --seed {seed}\n{traceback.format_exc()}", flush=True)
                continue
            passed[kind].append(facts)
            print(json.dumps(facts), flush=True)
    for kind, facts_of in passed.items():
        slowest = max((facts.get("seconds to end", 0.0) for facts in facts_of), default=0.0)
        print(f"{kind}: {len(facts_of)} passed, last rank ended at most {slowest} s after the first")
    print(f"{options.trials} trials, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
