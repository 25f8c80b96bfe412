"""What a request may say of pictures: fields of chat completions, and the bodies of ``/v1/images``."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_omni.config.buckets import Size
from megatron_omni.generation.picture import MOST_GUIDANCE, MOST_STEPS, parse_size
from megatron_omni.serve.strict import Model, refuse

LONGEST_PROMPT = 32_000
"""Characters of the words for a picture."""
MOST_PICTURES = 8
"""Of one request."""
_UNSUPPORTED = "leave it out"


class PictureFields(Model):
    """How pictures are to be drawn; absent: as the model's recipe says."""

    size: str = Field(default="auto", max_length=32)
    """``WIDTHxHEIGHT``, of which the nearest size of the model is drawn; auto: the source's aspect, or a square."""
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    guidance: float | None = Field(default=None, ge=0.0, le=MOST_GUIDANCE)
    """By the words; 1 is none."""
    image_guidance: float | None = Field(default=None, ge=0.0, le=MOST_GUIDANCE)
    """By the source picture."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        try:
            _ = self.pixels
        except ValueError as error:
            refuse("size", str(error).removeprefix("size "))
        return self

    @property
    def pixels(self) -> Size | None:
        """``size`` as (width, height)."""
        return None if self.size == "auto" else parse_size(self.size)


class PictureUrl(Model):
    """Where a picture is."""

    url: str


class _ImageRequest(PictureFields):
    """What both paths of pictures take."""

    refused: ClassVar[Mapping[str, str]] = {
        "mask": "the whole picture is drawn anew: say in words what is to change", "partial_images": _UNSUPPORTED,
        "style": "describe it in the prompt", "input_fidelity": "say image_guidance instead",
    }  # fmt: skip

    model: str | None = Field(default=None, max_length=256)
    """null: the one that is served."""
    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    n: int = Field(default=1, ge=1, le=MOST_PICTURES)
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto"] = "auto"
    """The steps say it."""
    moderation: Literal["auto", "low"] = "auto"
    stream: Literal[False] = False
    user: str | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if not self.prompt.strip():
            refuse("prompt", "is white space: write what is to be drawn")
        return self


class ImageRequest(_ImageRequest):
    """Body of ``POST /v1/images/generations``."""


class EditRequest(_ImageRequest):
    """Body of ``POST /v1/images/edits`` as JSON; a form has the files in ``image``."""

    images: list[PictureUrl] = Field(min_length=1, max_length=16)
    """The last of them is changed; those before it are shown."""
