"""The engine's side of a server, on rank 0: requests from HTTP into the engine, its events back, a step at a time.

Between two steps the messages that have come are read; without work the loop waits for one, at most a second, and then
takes an empty step, which tells the other ranks and HTTP that it lives. Nothing here waits for a client.

    SIGTERM, SIGINT    no new requests; those that run have ``grace_seconds``; the second time the process ends at once
    a rank that dies   a collective of the step fails: clients get their last event, and the server ends with status 1
"""

import os
import signal
import time
import traceback
from collections.abc import Iterable
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import torch.distributed

from megatron_omni.checkpoint.commit import MANIFEST
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.foreign import read_bytes
from megatron_omni.generation.engine import Engine, EngineLimits
from megatron_omni.generation.load import Checkpoint
from megatron_omni.generation.request import Event, PromptEvent, Request, RequestEngine, TokenEvent
from megatron_omni.serve.link import Cancel, Drained, Draining, Failed, Happened, ModelFacts, Ready, Refused

IDLE_SECONDS = 1.0
TORCH_DISTRIBUTED = Path(torch.distributed.__file__).parent
ENGINE_ENDED = "the model has ended; the server ends with it and has to be started again"


class Leader:
    """Feeds one engine from one connection until HTTP says that the last client has gone."""

    def __init__(self, engine: RequestEngine, tokenizer: Tokenizer, http: Connection, *, grace_seconds: float) -> None:
        self._engine, self._tokenizer, self._http, self._grace_seconds = engine, tokenizer, http, grace_seconds
        self._signals = 0
        self._told_to_drain = self._drained = False

    def run(self) -> None:
        """Serve. An exception is the end of the engine, and clients have been told."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._http.send(Ready())
        try:
            while not self._drained:
                self._read(IDLE_SECONDS if not self._engine.busy else 0.0)
                if self._signals and not self._told_to_drain:
                    self._told_to_drain = True
                    self._http.send(Draining(self._grace_seconds))
                self._step()
        except BaseException:
            self._say_failed()
            raise
        self._engine.close()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)

    def _read(self, seconds: float) -> None:
        """Take what HTTP has sent."""
        while self._http.poll(seconds):
            try:
                message = self._http.recv()
            except EOFError:
                raise RuntimeError("the process that speaks HTTP has ended") from None
            seconds = 0.0
            match message:
                case Request():
                    try:
                        self._engine.submit(message)
                    except ValueError as error:
                        self._http.send(Refused(message.name, str(error)))
                case Cancel():
                    self._engine.cancel(message.name)
                case Drained():
                    self._drained = True

    def _step(self) -> None:
        busy, start = self._engine.busy, time.perf_counter()
        events = self._engine.step()
        self._http.send(
            Happened(
                events=events,
                token_bytes={token: self._tokenizer.token_bytes(token) for token in set(_tokens_to_name(events))},
                state=self._engine.state(),
                step_seconds=time.perf_counter() - start if busy else None,
            )
        )

    def _say_failed(self) -> None:
        try:
            self._http.send(Failed(ENGINE_ENDED))
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
    )


def start_engine(checkpoint: Checkpoint, limits: EngineLimits) -> Engine:
    """The engine with the checkpoint's weights; all ranks call this together. ValueError for more than one replica."""
    ranks, of_replica = torch.distributed.get_world_size(), checkpoint.pg.mp.size()
    if ranks != of_replica:
        raise ValueError(
            f"{ranks} ranks, but the model takes {of_replica} with these parallel sizes: a server is one replica of the "
            f"model; start {of_replica} ranks (and more servers behind a load balancer), or raise the sizes"
        )
    return Engine(checkpoint.load_model(), tokenizer=checkpoint.builder.tokenizer, pg=checkpoint.pg, limits=limits)
