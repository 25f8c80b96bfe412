"""What the process that speaks HTTP and the one that draws say to each other, over a socket pair of their own.

    HTTP -> painter    Paint for each picture, Forget for those of an answer that nobody waits for
    painter -> HTTP    PainterReady, then Painted for each Paint that was not forgotten; MakerFailed (maker.py)

Hidden states and source pictures go as bytes and pictures come as PNG files, so that the process that speaks HTTP needs neither
torch nor numpy. The end of either process ends the other's connection.
"""

from dataclasses import dataclass

from megatron_omni.config.buckets import Size

PICTURES_OF_A_SAMPLE = 4
"""Most pictures of an answer; as on the command line, a picture's noise is named by this times the sample plus its number."""


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """What a builder says of the pictures of an answer."""

    size: Size
    pixels: bytes | None
    """[3, height, width] uint8 of the source."""
    note: str
    """That the size is another than was asked for."""
    prompt: str
    """Text of the question."""


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Of a request; None: as the model's recipe says."""

    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Paint:
    """Draw a picture of an answer."""

    name: str
    """Of the request."""
    sample: int
    number: int
    hidden: bytes
    vision: bytes
    source: PictureSource
    options: PictureOptions


@dataclass(frozen=True)
class Forget:
    """Nobody waits for the pictures of this request any more."""

    name: str


@dataclass(frozen=True, kw_only=True)
class PainterReady:
    """Pictures are drawn from now on."""

    fingerprint: str
    """Of the codec of pictures."""


@dataclass(frozen=True, kw_only=True)
class Painted:
    """A picture as a PNG file, or why there is none."""

    name: str
    sample: int
    number: int
    data: bytes = b""
    seconds: float = 0.0
    """From Paint on."""
    error: str | None = None
    refused: bool = False
    """The error is that of the request, not of the model."""


ToPainter = Paint | Forget
