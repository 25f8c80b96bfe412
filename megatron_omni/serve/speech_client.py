"""The speaker as the process that speaks HTTP sees it: what is to be said goes in, sound comes out into mailboxes."""

import asyncio
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

from megatron_omni.serve.engine_client import Mailbox
from megatron_omni.serve.errors import ApiError, bad_request, server_fault, unavailable
from megatron_omni.serve.speech_link import (
    FromSpeaker,
    Hold,
    Say,
    Silence,
    SpeakerFailed,
    SpeakerReady,
    Told,
    ToSpeaker,
)


class SpeechClient:
    """One end of the socket pair to the speaker; lives in an event loop."""

    def __init__(self, connection: Connection) -> None:
        self.ready: SpeakerReady | None = None
        self.failed: str | None = None
        self.ended, self._told = asyncio.Event(), asyncio.Event()
        self._connection = connection
        self._boxes: dict[str, Mailbox] = {}
        self._outgoing: queue.SimpleQueue[ToSpeaker | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="to the speaker", daemon=True)
        self._sender.start()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)

    @property
    def facts(self) -> SpeakerReady:
        """Of the speaker; ApiError 503 while it is loaded, 500 when it has ended."""
        if self.failed is not None:
            raise server_fault(self.failed, code="speaker_dead")
        if self.ready is None:
            raise unavailable("the speaker is being loaded", code="loading")
        return self.ready

    def check_voice(self, voice: str | None, *, param: str) -> None:
        """ApiError 400 for a voice that the speaker does not know; it lists those that there are."""
        voices = self.facts.voices
        if voice is None or ";" in voice:
            raise bad_request(f"{param}: a voice's name has no semicolon", param=param, code="unknown_voice")
        if voices and voice not in voices:
            raise bad_request(f"{param}: no voice {voice[:60]!r} here; there are {', '.join(voices)}", param=param,
                              code="unknown_voice")  # fmt: skip

    @contextmanager
    def ask(self, said: Say, box: Mailbox | None = None) -> Iterator[Mailbox]:
        """Have it said into ``box``, or one of its own; what is not said at the end is left."""
        _ = self.facts
        box = box if box is not None else Mailbox(0)
        box.also(1, lambda on: self._outgoing.put(Hold(said.name, on)))
        self._boxes[said.name] = box
        try:
            self._outgoing.put(said)
            yield box
        finally:
            del self._boxes[said.name]
            self._outgoing.put(Silence(said.name))

    def tell(self, name: str, ids: Sequence[int], *, end: bool = False) -> None:
        """More tokens of an answer that is spoken."""
        self._outgoing.put(Told(name, tuple(ids), end))

    async def until_it_ends(self, tokenizer: str) -> None:
        """Wait for its end, which is also that it has another tokenizer than the model whose answers it speaks."""
        await self._told.wait()
        if self.ready is not None and tokenizer and self.ready.tokenizer != tokenizer:
            other = "the speaker's tokenizer is another than that of the model whose answers it is to speak"
            print(
                f"error: {other}: give a speech generator that was trained with the same", file=sys.stderr, flush=True
            )
            return self._on(SpeakerFailed(other))
        await self.ended.wait()

    def end_all(self, error: ApiError) -> None:
        """End every sound."""
        for box in self._boxes.values():
            box.fail(error)

    def close(self) -> None:
        """Let the speaker leave."""
        self._outgoing.put(None)
        self._sender.join(timeout=5.0)
        self._connection.close()

    def _send_all(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                self._connection.send(message)
        except OSError:  # the speaker is gone; the reader says so
            return

    def _read(self) -> None:
        try:
            while self._connection.poll():
                self._on(self._connection.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._on(SpeakerFailed("the speaker has ended; the server has to be started again"))

    def _on(self, message: FromSpeaker) -> None:
        match message:
            case SpeakerReady():
                self.ready = message
                self._told.set()
            case SpeakerFailed():
                if self.failed is None:
                    self.failed = message.message
                    self.end_all(server_fault(message.message, code="speaker_dead"))
                    self.ended.set()
                    self._told.set()
            case _:
                if (box := self._boxes.get(message.name)) is not None:
                    box.put(message, {})
