"""A rank whose main thread is in a call of C that never returns: it is reported, and every rank ends.

With gloo the waiting rank's collective raises after its time-out; with NCCL nothing raises, the host is blocked like the
stuck rank's. The second is imitated by collectives that wait for ten minutes: the watch alone is left.
"""

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.training import watch
from megatron_omni.training.hooks import PartTimer
from megatron_omni.training.setup import Run
from megatron_omni.training.watch import Watch, margin_seconds
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, run_ranks, tiny_recipe
from tests.stress.faults import launch
from tests.stress.strikes import at_step

TIMEOUT = 20.0
LIMIT = TIMEOUT - margin_seconds(TIMEOUT)


def block_without_the_lock(run: Run, dice: random.Random) -> None:
    """Other threads of the rank go on: what a read from a dead file system or a wait for a device does."""
    at_step(run, 3, lambda: ctypes.CDLL(None).pause())


def block_with_the_lock(run: Run, dice: random.Random) -> None:
    """No other thread of the rank can run Python, its watch neither."""
    at_step(run, 3, lambda: ctypes.PyDLL(None).pause())


def hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: Any, *, collective_timeout: float) -> list[str]:
    """What the ranks write to stderr when rank 1 hangs; both have ended with status 1 by themselves."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 1.0)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 2.0)
    settings = {"model__vision": None, "model__audio": None, "train_iters": 9}
    recipe = tiny_recipe(make_corpus(tmp_path / "corpus"), tmp_path / "run", **settings)
    recipe.data.sources = recipe.data.sources[:1]
    start = launch(recipe, 2, hook=hook, victim=1, timeout=TIMEOUT, collective_timeout=collective_timeout)
    assert start.statuses == [1, 1], start.errors
    assert start.causes == 1, start.errors
    return start.errors


def test_a_blocked_rank_is_reported_and_all_end_though_no_collective_ever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = hang(tmp_path, monkeypatch, block_without_the_lock, collective_timeout=600.0)
    together = "".join(errors)
    assert f"a collective fails after parallel.distributed_timeout_seconds={TIMEOUT:g}" in together
    assert "step 2, data: rank 1 (there for" in together and "step 2, communication: rank 0 (there for" in together
    seconds = int(together.partition("data: rank 1 (there for ")[2].partition(" s)")[0])
    assert LIMIT - 1 <= seconds < TIMEOUT, "the report comes before a collective of that time-out would fail"
    for rank, error in enumerate(errors):
        assert f"[rank {rank}] ends: the run has failed; this one was in" in error
        assert error.count("Current thread") == 1, "the stacks of every rank are shown once"
    assert "in block_without_the_lock" not in errors[0] and "test_hang.py" in errors[1]


def test_a_rank_that_holds_the_interpreters_lock_is_reported_by_another_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = hang(tmp_path, monkeypatch, block_with_the_lock, collective_timeout=TIMEOUT)
    assert "error: [rank 0] has been in 'communication' of step 2" in errors[0]
    assert "rank 1 (silent for" in errors[0]
    assert "Timeout (" in errors[1] and "test_hang.py" in errors[1]  # by the timer of C


def parts(rank: Rank) -> list[bool]:
    """Whether a rank counts as stuck: a save never, an evaluation that moves neither, anything else after the limit."""
    rank.initialize(ParallelConfig())
    now = [0.0]
    timer = PartTimer(clock=lambda: now[0])
    watching = Watch(lambda: 7, timer, timeout_seconds=TIMEOUT)
    found = []
    for part in ("checkpoint", "evaluation", "data"):
        with timer.measure(part):
            now[0] += LIMIT - 1
            found.append(watching._is_stuck(rank.store, rank.index))
            if part == "evaluation":
                timer.moved()
            now[0] += 2
            found += [watching._is_stuck(rank.store, rank.index) for _ in range(2)]
    return found


def test_a_long_save_is_told_once_and_is_no_hang(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(parts, 1) == [[False] * 6 + [False, True, True]]
    assert capfd.readouterr().err.count("[rank 0] saving after step 7 has taken 16 s so far") == 1
