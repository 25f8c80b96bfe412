"""What the process that speaks HTTP and the one that computes say to each other, over one socket pair.

    HTTP -> engine    generation.request.Request as a builder pickled it, Cancel, Pause, Resume, Drained
    engine -> HTTP    Opened, Ready, Happened (each step), Refused, Draining, Failed

The engine's side never waits for HTTP: it looks for messages between steps. Messages are pickled by
multiprocessing.connection; both ends are processes of this server.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_omni.config.run import Recipe
from megatron_omni.generation.request import (
    Alternatives,
    EngineState,
    Event,
    FinishedEvent,
    PromptEvent,
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


@dataclass(frozen=True)
class Opened:
    """The checkpoint was found; its weights are being loaded. Builders can start."""

    facts: ModelFacts
    recipe: Recipe


@dataclass(frozen=True)
class Ready:
    """Requests are taken."""


PackedToken = tuple[str, int, int, float | None, Alternatives, str, str, bool]
Packed = PackedToken | PromptEvent | FinishedEvent


def packed(events: Iterable[Event]) -> list[Packed]:
    """Events as they are sent: a token's as a plain tuple, which takes a tenth of the time to pickle."""
    return [
        (e.name, e.sample, e.id, e.logprob, e.top, e.text, e.reasoning, e.is_end) if isinstance(e, TokenEvent) else e
        for e in events
    ]


def unpacked(events: Iterable[Packed]) -> Iterator[Event]:
    """The events that :func:`packed` made this of."""
    for e in events:
        if not isinstance(e, tuple):
            yield e
            continue
        name, sample, token, logprob, top, text, reasoning, is_end = e
        yield TokenEvent(
            name=name, sample=sample, id=token, logprob=logprob, top=top, text=text, reasoning=reasoning, is_end=is_end
        )


@dataclass(frozen=True, kw_only=True)
class Happened:
    """The events of a step, and the state after it. Sent every second without work, too: the sign of life."""

    events: list[Packed]
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
