"""What is to be spoken, and how answers are. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_omni.generation.request import GREEDY, Sampling

Context = Literal["prefix", "none"]


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A text to speak. ValueError names what cannot be."""

    name: str
    """Names it in events; no two under way share it."""
    prompt: str | Sequence[int]
    """What asks for the voice (data/spoken.py), as text or tokens."""
    text: str | Sequence[int] = ""
    sampling: Sampling = GREEDY
    context: Context = "prefix"
    """``none``: every piece begins as if nothing had been said before it."""

    def __post_init__(self) -> None:
        if self.context not in ("prefix", "none"):
            raise ValueError(f"context is {self.context!r}; it must be 'prefix' or 'none'")


@dataclass(frozen=True, kw_only=True)
class SpeechWanted:
    """How answers are to be spoken."""

    speaker: Path
    """Checkpoint of a speech generator."""
    codec: Path | None = None
    """None: the one that it names."""
    voice: str | None = None
    style: str | None = None
    """Neither: what the model writes."""
    language: str | None = None
    context: Context = "prefix"
    release: bool | None = None
    sampling: Sampling = GREEDY

    def as_asked(self) -> dict[str, Any]:
        """The fields that a sound depends on, as JSON has them."""
        flat = asdict(self)
        return flat | {"speaker": str(self.speaker.absolute()), "codec": self.codec and str(self.codec.absolute())}
