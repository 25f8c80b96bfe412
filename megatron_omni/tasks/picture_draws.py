"""What is drawn by chance for a picture in a step of training: its time, its noise, which conditions it loses.

    step, sample, number   name the picture's own stream: nothing depends on the layout, on packing or on where a run was resumed
    branch                 c with all conditions; i without words (``drop`` of the pictures); u without words and source
                           (``drop_source`` of those): the branches of guidance (models/generators/flow.py)

Of a held-out set every evaluation draws the same, and no condition is lost.

Shapes: C channels of [h, w] latents, N vision rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.drawn import Drawn
from megatron_omni.models.generators.flow import Branch, draw_times, selection_noise
from megatron_omni.models.generators.vae import PictureCodec
from megatron_omni.platform.seeds import named_generator
from megatron_omni.training.task import StepInfo


@dataclass(frozen=True, kw_only=True)
class PictureDraw:
    """Of one picture, on the CPU."""

    branch: Branch
    time: Tensor
    """[] fp32."""
    noise: Tensor
    """[C, h, w] fp32: where its path begins."""
    blank: Tensor | None
    """[C, h, w]: in the place of its source, in branch u."""


def draw_picture(
    config: GenerativeConfig, shape: Sequence[int], *, seed: int, info: StepInfo, sample: int, number: int
) -> PictureDraw:
    """What chance says of picture ``number`` of ``sample`` whose latents have this ``shape``."""
    generator = _stream(seed, "flow", info, sample, number)
    loses, loses_all = torch.rand(2, generator=generator).tolist()
    time = draw_times(config, generator, 1)[0]
    noise = torch.randn(*shape, generator=generator)
    branch: Branch = "c"
    if info.training and loses < config.drop:
        branch = "u" if loses_all < config.drop_source else "i"
    blank = torch.randn(*shape, generator=generator) if branch == "u" else None
    return PictureDraw(branch=branch, time=time, noise=noise, blank=blank)


def draw_selection(num_layers: int, num_rows: int, *, seed: int, info: StepInfo, sample: int, number: int) -> Tensor:
    """[layers, N] Gumbel noise of the choice of vision rows."""
    return selection_noise(_stream(seed, "selection", info, sample, number), num_layers, num_rows)


def _stream(seed: int, what: str, info: StepInfo, sample: int, number: int) -> torch.Generator:
    if info.training:
        return named_generator(seed, what, info.step, sample, number)
    return named_generator(seed, what, "held out", info.held_out, sample, number)


def latents_of(
    pictures: Sequence[Tensor | None], codec_on: Callable[[torch.device], PictureCodec], *, channels: int
) -> list[Tensor | None]:
    """fp32 latents [C, h, w] of targets or sources that are latents or pixels: pixels of one size go through the codec together,
    which is asked for where there are any. ValueError for latents of other ``channels``."""
    found = [None if p is None or p.dtype == torch.uint8 else p.float() for p in pictures]
    for latents in found:
        if latents is not None and latents.shape[0] != channels:
            raise ValueError(
                f"latents of shape {list(latents.shape)}: the generator has model.image.dit.latent_channels={channels}; they "
                "are of another codec of pictures"
            )
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        if picture is not None and picture.dtype == torch.uint8:
            sizes.setdefault(tuple(picture.shape), []).append(number)
    for numbers in sizes.values():
        stacked = torch.stack([pictures[number] for number in numbers])  # type: ignore[misc]
        for number, latents in zip(numbers, codec_on(stacked.device).encode(stacked)):
            found[number] = latents
    return found


def white(shape: Sequence[int], codec: PictureCodec, device: torch.device) -> Tensor:
    """Latents [C, h, w] of a white picture of the size of latents of this ``shape``."""
    side = codec.downsampling
    pixels = torch.full((1, 3, shape[1] * side, shape[2] * side), 255, dtype=torch.uint8, device=device)
    return codec.encode(pixels)[0]


def owners_of(drawn: Drawn) -> list[tuple[int, int]]:
    """(sample, number) of each picture; the host waits for the device, once."""
    return [(int(sample), int(number)) for sample, number in torch.stack([drawn.sample_ids, drawn.numbers], 1).tolist()]
