"""Pictures out of hidden states: conditions, Euler steps under guidance, the codec of pictures (docs/images_out.md, Drawing).

    conditions   projectors of the block's hidden states and of the vision encoder's rows of the source
    x0           noise named by (seed, "draw", name, number of the picture), on the CPU
    latents      Euler steps from x0 under three-branch guidance (models/generators/sampling.py)
    pixels       the codec's decoder, uint8

A picture is a function of what it is asked for: of its hidden states, source, size, settings, name and number, not of what is
drawn beside it. On a CPU that holds to the last bit: pictures share steps of the DiT, whose bits do not depend on the batch, and go
through projectors and codec one by one.

Shapes: T tokens of a block, H width of the language model, n vision rows, C channels of [h, w] latents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_omni.config.buckets import Size
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.generation.picture import PictureSettings
from megatron_omni.models.generators.flow import Branch, Guidance, selection_noise
from megatron_omni.models.generators.image import Conditions, ImageGenerator
from megatron_omni.models.generators.sampling import BranchConditions, sample
from megatron_omni.platform.seeds import named_generator

if TYPE_CHECKING:
    from megatron_omni.models.generators.vae import PictureCodec

Steps = Callable[[int], None]
"""Hears of each step that the pictures of one batch have done, from 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture to be drawn, from a language model's ``hidden`` states or from ``teachers``."""

    name: str = ""
    """Of the request or record: names the noise, with ``number``."""
    number: int = 0
    size: Size
    """(width, height) in pixels, one of the model's (config/buckets.py)."""
    settings: PictureSettings
    hidden: Tensor | None = None
    """[T, H] at the block."""
    vision: Tensor | None = None
    """[n, H] of the vision encoder for the source."""
    teachers: Mapping[str, Tensor] | None = None
    """``task`` [1 or 3, D], ``caption`` [R, D] and perhaps ``visual`` [N, D] in the place of both."""
    source: Tensor | None = None
    """[3, height, width] uint8 of the source picture; None: from nothing."""


@torch.no_grad()
def draw(
    image: ImageGenerator,
    codec: "PictureCodec",
    pictures: Sequence[Picture],
    *,
    batch_size: int = 8,
    on_step: Steps = lambda step: None,
) -> Iterator[tuple[int, Tensor]]:
    """(number in ``pictures``, pixels [3, H, W] uint8 on the CPU) of each, as they are done; ``batch_size`` are drawn together.

    ValueError for a size that is none of the model's, settings that cannot be, and numbers that are not finite. An exception of
    ``on_step`` ends it.
    """
    for picture in pictures:
        _check(picture, image.config)
    found = [_conditions(image, picture) for picture in pictures]
    groups: dict[object, list[int]] = {}
    for number, (picture, conditions) in enumerate(zip(pictures, found)):
        vision = conditions.vision[0]
        settings = {**vars(picture.settings), "seed": None}
        key = picture.size, *settings.values(), conditions.caption.shape[1], None if vision is None else len(vision)
        groups.setdefault(key, []).append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            latents = _latents(image, codec, [pictures[i] for i in some], [found[i] for i in some], on_step)
            for i, one in zip(some, latents):
                yield i, codec.decode(one[None], names=[pictures[i].name or f"picture {i}"])[0].cpu()


def _check(picture: Picture, config: ImageGeneratorConfig) -> None:
    width, height = picture.size
    if width % config.size_step or height % config.size_step or not (width and height):
        raise ValueError(
            f"size is {width}x{height}; the sides of this model's pictures are multiples of model.image.size_step = "
            f"{config.size_step}"
        )
    if picture.source is not None and picture.source.shape != (3, height, width):
        raise ValueError(
            f"source of shape {list(picture.source.shape)}; it must be [3, {height}, {width}]: cut it to the size"
        )
    if (picture.hidden is None) == (picture.teachers is None):
        raise ValueError("a picture is drawn from hidden states or from teachers' embeddings: give one of the two")


def _conditions(image: ImageGenerator, picture: Picture) -> Conditions:
    """Of one picture."""
    weight = image.null_caption.weight
    if picture.teachers is not None:
        rows = {name: given.to(weight.device)[None] for name, given in picture.teachers.items()}
        rows |= {f"{name}_mask": torch.ones(r.shape[:2], dtype=torch.bool, device=r.device) for name, r in rows.items()}
        rows["task"] = rows["task"].expand(-1, 3, -1)
        return image.taught(rows)
    if image.caption is None:
        raise ValueError(
            "the model has no projectors: it learned from teachers' embeddings, and draws from these alone"
        )
    assert picture.hidden is not None
    if len(picture.hidden) != len(image.config.block):
        raise ValueError(
            f"{len(picture.hidden)} hidden states; a block of this model has {len(image.config.block)} tokens"
        )
    vision = None if picture.vision is None or image.visual is None else picture.vision.to(weight)
    return image.conditions(picture.hidden.to(weight)[None], [vision])


def _latents(
    image: ImageGenerator,
    codec: "PictureCodec",
    pictures: Sequence[Picture],
    conditions: Sequence[Conditions],
    on_step: Steps,
) -> Tensor:
    """[B, C, h, w] fp32 of pictures of one size and one kind of settings."""
    config, settings, device = image.config, pictures[0].settings, image.null_caption.weight.device
    width, height = pictures[0].size
    shape = config.dit.latent_channels, height // config.downsampling, width // config.downsampling
    x0 = torch.stack([_noise(picture, shape) for picture in pictures]).to(device)
    blank = None
    if config.blank_source == "white" and any(picture.source is None for picture in pictures):
        blank = codec.encode(torch.full((1, 3, height, width), 255, dtype=torch.uint8, device=device))[0]
    sources = []
    for picture, noise in zip(pictures, x0):
        if picture.source is not None:
            name = picture.name or "the source picture"
            sources.append(codec.encode(picture.source[None].to(device), names=[name])[0])
        else:
            sources.append(torch.zeros_like(noise) if blank is None else blank)
    source = torch.stack(sources).to(x0)
    guidance = Guidance(text=settings.text_guidance, image=settings.image_guidance, channels=settings.guided_channels)
    branches: dict[Branch, BranchConditions] = {}
    for branch in guidance.branches:
        inputs = [one.inputs([0], branch) for one in conditions]
        joined = {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}
        branches[branch] = BranchConditions(source=x0 if branch == "u" else source, **joined)
    return sample(
        image.dit,
        x0,
        branches,
        steps=settings.steps,
        guidance=guidance,
        shift=settings.shift,
        noise=_selection(config, pictures, next(iter(branches.values())).vision.shape[1], device),
        # The published code scales the scores of self-attention by the number of tokens (PixWizard's proportional attention).
        base_tokens=(config.base_size // config.latent_step) ** 2 if config.release else 0,
        on_step=on_step,
    )


def _noise(picture: Picture, shape: tuple[int, ...]) -> Tensor:
    generator = named_generator(picture.settings.seed, "draw", picture.name, picture.number)
    return torch.randn(shape, generator=generator)


def _selection(
    config: ImageGeneratorConfig, pictures: Sequence[Picture], num_rows: int, device: torch.device
) -> Tensor | None:
    """[B, layers, n] noise of the choice of vision rows, where the model draws with it."""
    if not config.dit.noisy_selection:
        return None
    streams = [named_generator(p.settings.seed, "selection", p.name, p.number) for p in pictures]
    return torch.stack([selection_noise(stream, config.dit.num_layers, num_rows) for stream in streams]).to(device)
