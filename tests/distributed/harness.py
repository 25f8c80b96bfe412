"""Run a function on several ranks from inside a test.

``run_ranks(fn, world_size, *args)`` forks the ranks from the test process (so torch and Megatron are imported once),
calls ``fn(rank, *args)`` in each with a :class:`Rank`, and returns the results in rank order. When one rank fails all
are killed and the tracebacks are raised in the test, causes first; when they do not finish in time all are killed and their
stacks are shown. It never hangs, and ranks do not outlive a test process that is killed.
"""

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.parallel import groups

COLLECTIVE_TIMEOUT_SECONDS = 80.0
CAUSE_SECONDS = 1.0
BROKEN = "by peer"  # a connection is "closed" or "reset", as gloo says it
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies


class RankFailure(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


@dataclass(frozen=True)
class Rank:
    """What a rank function gets first."""

    index: int
    world_size: int
    store: dist.Store

    def initialize(self, parallel: ParallelConfig) -> ProcessGroupCollection:
        """Build the process groups of ``parallel`` over these ranks."""
        parallel.distributed_timeout_seconds = COLLECTIVE_TIMEOUT_SECONDS
        return groups.initialize(parallel, store=self.store, rank=self.index, world_size=self.world_size)


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 150.0) -> list[Any]:
    """Results of ``fn(rank, *args)`` on ``world_size`` forked ranks, in rank order. Results travel by pickle.

    The time-out is for hangs: generous, since a busy machine is none.
    """
    assert not dist.is_initialized(), "the test process holds process groups: call groups.destroy() first"
    # Process groups that earlier tests dropped must die here: a fork has not the threads that their destructors join.
    gc.collect()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_child, args=(fn, i, world_size, Path(directory), pipes[i][1], args), daemon=True)
            for i in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for _, sender in pipes:
                sender.close()
            return _collect([receiver for receiver, _ in pipes], processes, timeout_seconds, Path(directory))
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
            for receiver, _ in pipes:
                receiver.close()


def _collect(receivers: list[Connection], processes: list[Any], timeout_seconds: float, directory: Path) -> list[Any]:
    """Wait for every rank's answer; raise at the first failure, with what the others say within a second of it."""
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while pending := [i for i in range(len(receivers)) if i not in results and i not in failures]:
        # A rank that died leaves its pipe open: the ranks that were forked after it hold its end, too.
        watched = {one: i for i in pending for one in (receivers[i], processes[i].sentinel)}
        ready = {watched[one] for one in wait(list(watched), timeout=max(0.0, deadline - time.monotonic()))}
        if failures and not ready:
            break
        if not ready:
            raise RankFailure(
                f"ranks {pending} did not finish in {timeout_seconds} s\n" + _stacks(pending, processes, directory)
            )
        for rank in sorted(ready):
            outcome, value = _answer(receivers[rank])
            if outcome == "ok":
                results[rank] = value
            elif outcome == "error":
                failures[rank] = f"rank {rank} of {len(receivers)} failed:\n{value}"
            else:
                processes[rank].join()
                last = (directory / f"stack{rank}").read_text()
                failures[rank] = f"rank {rank} died with exit code {processes[rank].exitcode}\n{last}"
        if failures:  # a broken connection may be told before its cause
            deadline = min(deadline, time.monotonic() + CAUSE_SECONDS)
    if failures:
        raise RankFailure("\n".join(sorted(failures.values(), key=lambda failure: BROKEN in failure)))
    return [results[i] for i in range(len(receivers))]


def _answer(receiver: Connection) -> tuple[str, Any]:
    """What a rank said; ``death`` where it has ended without a word."""
    try:
        return pickle.loads(receiver.recv_bytes()) if receiver.poll() else ("death", None)
    except EOFError:  # no other rank holds the end any more
        return "death", None


def _stacks(ranks: Any, processes: list[Any], directory: Path) -> str:
    """Python stacks of ranks that are still running."""
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(f"rank {rank}:\n{(directory / f'stack{rank}').read_text()}" for rank in ranks)


def _child(
    fn: Callable[..., Any], index: int, world_size: int, directory: Path, sender: Connection, args: tuple[Any, ...]
) -> None:
    """Body of one rank: run, answer, then wait to be killed, so that no peer sees its sockets close early."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()  # the parent's objects are not this process's to collect
    torch.set_num_threads(1)
    with open(directory / f"stack{index}", "w") as stack_file:
        faulthandler.enable(file=stack_file, all_threads=True)
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        try:
            store = dist.FileStore(str(directory / "store"), world_size)
            answer = pickle.dumps(("ok", fn(Rank(index, world_size, store), *args)))
        except BaseException:
            answer = pickle.dumps(("error", traceback.format_exc()))
        sender.send_bytes(answer)
        signal.pause()
