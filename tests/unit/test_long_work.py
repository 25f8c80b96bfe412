"""A wait outside any collective: for a rank at work without limit, for one that is gone or hangs not at all."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.parallel import groups, long_work
from tests.distributed.harness import Rank, run_ranks


def work(rank: Rank, kind: str) -> list[str] | str:
    """Three rounds of which rank 1 takes long, or does not finish the last."""
    parallel = ParallelConfig(distributed_timeout_seconds=10.0)
    groups.initialize(parallel, store=rank.store, rank=rank.index, world_size=rank.world_size)
    found: list[str] = []
    for number in range(3):
        try:
            with long_work.long_work("counting", measured=kind != "unmeasured") as piece:
                if rank.index == 1 and number == 2:
                    if kind == "fails":
                        raise OSError("no space")
                    for _ in range(24):
                        time.sleep(0.5)
                        if kind == "slow":
                            piece.advance()
                found = piece.exchange(f"{number} of {rank.index}")
        except (RuntimeError, OSError) as error:
            return str(error)
    return found


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("slow", ["2 of 0", "2 of 1"]),  # longer than the collectives' time-out, and than STUCK_SECONDS
        ("unmeasured", ["2 of 0", "2 of 1"]),
        ("hangs", "rank 1 has not come any further for"),
        ("fails", "[rank 1] counting: OSError: no space"),
    ],
)
def test_waits_for_a_rank_at_work_alone(kind: str, expected: list[str] | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_work, "STUCK_SECONDS", 3.0)
    first, _ = run_ranks(work, 2, kind)
    assert first == expected if isinstance(expected, list) else expected in first


def test_a_process_is_alive_until_it_ends() -> None:
    child = os.fork()
    if not child:
        signal.pause()
    assert long_work._lives(child)
    os.kill(child, signal.SIGKILL)
    while long_work._lives(child):  # a zombie, which nobody has waited for, is dead
        time.sleep(0.01)
    assert Path(f"/proc/{child}").exists()
    os.waitpid(child, 0)
    assert not long_work._lives(child)
