"""The first line of a command whose imports take seconds: said before them, on rank 0, to stderr."""

import os
import sys


def say_starting(command: str, subject: object) -> None:
    """Say that ``command`` has accepted its arguments and goes to work on ``subject``."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron-omni {command} {subject}: starting (importing torch)", file=sys.stderr, flush=True)
