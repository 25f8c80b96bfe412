"""How a run ends when something goes wrong on one rank: the first cause is printed once, and no rank is left waiting.

The ranks share a key-value store. The first to fail claims the report and prints the cause, and where every rank was;
the others, whose collectives break because of it, print one line. Every failing rank then ends its process at once,
which closes its connections: gloo peers notice within half a second, and a rank that does not notice (NCCL) is ended by
its watch. A hang is no error on any rank until a collective times out: it is reported by the watch (watch.py).
"""

import multiprocessing
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.config.outcome import EXIT_BAD_INPUT, EXIT_FAILURE
from megatron_omni.parallel.sharing import PeerFailed, ReaderFailed
from megatron_omni.training import watch

PACKAGE = Path(__file__).resolve().parents[1]


def report_failure(error: BaseException) -> int:
    """Print ``error`` as this rank's role asks for; the exit status: 2 for bad input, else 1."""
    explained = is_for_users(error)
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if isinstance(error, PeerFailed):  # never the cause, however early it comes
        _wait_for_the_cause()
        print(f"[rank {rank}] ends: {error}", file=sys.stderr, flush=True)
    elif _is_first(rank):
        if explained:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            print(f"[rank {rank}] {''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
            print(f"error: [rank {rank}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            print("".join(f"{line}\n" for line in _places()), file=sys.stderr, end="", flush=True)
        _tell_the_others()
    elif not explained:
        print(f"[rank {rank}] ends: another rank failed first ({type(error).__name__})", file=sys.stderr, flush=True)
    return _status(error)


def leave(status: int) -> NoReturn:
    """End this process and the helpers it started, now."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_for_users(error: BaseException) -> bool:
    """Whether the message says it all: a refusal of ours, not a ValueError from inside a library."""
    if isinstance(error, CheckpointError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and PACKAGE in Path(frames[-1].filename).parents


def _status(error: BaseException) -> int:
    bad_input = isinstance(error, ReaderFailed) or (isinstance(error, ValueError) and is_for_users(error))
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILURE


def _places() -> list[str]:
    """Where the ranks were, as far as they said."""
    try:
        return watch.where(dist.distributed_c10d._get_default_store())
    except Exception:  # no groups, or the store went down with the rank that kept it
        return []


def _tell_the_others() -> None:
    try:
        watch.mark_failed(dist.distributed_c10d._get_default_store())
    except Exception:  # then every rank notices that the store is gone
        return


def _wait_for_the_cause() -> None:
    """Until the rank that has it reports: a launcher ends that one, too, as soon as this one has ended."""
    try:
        dist.distributed_c10d._get_default_store().wait([watch.CLAIM], timedelta(seconds=5))
    except Exception:  # no groups, or the store went down with the rank that kept it
        return


def _is_first(rank: int) -> bool:
    """Whether this rank reports the cause. Without a store each process speaks for itself only if it is rank 0."""
    if not dist.is_initialized():
        return rank == 0
    try:
        return watch.claim(dist.distributed_c10d._get_default_store())
    except Exception:  # the store went down with the rank that failed first
        return False
