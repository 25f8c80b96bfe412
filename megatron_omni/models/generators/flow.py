"""Flow matching: from noise to latents along straight lines (rectified flow; docs/images_out.md).

    x_t = t x1 + (1 - t) x0        x0 ~ N(0, 1),  x1 data: t = 1 IS DATA, t = 0 noise
    v   = x1 - x0                  what the generator learns to say of (x_t, t)
    x  <- x + (t' - t) v(x, t)     Euler, on a grid from 0 to 1

BAGEL and diffusers count the other way (t = 1 noise, v = noise - data); a model trained so draws noise here.

Times in training are uniform, or sigmoid(N(0, 1)) (``logit_normal``), then shifted: t <- s t / (1 + (s - 1) t), PixWizard's
``shift_s``, more of them near the data where s > 1. The grid of sampling is linspace(0, 1, n + 1), shifted the other way:
t <- t / (t + s - s t), more steps near the noise. n steps are n evaluations; the release's "60 steps" are 59.

Guidance has three branches: c all conditions; i no text (null caption, the second row of the task projector); u nothing (the
third row, the initial noise in place of the source, no vision rows):

    v = v_u + s_i (v_i - v_u) + s_t (v_c - v_i)

A branch whose factor is 0 is not computed: u at s_i = 1, c at s_t = 0, i at s_t = s_i.

Sources: PixWizard's transport/ (https://github.com/AFeng-x/PixWizard) and Lumina-T2X. Shapes: B pictures of [C, h, w].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_omni.config.buckets import buckets, nearest_bucket

__all__ = [
    "Guidance", "MOST_STEPS", "buckets", "draw_times", "euler", "grid", "guided", "nearest_bucket", "path", "selection_noise",
    "shifted_times", "target",
]  # fmt: skip

Branch = Literal["c", "i", "u"]
MOST_STEPS = 1000
MOST_GUIDANCE = 1000.0
BranchVelocity = Callable[[Sequence[Branch], Tensor, Tensor], Sequence[Tensor]]
"""(branches, x [B, C, h, w], t [B]) -> one velocity [B, C, h, w] for each branch."""


class TimeConfig(Protocol):
    """What :func:`draw_times` reads of a recipe."""

    time: Literal["uniform", "logit_normal"]
    shift: float


def path(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """x_t of data ``x1`` and noise ``x0`` [B, ...] at times ``t`` [B]."""
    t = t.reshape(-1, *[1] * (x1.ndim - 1)).to(x1.dtype)
    return t * x1 + (1 - t) * x0


def target(x1: Tensor, x0: Tensor) -> Tensor:
    """v: what is learned."""
    return x1 - x0


def draw_times(config: TimeConfig, generator: torch.Generator, n: int) -> Tensor:
    """``n`` times in [0, 1], fp32, by a CPU ``generator``."""
    normal = config.time == "logit_normal"
    t = torch.randn(n, generator=generator).sigmoid() if normal else torch.rand(n, generator=generator)
    return shifted_times(t, config.shift)


def shifted_times(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): times of training; ``shift`` 1 changes nothing, bit for bit."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def selection_noise(generator: torch.Generator, num_layers: int, num_tokens: int) -> Tensor:
    """Gumbel noise [layers, N] of one picture for the choice of vision tokens (``DiT.forward(noise=)``)."""
    uniform = torch.rand(num_layers, num_tokens, generator=generator).clamp_(1e-20, 1 - 1e-7)
    return -(-uniform.log()).log()


# ------------------------------------------------------------------------------------------------------------ sampling


def grid(steps: int, shift: float = 1.0) -> list[float]:
    """``steps`` + 1 times from 0 to 1. ValueError for 0 or more than 1000 steps, or a shift that is not positive."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps={steps}: must be 1 to {MOST_STEPS}; 20 to 60 are usual")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift}: must be a positive number; 1 spaces the steps evenly")
    even = [k / steps for k in range(steps + 1)]
    return even if shift == 1 else [t / (t + shift - shift * t) for t in even]


def euler(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    steps: int,
    shift: float = 1.0,
    *,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Data [B, C, h, w] in fp32 from noise ``x0``, by ``steps`` evaluations of ``velocity(x, t [B])``.

    ``on_step`` hears of each that is done, from 1. ValueError as :func:`grid`.
    """
    times = grid(steps, shift)
    x = x0.float()
    for k in range(steps):
        t = torch.full((x.shape[0],), times[k], device=x.device)
        x = x + (times[k + 1] - times[k]) * velocity(x, t).float()
        if on_step is not None:
            on_step(k + 1)
    return x


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How much text and source count above nothing. 1 and 1: the generator as it is, one branch."""

    text: float = 4.0
    """s_t."""
    image: float = 1.0
    """s_i."""
    channels: int = 0
    """Only the first so many latent channels are guided, the others are v_c (3: as released); 0: all."""

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("image", self.image)):
            if not 0 <= value <= MOST_GUIDANCE:
                raise ValueError(f"{name} guidance {value}: must be 0 to {MOST_GUIDANCE:g}; 1 is none")
        if self.channels < 0:
            raise ValueError(f"guided_channels={self.channels}: must be 0 (all) or a number of channels")

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Those that are needed, in the order c, i, u."""
        factors: dict[Branch, float] = {"c": self.text, "i": self.image - self.text, "u": 1 - self.image}
        return tuple(name for name, factor in factors.items() if factor or (name == "c" and self.channels))

    def combine(self, velocities: Mapping[Branch, Tensor]) -> Tensor:
        """v of the velocities [B, C, h, w] of at least ``branches``; what is not needed is not read."""
        found = {name: velocities[name] for name in self.branches}
        if "i" in found:
            v = found["i"]
            if "u" in found:
                v = found["u"] + self.image * (v - found["u"])
            if "c" in found and self.text:
                v = v + self.text * (found["c"] - found["i"])
        elif "u" in found:  # s_t = s_i: v_i cancels
            v = found["u"] + self.text * (found["c"] - found["u"]) if self.text else found["u"]
        else:
            v = found["c"]
        if self.channels and v is not found["c"]:
            v = torch.cat([v[:, : self.channels], found["c"][:, self.channels :]], dim=1)
        return v


def guided(velocity: BranchVelocity, guidance: Guidance) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity for :func:`euler` out of one that answers for branches; it is asked for those alone that count."""
    names = guidance.branches

    def combined(x: Tensor, t: Tensor) -> Tensor:
        return guidance.combine(dict(zip(names, velocity(names, x, t), strict=True)))

    return combined
