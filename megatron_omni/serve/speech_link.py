"""What the process that speaks HTTP and the one that makes sound say to each other, over a socket pair of their own.

    HTTP -> speaker    Say, then Told (more of an answer), Hold (a slow listener) and Silence for each sound
    speaker -> HTTP    SpeakerReady, then Sounded, Transcribed and, last for every sound, Spoken; MakerFailed (maker.py)

Sound comes encoded, so that the process that speaks HTTP needs neither torch nor numpy. The end of either process ends the
other's connection: HTTP then answers without sound, the speaker leaves.
"""

from dataclasses import dataclass
from typing import Any, Literal

SoundFormat = Literal["wav", "pcm", "mp3", "opus", "flac", "aac"]
MEDIA_TYPES: dict[SoundFormat, str] = {
    "wav": "audio/wav", "pcm": "audio/pcm", "mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac",
    "aac": "audio/aac",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Say:
    """Make a sound: of ``text``, or (None) of an answer whose tokens follow in :class:`Told`."""

    name: str
    form: SoundFormat
    voice: str | None
    style: str | None
    """One of the two; of an answer, where it asks for none itself."""
    text: str | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class Told:
    """More tokens of an answer; ``end``: it is whole."""

    name: str
    ids: tuple[int, ...]
    end: bool = False


@dataclass(frozen=True)
class Silence:
    """Nobody listens any more."""

    name: str


@dataclass(frozen=True)
class Hold:
    """Whether enough of this sound waits for its listener."""

    name: str
    on: bool


# ------------------------------------------------------------------------------------------------ from the speaker


@dataclass(frozen=True, kw_only=True)
class SpeakerReady:
    """Sounds are made from now on."""

    name: str
    """Of the checkpoint."""
    created: int
    voices: tuple[str, ...]
    """Empty: any name is taken."""
    sample_rate: int
    tokenizer: str
    """SHA-256 of its tokenizer."""


@dataclass(frozen=True)
class Sounded:
    """Encoded sound that follows what came before."""

    name: str
    data: bytes
    seconds: float


@dataclass(frozen=True)
class Transcribed:
    """What the sound says, as far as it is known."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """The end of a sound."""

    name: str
    seconds: float
    codes: int
    pieces: int
    cut: int
    """Pieces that did not end by themselves."""
    error: str | None = None
    """What was wrong with the request (nothing was spoken), or with the model's numbers."""


SpeechEvent = Sounded | Transcribed | Spoken
ToSpeaker = Say | Told | Silence | Hold


def as_dict(ready: SpeakerReady) -> dict[str, Any]:
    """Its entry in the list of models."""
    return {
        "id": ready.name, "object": "model", "created": ready.created, "owned_by": "megatron_omni",
        "input_modalities": ["text"], "output_modalities": ["audio"],
    }  # fmt: skip


def with_length(data: bytes) -> bytes:
    """A whole WAV file whose header of 44 bytes says how long it is."""
    size = len(data) - 44
    return data[:4] + (size + 36).to_bytes(4, "little") + data[8:40] + size.to_bytes(4, "little") + data[44:]
