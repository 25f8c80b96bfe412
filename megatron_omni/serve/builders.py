"""The pool of builder processes, as the process that speaks HTTP sees it.

Builders are forked from a server process that has imported torch once (``forkserver``), so one that was ended is soon
replaced. A job that takes longer than its limit, or that ends its builder, is the fault of its media: the client is told
so, and no other request notices.
"""

import asyncio
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from megatron_omni.config.run import Recipe
from megatron_omni.serve.errors import ApiError, bad_request
from megatron_omni.serve.jobs import Built, Job, Refusal

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["megatron_omni.serve.building"])
_START_SECONDS = 300.0
"""The first builder imports torch."""


class Builders:
    """``number`` processes that make prompts, each one job at a time."""

    def __init__(self, recipe: Recipe, *, number: int, seconds: float) -> None:
        self._recipe, self._seconds = recipe, seconds
        self._threads = ThreadPoolExecutor(number, thread_name_prefix="builder")
        self._builders = [_Builder(recipe) for _ in range(number)]
        self._idle: asyncio.Queue[_Builder] = asyncio.Queue()

    async def start(self) -> None:
        """Wait until every builder is ready."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._threads, builder.start) for builder in self._builders))
        for builder in self._builders:
            self._idle.put_nowait(builder)

    async def build(self, job: Job) -> tuple[Built, bytes]:
        """What was built, and the pickled request to the engine (empty where the job wants none); ApiError for what
        cannot be used."""
        builder = await self._idle.get()
        done = asyncio.get_running_loop().run_in_executor(self._threads, builder.build, job, self._seconds)
        # Also when nobody waits for the result any more: the builder is free when it has finished, and not before.
        done.add_done_callback(lambda _: self._idle.put_nowait(builder))
        return await asyncio.shield(done)

    def close(self) -> None:
        """End all processes, whatever they do. They take no other signal, and Python would wait for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for builder in self._builders:
            builder.kill()


class _Builder:
    """One process, started anew when it is gone. Its methods wait; they are called in threads."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._process: multiprocessing.process.BaseProcess | None = None
        self._killed = False

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        self._jobs, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_work, args=(theirs, self._recipe), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        if self._killed:  # in the meantime
            process.kill()
        if not self._jobs.poll(_START_SECONDS):
            raise TimeoutError(f"a builder was not ready after {_START_SECONDS:g} s")
        self._jobs.recv()

    def build(self, job: Job, seconds: float) -> tuple[Built, bytes]:
        """One job."""
        if self._process is None:
            self.start()
        try:
            self._jobs.send(job)
            if not self._jobs.poll(seconds):
                self.close()
                raise bad_request(f"the media took longer than {seconds:g} s to decode: send shorter ones",
                                  param="messages", code="media_too_slow")  # fmt: skip
            built = self._jobs.recv()
            if isinstance(built, Refusal):
                raise ApiError(built.status, built.message, param=built.param, code=built.code)
            return built, self._jobs.recv_bytes() if job.fields is not None else b""
        except (EOFError, OSError):
            self.close()
            raise bad_request("the process that decoded the media ended: they are damaged, or take too much memory",
                              param="messages", code="invalid_media") from None  # fmt: skip

    def kill(self) -> None:
        """End the process for good; a thread that waits for it sees the end of its pipe."""
        self._killed = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the process; the next job starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._jobs.close()
            self._process = None


def _work(jobs: Connection, recipe: Recipe) -> None:
    from megatron_omni.serve.building import work  # it imports torch

    work(jobs, recipe)
