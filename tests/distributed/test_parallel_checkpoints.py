"""Saving and loading use data parallelism: each rank writes, reads and hashes its share; a fault on one rank is one error."""

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_omni.checkpoint import commit, saving, untrusted
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.distributed import find_checkpoint, sharding_metadata
from megatron_omni.checkpoint.memory import SaveMemory
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.parallel import groups, long_work
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training.setup import Run, begin_save, resume, save
from tests.distributed import tiny_run
from tests.distributed.harness import Rank
from tests.distributed.test_background_save import move, state_of, tensors_in
from tests.distributed.tiny_run import make_corpus, prepare, run_ranks, run_tiny
from tests.stress.faults import Hook, Start, launch

tiny_recipe = partial(tiny_run.tiny_recipe, data__micro_batch_size=4)
EP = {"parallel__expert_model_parallel_size": 2}
BF16 = {"optim__precision": "bf16"}
PLAIN = {"optim__use_distributed_optimizer": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of two steps on two ranks, with a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("stopped")
    run_tiny(tiny_recipe(corpus, run_dir, train_iters=2, checkpoint__save_interval=1, checkpoint__keep=0), 2)
    return run_dir


# ---------------------------------------------------------------------------------------------------- shares


def compare_with_megatron(rank: Rank, recipe: Recipe) -> tuple[int, int]:
    """Save, and compare what was written with what Megatron gathers, and what it reads with what we read; then change
    everything and load. Bytes of memory that a background save keeps on this rank, and blocks of all tensors.
    """
    run = prepare(rank, recipe)
    move(run, 1)
    run.state.step = 1
    directory, memory = save(run), SaveMemory()
    reader = TorchDistReader(directory)
    model, metadata = unwrap_model(run.model), sharding_metadata(run.pg)
    weights = model.sharded_state_dict(prefix="", metadata=metadata)
    state = {"model": weights, "optimizer": run.optimizer.sharded_state_dict(weights, metadata=metadata)}
    compared = 0
    for tensor in nested_values(save_preprocess(state, False)[0]):
        if isinstance(tensor, ShardedTensor):
            stored = reader.read(tensor.key)[tensor.global_slice()]
            assert torch.equal(stored, tensor.data.cpu()), tensor.key
            compared += 1
    assert compared > 50
    if rank.index == 0:
        by_megatron = tensors_in(directory)
        assert by_megatron.keys() == reader.tensors.keys()
        for key, value in by_megatron.items():
            assert torch.equal(value, reader.read(key)), key
    saved = [tensor.clone() for tensor in state_of(run)]
    run.state.step = 2
    begin_save(run, background=True, memory=memory).finish()
    move(run, 2)
    tables: list[Path] = []

    class Counting(untrusted._RestrictedUnpickler):
        def __init__(self, file: Any, path: Path) -> None:
            super().__init__(file, path)
            tables.append(path)

    untrusted._RestrictedUnpickler = Counting  # type: ignore[misc]
    resume(run, directory)
    assert tables == [directory / ".metadata"], "each rank reads the table of a checkpoint once a load"
    assert all(torch.equal(now, then) for now, then in zip(state_of(run), saved, strict=True))
    kept = sum(tensor.nbytes for tensor in memory._memory.values())
    return kept, sum(len(tensor.blocks) for tensor in reader.tensors.values())


@pytest.mark.parametrize(
    "settings",
    [pytest.param(BF16, id="dp2"), pytest.param(EP | BF16, id="ep2"), pytest.param(PLAIN | BF16, id="plain-adam")],
)
def test_each_rank_writes_its_share_of_what_megatron_would(
    corpus: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    recipe = tiny_recipe(corpus, tmp_path, train_iters=3, checkpoint__keep=0, **settings)
    kept, (blocks, _) = zip(*run_ranks(compare_with_megatron, 2, recipe), strict=True)
    reader = TorchDistReader(tmp_path / "checkpoints" / "iter_0000001")
    files = dict.fromkeys(("__0_0.distcp", "__1_0.distcp"), 0)
    for key, tensor in reader.tensors.items():
        for offsets, sizes in tensor.blocks:
            place = reader._storage[MetadataIndex(key, offsets)].relative_path
            files[place] += math.prod(sizes) * tensor.dtype.itemsize
    for share in (list(kept), list(files.values())):
        assert max(share) < 0.55 * sum(share), share
    if settings is BF16:  # some tensors lie across the border between the ranks
        assert blocks > len(reader.tensors)


# ---------------------------------------------------------------------------------------------------- verifying


def verify(rank: Rank, run_dir: Path, timeout: float, slow: float) -> tuple[Path | None, list[str]]:
    """The checkpoint that is found and the files that this rank hashed; each takes rank 1 ``slow`` seconds."""
    parallel = ParallelConfig(distributed_timeout_seconds=timeout)
    groups.initialize(parallel, store=rank.store, rank=rank.index, world_size=rank.world_size)
    hashed, sha256 = [], commit.sha256

    def counted(path: Path, **settings: Any) -> str:
        hashed.append(path.name)
        if rank.index == 1 and len(hashed) == 1:
            time.sleep(slow)
        return sha256(path, **settings)

    commit.sha256 = counted
    return find_checkpoint(run_dir), hashed


def test_each_file_is_hashed_by_one_rank_and_none_waits_in_a_collective(stopped: Path) -> None:
    results = run_ranks(verify, 2, stopped, 10.0, 15.0)
    newest = stopped / "checkpoints" / "iter_0000002"
    names = sorted(path.name for path in newest.rglob("*") if path.is_file() and path.name != commit.MANIFEST)
    assert [found for found, _ in results] == [newest, newest]
    assert all(hashed for _, hashed in results)
    assert sorted(name for _, hashed in results for name in hashed) == names


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_a_file_that_was_cut_costs_one_checkpoint(
    stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    older, newest = (run_dir / "checkpoints" / f"iter_{step:07d}" for step in (1, 2))
    cut(newest / "__1_0.distcp")
    assert [found for found, _ in run_ranks(verify, 2, run_dir, 60.0, 0.0)] == [older, older]
    cut(older / "__1_0.distcp")
    with pytest.raises(AssertionError, match="no checkpoint is whole"):
        run_ranks(verify, 2, run_dir, 60.0, 0.0)


def load_what_is_cut_meanwhile(rank: Rank, recipe: Recipe) -> str:
    """The error of a resume whose checkpoint loses its end behind the verification."""
    run = prepare(rank, recipe)
    directory = find_checkpoint(Path(recipe.run_dir))
    assert directory is not None
    dist.barrier()
    if rank.index == 0:
        os.truncate(directory / "__1_0.distcp", 50_000)
    dist.barrier()
    with pytest.raises(CheckpointError) as caught:
        resume(run, directory)
    return str(caught.value)


def test_a_file_that_is_cut_behind_the_verification_is_one_error_on_every_rank(
    corpus: Path, stopped: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    errors = run_ranks(load_what_is_cut_meanwhile, 2, tiny_recipe(corpus, run_dir, train_iters=3))
    assert errors[0] == errors[1] and errors[0].startswith("[rank 1] ") and "__1_0.distcp" in errors[0]


# ---------------------------------------------------------------------------------------------------- killed


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_it_writes(run: Run, dice: random.Random) -> None:
    """In the middle of its share of the second checkpoint."""
    write, pieces = saving.PendingSave.write, [0]

    def dying(self: saving.PendingSave, moved: Callable[[], None]) -> None:
        def piece() -> None:
            pieces[0] += self.step == 2
            if pieces[0] == 5:
                die()
            moved()

        write(self, piece)

    saving.PendingSave.write = dying  # type: ignore[method-assign]


def check_one_cause(start: Start, victim: int) -> None:
    assert start.statuses == [-9 if rank == victim else 1 for rank in range(2)], start.errors
    assert start.causes == 1 and f"rank {victim} has died" in start.errors[1 - victim], start.errors
    assert start.seconds_to_end < long_work.DEAD_SECONDS / 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_during_a_save_ends_the_others_with_one_cause(corpus: Path, tmp_path: Path, victim: int) -> None:
    recipe = tiny_recipe(corpus, tmp_path, train_iters=3, checkpoint__save_interval=1, checkpoint__keep=0)
    hook: Hook = killed_while_it_writes
    check_one_cause(launch(recipe, 2, hook=hook, victim=victim), victim)
    assert commit.find(tmp_path) == tmp_path / "checkpoints" / "iter_0000001"
    recipe.load = "auto"
    assert launch(recipe, 2).statuses == [0, 0]
    assert commit.find(tmp_path) == tmp_path / "checkpoints" / "iter_0000003"


def test_a_rank_killed_during_a_load_ends_the_others_with_one_cause(
    corpus: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    fill: Callable[..., None] = TorchDistReader.fill

    def on_rank_1(self: TorchDistReader, *args: Any) -> None:
        if dist.get_rank() == 1:
            die()
        fill(self, *args)

    monkeypatch.setattr(TorchDistReader, "fill", on_rank_1)
    recipe = tiny_recipe(corpus, run_dir, train_iters=3, load="auto")
    check_one_cause(launch(recipe, 2), 1)
    monkeypatch.undo()
    assert commit.find(run_dir) == run_dir / "checkpoints" / "iter_0000002"
    assert launch(recipe, 2).statuses == [0, 0]
