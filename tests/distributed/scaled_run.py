"""Runs whose exchanges are counted (counting.py): a tiny training on real ranks, and its parts alone on light ones.

*Real* ranks start, set up, take three steps (the second is not logged), save, and set up again from the checkpoint. *Light*
ranks have torch's default group and the store and no model, so that there may be many: they do once what a run does often.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_omni.checkpoint import commit, distributed, saving
from megatron_omni.checkpoint.distributed import find_checkpoint
from megatron_omni.checkpoint.reading import together
from megatron_omni.config.run import Recipe
from megatron_omni.parallel.sharing import from_rank_0, sum_over_ranks
from megatron_omni.tasks.choice import task_of
from megatron_omni.training import watch
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.logger import RunLogger
from megatron_omni.training.loop import train
from megatron_omni.training.setup import setup
from tests.distributed.counting import CountedStore, Counts
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import tiny_recipe

Table = dict[str, dict[str, list[int]]]
"""{phase: {what: [calls, bytes]}} of a rank."""
STEPS = 3
PHASES = {1: "first step", 2: "step", 3: "logged step"}


def scaled_recipe(corpus: Path, run_dir: Path, ranks: int) -> Recipe:
    """A text model with experts over two ranks and data parallelism over all: what grows with a larger run."""
    return tiny_recipe(
        corpus,
        run_dir,
        model__vision=None,
        model__audio=None,
        data__sources=[{"name": "text", "path": str(corpus / "text.jsonl")}],
        data__micro_batch_size=1,
        data__global_batch_size=ranks,
        parallel__expert_model_parallel_size=2,
        optim__use_distributed_optimizer=True,
        train_iters=STEPS,
        log__interval=STEPS,
        checkpoint__save_interval=STEPS,
        load="auto",
    )


def counted_run(rank: Rank, recipe: Recipe) -> Table:
    """Train, save and resume on this rank; what it asked for, by phase."""
    counts = Counts()
    counted = Rank(rank.index, rank.world_size, CountedStore(rank.store, counts))
    with counts.watching(Path(recipe.run_dir)), ExitStack() as patched:
        with counts.during("groups"):
            pg = counted.initialize(recipe.parallel)
        with counts.during("setup"):
            run = setup(recipe, task_of(recipe), pg=pg)
        _name_phases(counts, patched)
        with counts.during("other"):
            assert train(run) == 0
        with counts.during("resume"):
            setup(recipe, task_of(recipe), pg=pg)
    return counts.plain()


def _name_phases(counts: Counts, patched: ExitStack) -> None:
    begin, end, paused = RunLogger.begin_step, RunLogger.end_step, RunLogger.paused

    def begin_step(self: RunLogger, step: int) -> None:
        counts.phase = PHASES[step]
        begin(self, step)

    def end_step(self: RunLogger, **settings: Any) -> None:
        end(self, **settings)
        counts.phase = "other"

    @contextmanager
    def in_part(self: RunLogger, part: str) -> Any:
        with counts.during(part), paused(self, part):
            yield

    for name, made in (("begin_step", begin_step), ("end_step", end_step), ("paused", in_part)):
        patched.enter_context(mock.patch.object(RunLogger, name, made))


# ------------------------------------------------------------------------------------------------ light ranks


def write_checkpoint(root: Path, ranks: int) -> None:
    """A whole checkpoint of small files, one a rank."""
    directory = commit.begin(root, 1)
    for rank in range(ranks):
        (directory / f"__{rank}_0.distcp").write_bytes(bytes([rank % 256]) * 64)
    commit.publish(root, 1, keep=0)


def light_rank(rank: Rank, root: Path) -> Table:
    """What a run does again and again, once each, without a model."""
    counts, cpu = Counts(), torch.device("cpu")
    store = CountedStore(rank.store, counts)
    with counts.watching(root):
        with counts.during("default group"):
            dist.init_process_group("gloo", store=store, rank=rank.index, world_size=rank.world_size)
        with counts.during("numbers of a step"):
            sum_over_ranks([1] * 10, device=cpu)
        with counts.during("times of all ranks"):
            sum_over_ranks([0] * (5 * rank.world_size), device=cpu)
        with counts.during("word of rank 0"):
            from_rank_0(lambda: "word")
        with counts.during("agreement on a save"):
            saving._agree(None)
        with counts.during("work of any length"):
            together(root, lambda _: None)
        with counts.during("checkpoint verified"):
            assert find_checkpoint(root) is not None
        with counts.during("beats"):
            places = _beat(counts)
        if rank.index == 0:
            with counts.during("report of a hang"):
                assert all(watch.places(places, rank.world_size))
        with counts.during("end"):
            dist.barrier()
    return counts.plain()


def _beat(counts: Counts) -> dist.Store:
    """One sign of life of every rank, heard of by all; the store."""
    watched = watch.Watch(lambda: 1, PartTimer(), timeout_seconds=600.0)
    watched.start()
    watched.stop()
    dist.barrier()
    store: dist.Store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    return store


def own_operations(table: Table, phase: str) -> dict[str, int]:
    """Exchanges of ours in a phase, without those whose number depends on time."""
    found = table.get(phase, {})
    return {
        what.removeprefix("ours "): calls
        for what, (calls, _) in found.items()
        if what.startswith("ours ") and not what.endswith(("poll", "beat"))
    }


def light_disagreement(rank: Rank, root: Path) -> list[str]:
    """What every rank hears where one fails, and where one replica has what the others have not."""
    dist.init_process_group("gloo", store=rank.store, rank=rank.index, world_size=rank.world_size)
    alone = [dist.new_group([index]) for index in range(rank.world_size)][rank.index]
    pg: Any = SimpleNamespace(mp=alone)
    heard = [
        _error(lambda: saving._agree(None)),
        _error(lambda: saving._agree(saving._Failure(f"rank {rank.index} heard", False) if rank.index == 0 else None)),
        _error(lambda: saving._agree(saving._Failure(f"of {rank.index}", is_cause=rank.index == 2))),
        _error(lambda: together(root, lambda _: 1 / (rank.index - 1))),
        str(sorted(distributed._everywhere({"equal": ((1, 2), torch.float32)}, pg))),
        str(sorted(distributed._everywhere({f"own of {rank.index}": ((1,), torch.float32)}, pg))),
    ]
    dist.barrier()
    return heard


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except commit.CheckpointError as error:
        return str(error)
    return "none"
