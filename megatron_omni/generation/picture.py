"""How pictures are to be drawn, and what a file says of one. No torch."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from megatron_omni.config.buckets import Size, buckets, nearest_bucket
from megatron_omni.config.pictures import ImageGeneratorConfig, SamplingConfig
from megatron_omni.generation.request import MAX_BLOCKS

Begin = Literal["block", "model", "record"]
MOST_STEPS, MOST_GUIDANCE, MOST_SHIFT = 1000, 100.0, 1000.0
LONGEST_SIDE = 100_000
_SIZE = re.compile(r"(\d{1,6})[xX](\d{1,6})")


@dataclass(frozen=True, kw_only=True)
class PictureWanted:
    """How the pictures of answers are to be drawn; None: as the model's recipe says. ValueError names what cannot be."""

    size: Size | None = None
    """(width, height) in pixels, of which the nearest bucket is drawn; None: the source's aspect, or a square."""
    steps: int | None = None
    shift: float | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    seed: int = 0
    begin: Begin = "block"
    """What an answer begins with: a picture's block at once; whatever the model writes, a block in the place of its end where it
    has drawn nothing by then; or what the record's own answer has before its first picture, and then the block."""
    lead: str = ""
    """Text before a block that comes at once."""
    most: int = 4
    """Pictures of an answer."""
    vae: Path | None = None
    """Folder of the codec of pictures; None: the one that the recipe names."""

    def __post_init__(self) -> None:
        if self.size is not None and not all(1 <= side <= LONGEST_SIDE for side in self.size):
            raise ValueError(f"size is {self.size[0]}x{self.size[1]}; both sides must be 1 to {LONGEST_SIDE} pixels")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps is {self.steps}; it must be 1 to {MOST_STEPS} (20 to 60 are usual)")
        if self.shift is not None and not (isfinite(self.shift) and 0 < self.shift <= MOST_SHIFT):
            raise ValueError(
                f"shift is {self.shift:g}; it must be above 0 and at most {MOST_SHIFT:g}, 1 for even steps"
            )
        for name in ("text_guidance", "image_guidance"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and 0 <= value <= MOST_GUIDANCE):
                raise ValueError(f"{name} is {value:g}; it must be 0 to {MOST_GUIDANCE:g}, 1 for none")
        if not 1 <= self.most <= MAX_BLOCKS:
            raise ValueError(f"most is {self.most} pictures of an answer; it must be 1 to {MAX_BLOCKS}")

    def as_asked(self) -> dict[str, Any]:
        """The fields that a picture depends on, as JSON has them."""
        flat = asdict(self)
        return flat | {"size": self.size and list(self.size), "vae": self.vae and str(self.vae.absolute())}

    def settings(self, sampling: SamplingConfig) -> "PictureSettings":
        """With the recipe's where nothing is said."""

        def chosen[T](mine: T | None, its: T) -> T:
            return its if mine is None else mine

        return PictureSettings(
            steps=chosen(self.steps, sampling.steps),
            shift=chosen(self.shift, sampling.shift),
            text_guidance=chosen(self.text_guidance, sampling.text_guidance),
            image_guidance=chosen(self.image_guidance, sampling.image_guidance),
            guided_channels=sampling.guided_channels,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How one picture is drawn."""

    steps: int
    shift: float
    text_guidance: float
    image_guidance: float
    guided_channels: int
    seed: int


def parse_size(text: str, name: str = "size") -> Size:
    """``WxH`` in pixels."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or not all(int(side) for side in found.groups()):
        raise ValueError(f"{name} is {text[:40]!r}; write it as WIDTHxHEIGHT, for example 768x512")
    return int(found[1]), int(found[2])


def parse_guidance(text: str, name: str = "guidance") -> tuple[float, float | None]:
    """``a`` or ``a,b``: by the words, and by the source picture."""
    words = text.split(",")
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(map(isfinite, values)):
        raise ValueError(
            f"{name} is {text[:40]!r}; write one number, or two with a comma: that of the words, of the source"
        )
    return values[0], values[1] if len(values) > 1 else None


def drawn_size(config: ImageGeneratorConfig, wanted: Size | None, shown: Size | None) -> tuple[Size, str]:
    """The bucket that a picture is drawn at, and what is to be said of it: nothing, or that it is another than ``wanted``.

    ``shown``: size of the target or source that decides where nothing is wanted.
    """
    sizes = buckets(config.base_size, config.size_step, config.max_aspect)
    size = nearest_bucket(*(wanted or shown or (1, 1)), sizes)
    if wanted is None or size == wanted:
        return size, ""
    return size, (
        f"size {wanted[0]}x{wanted[1]} is none of this model's, which draws about {config.base_size}x{config.base_size} pixels "
        f"in steps of {config.size_step}; drawn at {size[0]}x{size[1]}"
    )


def numbered(file: str, counts: Sequence[int]) -> list[list[str]]:
    """Names of the pictures of some samples, so many each: ``file`` itself where there is one, else ``NAME_0.png``, ..."""
    if sum(counts) == 1:
        return [[file] * count for count in counts]
    path, names, number = Path(file), [], 0
    for count in counts:
        names.append([str(path.with_name(f"{path.stem}_{number + i}{path.suffix}")) for i in range(count)])
        number += count
    return names
