"""A real server for a test: its processes, forked from the test's (torch and Megatron are imported once), and its port.

Its ranks run ``megatron_omni.cli.serve.main``; HTTP and the builders are processes of their own, as always. What it
prints is kept. It never outlives the test process.
"""

import ctypes
import gc
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from openai import AsyncOpenAI, OpenAI

from tests.distributed.harness import PR_SET_PDEATHSIG

START_SECONDS = 300.0


@dataclass
class Running:
    """A server that answers."""

    url: str
    ranks: list[Any]
    log: Path
    model: str

    def client(self, **settings: Any) -> OpenAI:
        """OpenAI's own client, which does not try again."""
        return OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | settings))

    def async_client(self, **settings: Any) -> AsyncOpenAI:
        """The same for many requests at a time."""
        return AsyncOpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | settings))

    def metrics(self) -> dict[str, float]:
        """What /metrics says, by name and labels."""
        text = urlopen(f"{self.url}/metrics").read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 120.0) -> list[int | None]:
        """Send a signal to rank 0; the statuses of all ranks."""
        os.kill(self.ranks[0].pid, number)
        return self.wait(seconds=seconds)

    def wait(self, *, seconds: float = 120.0) -> list[int | None]:
        """The statuses of all ranks when they have ended."""
        for rank in self.ranks:
            rank.join(seconds)
        return [rank.exitcode for rank in self.ranks]


@contextmanager
def serving(
    checkpoint: Path, *words: str, ranks: int = 1, log: Path, environment: dict[str, str] | None = None
) -> Iterator[Running]:
    """A server of ``checkpoint`` on a free port, ready for requests; killed at the end if it is still there."""
    gc.collect()
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = free.getsockname()[1]
    arguments = [str(checkpoint), "--port", "0", *words]
    processes = [
        context.Process(target=_rank, args=(arguments, i, ranks, rendezvous, log, environment or {}))
        for i in range(ranks)
    ]
    log.touch()
    try:
        for process in processes:
            process.start()
        yield Running(_address(log, processes), processes, log, checkpoint.name)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(arguments: list[str], rank: int, ranks: int, port: int, log: Path, environment: dict[str, str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    gc.freeze()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if ranks > 1:
        names = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= environment
    from megatron_omni.cli.serve import main

    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _address(log: Path, processes: list[Any]) -> str:
    """Of the server, when it takes requests."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert all(process.is_alive() for process in processes), log.read_text()
        found = re.search(r"^serving .* at (https?://\S+)/ ", log.read_text(), re.MULTILINE)
        if found and _is_ready(found[1]):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"not ready after {START_SECONDS} s:\n{log.read_text()}")


def _is_ready(url: str) -> bool:
    try:
        return bool(urlopen(f"{url}/ready").status == 200)
    except HTTPError:
        return False
