"""The picture generator without a language model: what is trained on hidden rows from disk, or on teachers' embeddings.

Parameters are ``image.*``, as in the whole model, so that either loads the other's checkpoints. Every rank has all of it:
data parallelism alone.
"""

from collections.abc import Collection
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_omni.batch import OmniBatch
from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.image import ImageGenerator
from megatron_omni.platform.device import accelerator_present
from megatron_omni.platform.seeds import named_generator


class GeneratorModel(MegatronModule):
    """``image.*`` alone."""

    share_embeddings_and_output_weights = False
    pre_process = post_process = True

    def __init__(self, recipe: Recipe, *, projectors: bool, drawn: bool = True) -> None:
        """Without ``projectors`` it learns from teachers alone; ``drawn``: see :func:`megatron_omni.models.build.build_model`."""
        model = recipe.model
        assert model.image is not None
        super().__init__(_megatron_config(recipe))
        self.model_type = ModelType.encoder_or_decoder
        self.seed = recipe.seed
        self.image = ImageGenerator(
            model.image,
            model.hidden_size,
            visual=model.vision is not None,
            projectors=projectors,
            overlap=recipe.parallel.overlap_grad_reduce,
        )
        self.image.dit.recompute = recipe.parallel.recompute == "full"
        if drawn:
            self.draw_inputs()

    def draw_inputs(self, only: Collection[str] | None = None) -> None:
        """Initial values of every parameter, or of those called as in ``only``: those of the whole model."""
        self.image.draw_weights(lambda name: named_generator(self.seed, "weights", name), prefix="image.", only=only)

    def forward(self, batch: OmniBatch, **_: Any) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """What :meth:`OmniModel.forward` gives with ``drawn``: a loss of zeros [B, S], hidden rows [G, T, H] and the rows of
        each source, those that ``batch.drawn`` has (G is 0 without them)."""
        assert self.image.config is not None
        loss = torch.zeros(batch.labels.shape, device=batch.labels.device)
        drawn = batch.drawn
        if drawn is None or drawn.hidden is None:
            hidden = loss.new_zeros(0, len(self.image.config.block), self.image.hidden_size)
            return loss, hidden, [] if drawn is None else drawn.vision
        return loss, drawn.hidden, drawn.vision

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron hands over what the previous pipeline stage gave: there is none."""


def _megatron_config(recipe: Recipe) -> TransformerConfig:
    """What Megatron's wrapper, optimizer and schedule read; there is no transformer layer of its kind."""
    dtype = torch.bfloat16 if recipe.optim.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=1,
        hidden_size=recipe.model.hidden_size,
        num_attention_heads=1,
        use_cpu_initialization=not accelerator_present(),
        calculate_per_token_loss=True,  # gradients are summed over data parallel ranks (parallel/wrap.py)
        deterministic_mode=recipe.deterministic_mode,
        bf16=recipe.optim.precision == "bf16",
        params_dtype=torch.float32,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        gradient_accumulation_fusion=False,
        cuda_graph_modules=[],
    )
