"""The codec as the training loop's model: what Megatron asks of one, around :class:`Codec`.

Parameters and buffers are ``codec.encoder.*``, ``codec.decoder.*``, ``codec.codebook.*`` and, in adversarial training,
``discriminators.*``. Every rank has all of it: data
parallelism alone.
"""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.codec import Codec, CodecOutput
from megatron_omni.models.generators.discriminators import Discriminators
from megatron_omni.platform.device import accelerator_present
from megatron_omni.platform.seeds import named_generator


class TrunklessModel(MegatronModule):
    """A model without a language trunk, whole on every rank."""

    share_embeddings_and_output_weights = False

    def __init__(self, recipe: Recipe, *, width: int) -> None:
        super().__init__(_megatron_config(recipe, width))
        self.model_type = ModelType.encoder_or_decoder

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron hands over what the previous pipeline stage gave: there is none."""


class CodecModel(TrunklessModel):
    """A codec in training."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.model.codec is not None
        super().__init__(recipe, width=recipe.model.codec.hidden_size)
        self.seed = recipe.seed
        self.codec = Codec(recipe.model.codec)
        self.codec.draw_weights(lambda name: named_generator(recipe.seed, name), prefix="codec.")
        self.discriminators: Discriminators | None = None
        if recipe.codec.adversarial_weight > 0:
            self.discriminators = Discriminators(recipe.codec.adversarial_fft_sizes)
            self.discriminators.draw_weights(lambda name: named_generator(recipe.seed, name), prefix="discriminators.")

    def forward(self, wave: Tensor, *, row: int = 0, quantise: bool = True) -> CodecOutput:
        """``wave`` [B, T] through the codec; see :meth:`Codec.forward`."""
        output: CodecOutput = self.codec(wave, row=row, quantise=quantise)
        return output


def _megatron_config(recipe: Recipe, width: int) -> TransformerConfig:
    """What Megatron's wrapper, optimizer and schedule read; there is no transformer layer."""
    return TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        use_cpu_initialization=not accelerator_present(),
        calculate_per_token_loss=True,  # gradients are summed over data parallel ranks (parallel/wrap.py)
        deterministic_mode=recipe.deterministic_mode,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        cuda_graph_modules=[],
    )
