"""What a speaker tells of its utterances, in order: sound and pieces as they come, and the end."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SoundEvent:
    """Samples that follow those before them, [n] float32."""

    name: str
    wave: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PieceEvent:
    """A piece whose codes are there; its sound may follow later."""

    name: str
    number: int
    text: tuple[int, ...]
    """As the model was told it."""
    codes: tuple[int, ...]
    cut: bool
    """It had not ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpokenEvent:
    """The last event of an utterance."""

    name: str
    pieces: int
    """0: the text has no letter and no digit, and there is no sound."""
    codes: int
    samples: int
    cut: int
    """Pieces that had not ended."""
    cancelled: bool = False
    error: str | None = None
    """What went wrong; what was spoken before is there."""


SpeechEvent = SoundEvent | PieceEvent | SpokenEvent
