"""What the process that speaks HTTP asks of its builders, and what they say. No torch."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_omni.config.buckets import Size
from megatron_omni.serve.picture_link import PictureSource

Kind = Literal["image", "audio", "video"]


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A picture, sound or video as it came: its encoded bytes, and where in the request they stood."""

    kind: Kind
    param: str
    data: bytes


Turn = tuple[str, tuple[str | Medium, ...]]
"""Role, and text and media in their order."""


@dataclass(frozen=True, kw_only=True)
class PicturesWanted:
    """Of an answer by a model that draws."""

    where: Literal["first", "chosen"] | None
    """The answer begins with a picture, or has some as the model decides; None: it has none."""
    most: int = 1
    size: Size | None = None
    """None: that of the source's aspect, or a square."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt to be made: ``turns`` of a conversation, or a text or its ids to be continued."""

    name: str
    turns: tuple[Turn, ...] = ()
    separator: str = ""
    """Between a medium and a text without white space there."""
    think: bool | None = None
    """Of a conversation: ask for a thought, or begin the answer behind an empty one; None: as the recipe asks."""
    voice: str | None = None
    """Of a conversation: ask for an answer that is spoken in this voice."""
    pictures: PicturesWanted | None = None
    """Of a conversation with a model that draws."""
    text: str | tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    """None: what there is room for, up to ``default_new_tokens``."""
    default_new_tokens: int | None = None
    fields: dict[str, Any] | None = None
    """The other fields of the engine's request, those of its sampling under ``sampling``; None where only the tokens
    are wanted."""

    @property
    def param(self) -> str:
        """The field of the client's request that holds the prompt."""
        return "messages" if self.turns else "prompt"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A prompt that was made."""

    tokens: dict[str, int]
    """By modality."""
    max_new_tokens: int = 0
    ids: tuple[int, ...] | None = None
    """Of the tokens, where a text was to be continued or only they were asked for."""
    decoding: tuple[tuple[Kind, float], ...] = ()
    """Of each medium the seconds that its decoder took."""
    token_bytes: dict[int, bytes] | None = None
    """Of these tokens: joined in their order they are the text."""
    picture: PictureSource | None = None
    """Where the answer may have pictures."""

    @property
    def num_tokens(self) -> int:
        """Of the whole prompt."""
        return sum(self.tokens.values())


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A prompt that cannot be made; the fields of an ApiError."""

    status: int
    message: str
    param: str | None
    code: str | None
