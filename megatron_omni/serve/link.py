"""What the process that speaks HTTP and the one that computes say to each other, over one socket pair.

    HTTP -> engine    generation.request.Request as a builder pickled it, Cancel, Pause, Resume, Drained
    engine -> HTTP    Opened, Ready, Happened (each step), Refused, Draining, Failed

The engine's side never waits for HTTP: it looks for messages between steps. Messages are pickled; both ends are processes
of this server. What the engine says is written and read by :func:`tell` and :func:`told`: one message a step, which take
the engine's process little time.
"""

import pickle
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any, Literal

from megatron_omni.config.run import Recipe
from megatron_omni.generation.request import (
    EngineState,
    Event,
    StepFacts,
    TokenEvent,
)

# ------------------------------------------------------------------------------------------------ to the engine


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this request any more."""

    name: str


@dataclass(frozen=True)
class Pause:
    """Enough of this request waits for its reader."""

    name: str


@dataclass(frozen=True)
class Resume:
    """Its reader has caught up."""

    name: str


@dataclass(frozen=True)
class Drained:
    """All requests have ended, or their time has: the engine may stop."""

    speaker_failed: str = ""
    """Why, where it is that the speaker has ended."""


# ------------------------------------------------------------------------------------------------ from the engine


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What clients may know of a checkpoint."""

    name: str
    created: int
    """Seconds since 1970."""
    fingerprint: str
    seq_length: int
    """Most tokens of prompt and answer together."""
    vocab_size: int
    input_modalities: tuple[Literal["text", "image", "audio", "video"], ...]
    output_modalities: tuple[Literal["text", "audio", "image"], ...] = ("text",)
    """Of the model itself; a speaker beside it adds sound."""
    tokenizer: str = ""
    """SHA-256: a speaker takes its tokens as they are."""


@dataclass(frozen=True)
class Opened:
    """The checkpoint was found; its weights are being loaded. Builders can start."""

    facts: ModelFacts
    recipe: Recipe | None
    """None: no prompt is made, the server only speaks."""


@dataclass(frozen=True)
class Ready:
    """Requests are taken."""


@dataclass(frozen=True, kw_only=True)
class Happened:
    """The events of a step, and the state after it. Sent every second without work, too: the sign of life."""

    events: list[Event]
    token_bytes: dict[int, bytes] = field(default_factory=dict)
    """Of every token that an event gives a log-probability of."""
    state: EngineState
    steps: tuple[StepFacts, ...] = ()
    """Of each replica that computed something."""
    step_seconds: float | None = None


@dataclass(frozen=True)
class Refused:
    """The engine cannot take this request; ``message`` is for the client."""

    name: str
    message: str


@dataclass(frozen=True)
class Draining:
    """A signal asked the server to stop: running requests have so many seconds."""

    grace_seconds: float


@dataclass(frozen=True)
class Failed:
    """The engine has ended; ``message`` is for the clients."""

    message: str


FromEngine = Opened | Ready | Happened | Refused | Draining | Failed


# ------------------------------------------------------------------------------------------------ as bytes

_NAMES = {kind: [field.name for field in fields(kind)] for kind in (EngineState, StepFacts)}
_values_of = {kind: attrgetter(*names) for kind, names in _NAMES.items()}


def tell(connection: Connection, message: FromEngine) -> None:
    """Send it. What comes in every step goes as plain tuples: with 32 tokens a tenth of the time of a pickled dataclass."""
    plain: Any = message
    if isinstance(message, Happened):
        events = [tuple(e) if isinstance(e, TokenEvent) else e for e in message.events]
        steps = [_values_of[StepFacts](step) for step in message.steps]
        state = _values_of[EngineState](message.state)
        plain = (events, message.token_bytes, state, steps, message.step_seconds)
    connection.send_bytes(pickle.dumps(plain, protocol=pickle.HIGHEST_PROTOCOL))


def told(connection: Connection) -> FromEngine:
    """The next message; waits for it. EOFError where the other end is closed."""
    plain: Any = connection.recv()
    if not isinstance(plain, tuple):
        return plain
    events, token_bytes, state, steps, step_seconds = plain
    return Happened(
        events=[TokenEvent._make(e) if isinstance(e, tuple) else e for e in events],
        token_bytes=token_bytes,
        state=EngineState(**dict(zip(_NAMES[EngineState], state, strict=True))),
        steps=tuple(StepFacts(**dict(zip(_NAMES[StepFacts], step, strict=True))) for step in steps),
        step_seconds=step_seconds,
    )
