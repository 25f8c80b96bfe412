"""The engine as the process that speaks HTTP sees it: requests go in, their events come out into mailboxes.

A request has one owner, the block of :meth:`EngineClient.ask`: when it is left, for whatever reason, the mailbox is gone
and the engine is told to cancel what has not finished. Messages to the engine leave in order through one thread, because
a prompt with media may take longer to write than the event loop may stand still.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

from megatron_omni.config.run import Recipe
from megatron_omni.generation.request import Event, FinishedEvent, TokenEvent
from megatron_omni.serve.errors import ApiError, bad_request, server_fault
from megatron_omni.serve.link import (
    Cancel,
    Drained,
    Draining,
    Failed,
    FromEngine,
    Happened,
    ModelFacts,
    Opened,
    Pause,
    Ready,
    Resume,
    told,
)
from megatron_omni.serve.link import Refused as RefusedByEngine
from megatron_omni.serve.picture_link import Painted
from megatron_omni.serve.speech_link import SpeechEvent, Spoken

MOST_EVENTS = 256
"""Of a mailbox that nobody empties, beyond which its requests are paused: a slow reader shall not fill the memory."""


class Mailbox:
    """Events of some requests that are answered together; ``pause`` is told when they are to pause and to go on.

    Whoever waits for tokens is woken at most every ``token_seconds``, for the first and the last at once: a small model
    makes tokens faster than a stream's chunks can be written, one a token.
    """

    def __init__(
        self,
        samples: int,
        pause: Callable[[bool], None] = lambda _: None,
        admitted: Callable[[], None] = lambda: None,
        *,
        token_seconds: float = 0.0,
    ) -> None:
        self.unfinished, self.admitted = samples, admitted
        self._token_seconds, self._next_tokens = token_seconds, 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._pauses, self._paused = [pause], False
        self.token_bytes: dict[int, bytes] = {}
        self._events: list[Event | SpeechEvent | Painted] = []
        self._error: ApiError | None = None
        self._something = asyncio.Event()

    def also(self, samples: int, pause: Callable[[bool], None]) -> None:
        """Something else answers into this one."""
        self.unfinished += samples
        self._pauses.append(pause)

    def _pause(self, on: bool) -> None:
        for pause in self._pauses:
            pause(on)

    def put(self, event: Event | SpeechEvent | Painted, token_bytes: Mapping[int, bytes]) -> None:
        """One more event."""
        self._events.append(event)
        if token_bytes:
            self.token_bytes.update(token_bytes)
        if isinstance(event, FinishedEvent | Spoken):
            self.unfinished -= 1
        if len(self._events) >= MOST_EVENTS and not self._paused and self.unfinished:
            self._paused = True
            self._pause(True)
        if not isinstance(event, TokenEvent) or (loop := asyncio.get_running_loop()).time() >= self._next_tokens:
            self._something.set()
        elif self._timer is None:
            self._timer = loop.call_at(self._next_tokens, self._something.set)

    def fail(self, error: ApiError) -> None:
        """Nothing more will come."""
        self._error = self._error or error
        self._something.set()

    async def take(self, seconds: float) -> list[Event | SpeechEvent | Painted]:
        """All events since the last call; none where none came within ``seconds``. ApiError after :meth:`fail`."""
        if not self._something.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._something.wait()
            except TimeoutError:
                return []
        self._something.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next_tokens = asyncio.get_running_loop().time() + self._token_seconds
        events, self._events = self._events, []
        if self._paused:
            self._paused = False
            self._pause(False)
        if self._error is not None and not events:
            raise self._error
        if self._error is not None:
            self._something.set()
        return events


class EngineClient:
    """One end of the socket pair to the engine; lives in an event loop."""

    def __init__(
        self,
        connection: Connection,
        *,
        happened: Callable[[Happened], None],
        paused: Callable[[], None] = lambda: None,
    ) -> None:
        """``happened`` is called with every step's events, ``paused`` when a request is paused for its reader."""
        self.facts: ModelFacts | None = None
        self.recipe: Recipe | None = None
        self.ready = self.draining = False
        self.failed: str | None = None
        self.last_sign = time.monotonic()
        self.opened, self.told_to_drain, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.grace_seconds = 0.0
        self._happened, self._when_paused = happened, paused
        self._connection = connection
        self._boxes: dict[str, Mailbox] = {}
        self._over: ApiError | None = None
        self._outgoing: queue.SimpleQueue[bytes | Cancel | Pause | Resume | Drained] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="to the engine", daemon=True)
        self._sender.start()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    # -------------------------------------------------------------------------------------------- requests

    @contextmanager
    def ask(
        self,
        requests: dict[str, bytes],
        *,
        samples: int,
        admitted: Callable[[], None] = lambda: None,
        token_seconds: float = 0.0,
    ) -> Iterator[Mailbox]:
        """Hand over pickled requests by name, with ``samples`` answers in all; what is unfinished at the end is cancelled.
        ``admitted`` is called when the engine begins one; ``token_seconds``: see :class:`Mailbox`.

        ``requests`` is emptied: they may be large, and are needed no more.
        """
        if self._over is not None:
            raise self._over
        names = list(requests)
        box = Mailbox(samples, lambda on: self._pause(names, on), admitted, token_seconds=token_seconds)
        self._boxes |= dict.fromkeys(names, box)
        try:
            for name in names:
                self._outgoing.put(requests.pop(name))
            yield box
        finally:
            for name in names:
                del self._boxes[name]
                if box.unfinished:
                    self._outgoing.put(Cancel(name))

    def _pause(self, names: Sequence[str], on: bool) -> None:
        for name in names:
            self._outgoing.put(Pause(name) if on else Resume(name))
        if on:
            self._when_paused()

    def end_all(self, error: ApiError) -> None:
        """End every request, those to come too."""
        self._over = error
        for box in self._boxes.values():
            box.fail(error)

    def close(self, *, speaker_failed: str = "") -> None:
        """Let the engine stop; nothing is said after this."""
        self._outgoing.put(Drained(speaker_failed))
        self._sender.join(timeout=5.0)

    # -------------------------------------------------------------------------------------------- the wire

    def _send_all(self) -> None:
        try:
            message: bytes | Cancel | Pause | Resume | Drained = b""
            while not isinstance(message, Drained):
                message = self._outgoing.get()
                if isinstance(message, bytes):
                    self._connection.send_bytes(message)
                else:
                    self._connection.send(message)
        except OSError:  # the engine is gone; the reader says so
            return

    def _read(self) -> None:
        try:
            while self._connection.poll():
                self._on(told(self._connection))
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._on(Failed("the model's process has ended"))

    def _on(self, message: FromEngine) -> None:
        self.last_sign = time.monotonic()
        match message:
            case Happened():
                for name in (name for step in message.steps for name in step.admitted):
                    if (box := self._boxes.get(name)) is not None:
                        box.admitted()
                for event in message.events:
                    if (box := self._boxes.get(event.name)) is not None:
                        box.put(event, message.token_bytes)
                self._happened(message)
            case RefusedByEngine():
                if (box := self._boxes.get(message.name)) is not None:
                    box.fail(bad_request(message.message))
            case Opened():
                self.facts, self.recipe = message.facts, message.recipe
                self.opened.set()
            case Ready():
                self.ready = True
            case Draining():
                self.draining, self.grace_seconds = True, message.grace_seconds
                self.told_to_drain.set()
            case Failed():
                if self.failed is None:
                    self.ready, self.failed = False, message.message
                    self.end_all(server_fault(message.message, code="engine_dead"))
                    self.ended.set()
