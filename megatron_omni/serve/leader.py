"""The engine's side of a server, on rank 0: requests from HTTP into the engine, its events back, a step at a time.

Between two steps the messages that have come are read; without work the loop waits for one, at most a second, and then
takes an empty step, which tells the other ranks and HTTP that it lives. Nothing here waits for a client.

    SIGTERM, SIGINT    no new requests; those that run have ``grace_seconds``; the second time the process ends at once
    a rank that dies   a collective of the step fails: clients get their last event, and the server ends with status 1
"""

import os
import select
import signal
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import torch.distributed

from megatron_omni.checkpoint.commit import MANIFEST
from megatron_omni.data.index import tokenizer_digest
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.foreign import read_bytes
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.request import Event, PromptEvent, TokenEvent
from megatron_omni.serve.link import Drained, Draining, Failed, Happened, ModelFacts, Ready, Refused, tell
from megatron_omni.serve.replicas import Command, NoEngine, Replicas

IDLE_SECONDS = 1.0
TORCH_DISTRIBUTED = Path(torch.distributed.__file__).parent
ENGINE_ENDED = "the model has ended; the server ends with it and has to be started again"


class SpeakerEnded(RuntimeError):
    """The process that makes sound has ended, and said why."""


class Leader:
    """Feeds the engines from one connection until HTTP says that the last client has gone."""

    def __init__(
        self, engines: Replicas | NoEngine, tokenizer: Tokenizer | None, http: Connection, *, grace_seconds: float
    ) -> None:
        self._engines, self._tokenizer, self._http, self._grace_seconds = engines, tokenizer, http, grace_seconds
        self._come = select.poll()
        self._come.register(http.fileno(), select.POLLIN)
        self._signals = 0
        self._told_to_drain = self._drained = False

    def run(self) -> None:
        """Serve. An exception is the end of the engine, and clients have been told."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        tell(self._http, Ready())
        try:
            while not self._drained:
                commands = self._read(IDLE_SECONDS if not self._engines.busy else 0.0)
                if self._signals and not self._told_to_drain:
                    self._told_to_drain = True
                    tell(self._http, Draining(self._grace_seconds))
                self._turn(commands)
        except BaseException:
            self._say_failed()
            with suppress(RuntimeError):  # of a message to ranks that have gone; the first cause counts
                self._engines.close(failed=True)
            raise
        self._engines.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)

    def _read(self, seconds: float) -> list[Command]:
        """What HTTP has sent."""
        commands: list[Command] = []
        while self._come.poll(seconds * 1000):  # Connection.poll() makes a selector each time
            try:
                message = self._http.recv()
            except EOFError:
                raise RuntimeError("the process that speaks HTTP has ended") from None
            seconds = 0.0
            if isinstance(message, Drained) and message.speaker_failed:
                raise SpeakerEnded(message.speaker_failed)
            if isinstance(message, Drained):
                self._drained = True
            else:
                commands.append(message)
        return commands

    def _turn(self, commands: Sequence[Command]) -> None:
        busy, start = self._engines.busy or bool(commands), time.perf_counter()
        turn = self._engines.turn(commands)
        for name, message in turn.refused:
            tell(self._http, Refused(name, message))
        tell(
            self._http,
            Happened(
                events=turn.events,
                token_bytes=self._bytes_of(turn.events),
                state=turn.state,
                steps=turn.steps,
                step_seconds=time.perf_counter() - start if busy else None,
            ),
        )

    def _bytes_of(self, events: Sequence[Event]) -> dict[int, bytes]:
        if self._tokenizer is None:
            return {}
        return {token: self._tokenizer.token_bytes(token) for token in set(_tokens_to_name(events))}

    def _say_failed(self) -> None:
        try:
            tell(self._http, Failed(ENGINE_ENDED))
        except OSError:  # HTTP has gone first
            return


def _tokens_to_name(events: Iterable[Event]) -> Iterable[int]:
    """Ids whose log-probabilities a client will read."""
    for event in events:
        match event:
            case TokenEvent() if event.logprob is not None:
                yield event.id
                yield from (token for token, _ in event.top)
            case PromptEvent():
                yield from (token for alternatives in event.top for token, _ in alternatives)


def lost_rank(error: BaseException) -> str | None:
    """What to say of an error that comes out of a message between ranks; None for any other."""
    frames = traceback.extract_tb(error.__traceback__)
    if not (isinstance(error, RuntimeError) and frames and TORCH_DISTRIBUTED in Path(frames[-1].filename).parents):
        return None
    first_line = str(error).partition("\n")[0][:200]
    return f"a rank of the model has ended or cannot be reached ({first_line}); start the server again"


def facts_of(checkpoint: Checkpoint, name: str) -> ModelFacts:
    """What clients may know of a checkpoint."""
    model, directory = checkpoint.recipe.model, checkpoint.directory
    manifest = directory / MANIFEST
    digest = sha256(read_bytes(manifest)).hexdigest()[:8] if manifest.is_file() else "unhashed"
    seen = ("image", "video") if model.vision is not None else ()
    heard = ("audio",) if model.audio is not None else ()
    return ModelFacts(
        name=name,
        created=int(directory.stat().st_mtime),
        fingerprint=f"{directory.name}-{digest}",
        seq_length=checkpoint.recipe.data.seq_length,
        vocab_size=checkpoint.builder.tokenizer.vocab_size,
        input_modalities=("text", *seen, *heard),
        tokenizer=tokenizer_digest(checkpoint.builder.tokenizer.path),
    )


def facts_of_speaker(directory: Path, name: str) -> ModelFacts:
    """The same of a speech generator that is served alone."""
    return ModelFacts(
        name=name,
        created=int(directory.stat().st_mtime),
        fingerprint=directory.name,
        seq_length=0,
        vocab_size=0,
        input_modalities=("text",),
        output_modalities=("audio",),
    )


def start_engine(checkpoint: Checkpoint, limits: EngineLimits) -> Engine:
    """This replica's engine with the checkpoint's weights; all ranks call this together. What draws is in a process of its own."""
    model = checkpoint.load_model()
    model.image = None
    return Engine(model, tokenizer=checkpoint.builder.tokenizer, pg=checkpoint.pg, limits=limits)
