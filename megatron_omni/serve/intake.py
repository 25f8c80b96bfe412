"""How a request comes in: its place among those that wait, its body within limits, the wait for a client that may leave."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive

from megatron_omni.foreign import ForeignError, parse_json
from megatron_omni.serve.errors import ApiError, bad_request
from megatron_omni.serve.metrics import Metrics
from megatron_omni.serve.settings import Settings

_LEAST_BYTES_PER_SECOND = 16 << 10
"""A body may take the patience that there is for clients, and a second more for so many bytes: slower ones hold memory for
nothing."""
_DISCARDED_BYTES, _DISCARDING_SECONDS = 8 << 20, 5.0
"""Of a body that is too large."""
_LARGE_BYTES = 1 << 20
"""A body from here on is parsed in a thread."""


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Place:
    """One request at the door: it waits until its first token, and its bytes are counted until it has gone."""

    def __init__(self, door: "Door") -> None:
        self._door, self._bytes, self._waits = door, 0, True
        self.patience_seconds = door.patience_seconds
        self.arrived = time.monotonic()

    def hold(self, num_bytes: int) -> None:
        """Count the bytes that this request has in memory now; ApiError 429 where all together are too many."""
        others = self._door.num_bytes - self._bytes
        if others and others + num_bytes > self._door.most_bytes:
            raise too_many("the bodies and media of the requests that wait take too much memory")
        self._door.num_bytes = others + num_bytes
        self._bytes = num_bytes
        self._door.show()

    def starts(self) -> None:
        """Its first token is there."""
        if self._waits:
            self._waits = False
            self._door.waiting -= 1
            self._door.show()

    def leaves(self) -> None:
        """It has ended."""
        self.starts()
        self._door.num_bytes -= self._bytes
        self._bytes = 0
        self._door.show()


class Door:
    """Counts what waits, from the first byte of a request on."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.most_waiting, self.most_bytes = settings.max_waiting, settings.max_waiting_bytes
        self.patience_seconds = settings.patience_seconds
        self.waiting = self.num_bytes = self._inside = 0
        self._metrics = metrics
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for one request; ApiError 429 where all are taken."""
        if self.waiting >= self.most_waiting:
            raise too_many(f"{self.waiting} requests wait already")
        self.waiting += 1
        self._inside += 1
        self._empty.clear()
        place = Place(self)
        self.show()
        try:
            yield place
        finally:
            place.leaves()
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def until_empty(self, seconds: float) -> None:
        """Wait until every request has ended, and not longer than ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()

    def show(self) -> None:
        """Tell the metrics."""
        self._metrics.http_waiting.set(self.waiting)
        self._metrics.bytes_waiting.set(self.num_bytes)


def too_many(message: str) -> ApiError:
    """429: come again later."""
    return ApiError(429, f"{message}; try again later", code="queue_full", headers={"Retry-After": "2"})


async def read_json(headers: Headers, receive: Receive, place: Place, most_bytes: int) -> Any:
    """The JSON body of a request; ApiError 408, 413 or 415, or 400 for what is no JSON."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json",
                       code="unsupported_media_type")  # fmt: skip
    body = await read_body(headers, receive, place, most_bytes)
    parse = lambda: parse_json(body, "body")  # noqa: E731
    try:
        return await asyncio.to_thread(parse) if len(body) > _LARGE_BYTES else parse()
    except ForeignError as error:
        raise bad_request(f"the body is {error.problem}" if error.problem.startswith("not") else
                          f"the body {error.problem}", code="invalid_json") from None  # fmt: skip


async def read_body(headers: Headers, receive: Receive, place: Place, most_bytes: int) -> bytes:
    """The bytes of a body, counted while they come."""
    promised = headers.get("content-length", "0")
    await _check_size(int(promised) if promised.isdigit() else 0, most_bytes, receive, more=True)
    parts: list[bytes] = []
    total, start = 0, time.monotonic()
    while True:
        allowed = start + place.patience_seconds + total / _LEAST_BYTES_PER_SECOND - time.monotonic()
        try:
            async with asyncio.timeout(max(allowed, 0.0)):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, f"only {total} bytes of the body came in {time.monotonic() - start:.0f} s",
                           code="body_too_slow", headers={"Connection": "close"}) from None  # fmt: skip
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        total += len(part)
        await _check_size(total, most_bytes, receive, more=message.get("more_body", False))
        place.hold(total)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _check_size(num_bytes: int, most_bytes: int, receive: Receive, *, more: bool) -> None:
    if num_bytes > most_bytes:
        if more:
            await _discard(receive)
        raise ApiError(413, f"the body has more than {most_bytes} bytes: send smaller media", code="body_too_large",
                       headers={"Connection": "close"})  # fmt: skip


async def _discard(receive: Receive) -> None:
    """Read on for a little: a client that is cut off while it sends never sees why."""
    left = _DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def while_connected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is cancelled, and ClientGone raised, when the client leaves. The body was read before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _end(task)
        await _end(gone)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: "asyncio.Future[Any]") -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def within(seconds: float, sending: Awaitable[None]) -> None:
    """Send; ClientGone where the client has not taken what was sent for so long."""
    try:
        async with asyncio.timeout(seconds):
            await sending
    except TimeoutError:
        raise ClientGone from None
