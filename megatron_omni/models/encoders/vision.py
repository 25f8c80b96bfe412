"""SigLIP tower, MLP projector and 2D pooling: tiles [N, 3, p, p] to language rows [N, s * s, H] (paper section 2.2).

    patches [N, g * g, D] = tower(tile), g = p // patch_size      last kept layer, no post-layernorm
    tile    (x / 255 - 0.5) / 0.5 of 8-bit pixels x
    wide    [N, g * g, H] = GELU(Linear(patches))
    pooled  [N, s * s, H] = adaptive average over the g x g grid  row-major
    rows    [N, s * s, H] = Linear(pooled)

The paper pools what the second matrix gives. An average, whose weights add up to one, commutes with an affine map: these
are the same rows, for s * s / (g * g) of the work of the largest matrix (144 of 729 positions).

The tower is built from Hugging Face's SigLIP layers under its parameter names, so that a checkpoint loads by name.
"""

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from megatron_omni.config.model import VisionConfig
from megatron_omni.models.encoders.replay import run_layer
from megatron_omni.models.encoders.weights import (
    GeneratorFor,
    draw_normal,
    draw_weights,
    is_trainable,
)


class ConvStem(nn.Sequential):
    """Patch embedding for training from scratch: 3 x 3 convolutions of stride 2 down to one position a patch.

    [N, 3, p, p] to [N, D, g, g]; log2(patch_size) of them, the first D / 2 wide, the others D, GELU between. Neighbouring
    pixels share weights at every shift, which one large patch matrix has to learn from data (docs/log.md).
    """

    GAIN = 2.0
    """Factor on the usual initial kernels, N(0, 1 / fan-in): GELU halves small signals."""

    def __init__(self, config: VisionConfig) -> None:
        steps = config.patch_size.bit_length() - 1
        widths = [3, config.hidden_size // 2, *[config.hidden_size] * (steps - 1)]
        convolutions = [nn.Conv2d(a, b, kernel_size=3, stride=2, padding=1) for a, b in pairwise(widths)]
        super().__init__(*(m for c in convolutions for m in (c, nn.GELU())))
        del self[-1]

    def forward(self, input: Tensor) -> Tensor:  # the name in nn.Sequential
        # Positions first, channels last: a seventh less time on a CPU (5 pictures of 64 pixels, there and back).
        return super().forward(input.contiguous(memory_format=torch.channels_last))

    @property
    def weight(self) -> Tensor:
        """Of the last convolution: Hugging Face's embeddings ask it for their dtype."""
        return cast(nn.Conv2d, self[-1]).weight


class SiglipTower(nn.Module):
    """Embeddings and the kept layers. A plain loop: no output capturing and no second copy of the hidden states."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        siglip = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            attention_dropout=0.0,
        )
        siglip._attn_implementation = "sdpa"
        self.embeddings = SiglipVisionEmbeddings(siglip)
        if config.stem == "conv":
            self.embeddings.patch_embedding = ConvStem(config)  # type: ignore[assignment]
        self.encoder = SiglipEncoder(siglip)

    def forward(self, pixel_values: Tensor, *, recompute: bool = False) -> Tensor:
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder.layers:
            hidden = run_layer(layer, hidden, None, recompute=recompute)
        return hidden


def normalised(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


class VisionEncoder(nn.Module):
    """Tower, projector, and pooling inside it."""

    recompute = False
    """Layers are replayed in the backward (``parallel.recompute: full``); set by models/build.py."""

    def __init__(self, config: VisionConfig, out_hidden: int) -> None:
        super().__init__()
        self.config, self.out_hidden = config, out_hidden
        self.grid_side = config.image_size // config.patch_size
        self.tower = SiglipTower(config)
        self.projector = nn.Sequential(
            nn.Linear(config.hidden_size, out_hidden), nn.GELU(), nn.Linear(out_hidden, out_hidden)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, p, p], uint8 or normalised, to [N, s * s, H]."""
        return self.project(self.features(pixel_values))

    def features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, p, p] to the tower's [N, g * g, D]. A frozen one keeps nothing for the backward."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalised(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trainable(self.tower)):
            patches: Tensor = self.tower(pixel_values, recompute=self.recompute)
        return patches

    def project(self, patches: Tensor) -> Tensor:
        """[N, g * g, D] to [N, s * s, H]."""
        first, activation, second = self.projector
        wide = activation(first(patches))
        grid = wide.unflatten(1, (self.grid_side, self.grid_side)).permute(0, 3, 1, 2)  # [N, H, g, g]
        pooled = F.adaptive_avg_pool2d(grid, self.config.pooled_side)
        rows: Tensor = second(pooled.flatten(2).transpose(1, 2))
        return rows

    @property
    def rows_per_input(self) -> int:
        """s * s."""
        return self.config.pooled_side**2

    def idle_input(self) -> Tensor:
        """The smallest input, for a micro-batch without pictures: one grey tile."""
        weight = self.tower.embeddings.patch_embedding.weight
        return weight.new_zeros(1, 3, self.config.image_size, self.config.image_size)

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Weights for training from scratch; position embeddings N(0, 1 / width) as in SigLIP."""
        draw_weights(self, generator_for, prefix=prefix)
        if isinstance(stem := self.tower.embeddings.patch_embedding, ConvStem):
            with torch.no_grad():
                for kernel in stem.parameters():
                    kernel.mul_(stem.GAIN)  # biases are zero
        name = "tower.embeddings.position_embedding.weight"
        draw_normal(self.get_parameter(name), self.config.hidden_size**-0.5, generator_for(prefix + name))
