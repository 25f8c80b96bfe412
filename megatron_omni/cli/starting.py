"""How the commands that run a model begin and end, on one rank or several. Nothing here imports torch before it must."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_omni.config.outcome import EXIT_BAD_INPUT


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as a ValueError, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def check_directory(checkpoint: Path) -> None:
    """ValueError unless there is a directory that may hold a checkpoint of ours."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint}: no such checkpoint directory")
    if (checkpoint / "config.json").is_file():
        raise ValueError(
            f"{checkpoint}: a Hugging Face directory; make a checkpoint of it first: "
            f"megatron-omni convert import --hf {checkpoint} --out DIR"
        )


def say_starting(command: str, subject: object) -> None:
    """Say that ``command`` has accepted its arguments and goes to work on ``subject``, before imports that take seconds."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron-omni {command} {subject}: starting (importing torch)", file=sys.stderr, flush=True)


def refused(error: ValueError) -> int:
    """Say, on rank 0, what is wrong with a command line; the exit status."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT


def run_on_ranks(work: Callable[[], int]) -> int:
    """Exit status of ``work``, which every rank calls, or of its error, which is reported; the process groups are gone."""
    from megatron_omni.platform.device import install

    install()
    from megatron_omni.parallel.groups import destroy
    from megatron_omni.training.failure import leave, report_failure

    try:
        return work()
    except BaseException as error:
        status = report_failure(error)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave(status)  # a rank that unwinds politely waits for peers that are waiting for it
        return status
    finally:
        destroy()
