"""A maker of sound or pictures (maker.py) as the process that speaks HTTP sees it: messages go in, answers into mailboxes."""

import asyncio
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any, ClassVar, cast

from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.errors import ApiError, server_fault, unavailable
from megatron_omni.serve.maker import MakerFailed


class MakerClient[Ready, Message]:
    """One end of the socket pair; lives in an event loop. It sends ``Message`` and is first told ``Ready``; every other message
    that comes has the ``name`` of a request."""

    ready_kind: ClassVar[type]
    who: ClassVar[str]
    dead_code: ClassVar[str]
    """Of the error of requests, once it has ended."""

    def __init__(self, connection: Connection) -> None:
        self.ready: Ready | None = None
        self.failed: str | None = None
        self.told, self.ended = asyncio.Event(), asyncio.Event()
        self._connection = connection
        self._boxes: dict[str, Mailbox] = {}
        self._outgoing: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name=f"to {self.who}", daemon=True)
        self._sender.start()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    @property
    def facts(self) -> Ready:
        """What it said of itself; ApiError 503 while it is loaded, 500 when it has ended."""
        if self.failed is not None:
            raise server_fault(self.failed, code=self.dead_code)
        if self.ready is None:
            raise unavailable(f"{self.who} is being loaded", code="loading")
        return self.ready

    def end_all(self, error: ApiError) -> None:
        """End everything that is waited for."""
        for box in self._boxes.values():
            box.fail(error)

    def fail(self, message: str) -> None:
        """Nothing comes any more; the first reason counts."""
        if self.failed is None:
            self.failed = message
            self.end_all(server_fault(message, code=self.dead_code))
            self.told.set()
            self.ended.set()

    def close(self) -> None:
        """Let it leave."""
        self._outgoing.put(None)
        self._sender.join(timeout=5.0)
        self._connection.close()

    def _send_all(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                self._connection.send(message)
        except OSError:  # it is gone; the reader says so
            return

    def _read(self) -> None:
        try:
            while self._connection.poll():
                self._on(self._connection.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self.fail(f"{self.who} has ended; the server has to be started again")

    def _on(self, message: Any) -> None:
        if isinstance(message, MakerFailed):
            self.fail(message.message)
        elif isinstance(message, self.ready_kind):
            self.ready = cast(Ready, message)
            self.told.set()
        elif (box := self._boxes.get(message.name)) is not None:
            box.put(message, {})
