"""From a recipe to Megatron's ``TransformerConfig`` and to the model of this rank."""

from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_omni.config.megatron_fields import refusal
from megatron_omni.config.parts import draws_alone
from megatron_omni.config.run import Recipe
from megatron_omni.models.init import initialize_weights
from megatron_omni.models.language import LanguageModel
from megatron_omni.models.nothing_drawn import NothingDrawn
from megatron_omni.platform.device import accelerator_present, device, gradient_accumulation_kernel

if TYPE_CHECKING:
    from megatron_omni.models.generators.codec_model import TrunklessModel
    from megatron_omni.models.generators.generator_model import GeneratorModel
    from megatron_omni.models.omni import OmniModel


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Megatron's configuration of the language trunk. ``model.megatron`` goes in last."""
    model, parallel = recipe.model, recipe.parallel
    if parallel.recompute != "none" and (model.hidden_dropout > 0 or model.attention_dropout > 0):
        raise ValueError(
            f"parallel.recompute={parallel.recompute} replays a layer without its dropout masks; set "
            "model.hidden_dropout and model.attention_dropout to 0, or parallel.recompute to none"
        )
    if model.moe is None and parallel.expert_model_parallel_size > 1:
        raise ValueError(
            f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size} with model.moe null: a dense "
            "model has no experts to distribute; set it to 1"
        )
    dtype = torch.bfloat16 if recipe.optim.precision == "bf16" else torch.float32
    on_cpu = not accelerator_present()
    settings: dict[str, Any] = {
        # Megatron's hybrid pattern counts attention and FFN as a layer each.
        "num_layers": 2 * model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "init_method_std": model.init_method_std,
        "perform_initialization": False,  # models/init.py overwrites every weight
        "use_cpu_initialization": on_cpu,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.tensor_model_parallel_size > 1,
        "variable_seq_lengths": True,
        # A work-around for old versions of PyTorch: the host waits for the device after every message of a pipeline.
        "batch_p2p_sync": False,
        # Ours is chosen by MoEConfig; Megatron's default is refused with variable lengths, dense models included.
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,  # gradients are summed over data parallel ranks (parallel/wrap.py)
        "deallocate_pipeline_outputs": True,
        "deterministic_mode": recipe.deterministic_mode,
        "bf16": recipe.optim.precision == "bf16",
        "params_dtype": torch.float32,  # Float16Module converts; drawing weights in fp32 keeps them layout-independent
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "persist_layer_norm": False,
        "cuda_graph_modules": [],  # its default asks for what it calls deprecated
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        # Weight gradients added to Megatron's fp32 buffer by the product itself, where Apex's kernel for it is installed.
        "gradient_accumulation_fusion": gradient_accumulation_kernel(),
        "bias_dropout_fusion": not on_cpu,
        "bias_activation_fusion": not on_cpu,
    }
    if parallel.fine_grained_activation_offloading:
        settings |= {"fine_grained_activation_offloading": True, "offload_modules": parallel.offload_modules}
    if model.moe is not None:
        settings |= {
            "num_moe_experts": model.moe.num_routed_experts,
            "moe_ffn_hidden_size": model.moe.moe_ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
        }
    for name, value in model.megatron.items():
        if (why := refusal(name, recipe)) is not None:
            raise ValueError(f"model.megatron.{name}={value!r}: {why}")
    settings |= model.megatron
    if settings["gradient_accumulation_fusion"] and not gradient_accumulation_kernel():
        raise ValueError(
            "model.megatron.gradient_accumulation_fusion=True needs a CUDA device and NVIDIA Apex built with --cpp_ext and "
            "--cuda_ext (its module fused_weight_gradient_mlp_cuda); install it, or leave the field out"
        )
    return TransformerConfig(**settings)


def build_language_model(recipe: Recipe, pg: ProcessGroupCollection, *, drawn: bool = True) -> LanguageModel:
    """This rank's part of the language trunk, with its initial weights; see :func:`build_model` for ``drawn``."""
    config = transformer_config(recipe)
    if drawn:
        language = LanguageModel(config, recipe.model, recipe.parallel, pg=pg)
        _draw_language(language, recipe, pg)
        return language
    config.params_dtype = config.pipeline_dtype
    with NothingDrawn():
        return LanguageModel(config, recipe.model, recipe.parallel, pg=pg)


def _draw_language(
    language: LanguageModel, recipe: Recipe, pg: ProcessGroupCollection, only: Collection[str] | None = None
) -> None:
    std, num_blocks = recipe.model.init_method_std, recipe.model.num_layers
    initialize_weights(language, seed=recipe.seed, std=std, num_blocks=num_blocks, pg=pg, only=only)


def build_model(recipe: Recipe, pg: ProcessGroupCollection, *, drawn: bool = True) -> "OmniModel":
    """This rank's part of the model, on its device, with its initial weights; nothing frozen, not wrapped.

    Not ``drawn``: weights are what memory holds (adapters excepted, which are small), in the dtype that they are kept in,
    and must be loaded or drawn by :func:`draw_weights` before they are used.
    """
    from megatron_omni.models.generators.speech import SpeechModel
    from megatron_omni.models.lora import add_lora
    from megatron_omni.models.omni import OmniModel

    language = build_language_model(recipe, pg, drawn=drawn)
    kind = OmniModel if recipe.model.speech is None else SpeechModel
    with nullcontext() if drawn else NothingDrawn():
        model = kind(
            language,
            recipe.model,
            seed=recipe.seed,
            pg=pg,
            overlap=recipe.parallel.overlap_grad_reduce,
            drawn=drawn,
        )
    if not drawn:
        model.to(language.config.pipeline_dtype)
    for encoder in (model.vision, model.audio):
        if encoder is not None:
            encoder.recompute = recipe.parallel.recompute == "full"
    if model.image is not None:
        model.image.dit.recompute = recipe.parallel.recompute == "full"
    if recipe.model.lora is not None:
        add_lora(model.language, recipe.model, seed=recipe.seed, pg=pg)
    return model.to(device())


def draw_weights(
    model: "OmniModel | GeneratorModel", recipe: Recipe, pg: ProcessGroupCollection, *, only: Collection[str]
) -> None:
    """Give the parameters called as in ``only`` the values that a model built ``drawn`` has; adapters are drawn already."""
    from megatron_omni.models.generators.generator_model import GeneratorModel

    if isinstance(model, GeneratorModel):
        return model.draw_inputs(only)
    trunk = {name.removeprefix("language.") for name in only if name.startswith("language.")}
    _draw_language(model.language, recipe, pg, {name for name in trunk if ".lora_" not in name})
    model.draw_inputs(only)


def build_trained_model(
    recipe: Recipe, pg: ProcessGroupCollection, *, drawn: bool
) -> "OmniModel | TrunklessModel | GeneratorModel":
    """What a run trains: :func:`build_model`; a codec where ``model`` is one, which is small and always drawn; what
    draws alone where its conditions do not come from a language model of the step."""
    if draws_alone(recipe):
        from megatron_omni.models.generators.generator_model import GeneratorModel

        with nullcontext() if drawn else NothingDrawn():
            generator = GeneratorModel(recipe, projectors=recipe.generative.conditions == "cached", drawn=drawn)
        return generator.to(device()) if drawn else generator.to(device(), generator.config.pipeline_dtype)
    if not recipe.model.is_codec:
        return build_model(recipe, pg, drawn=drawn)
    from megatron_omni.models.generators.codec_model import CodecModel
    from megatron_omni.models.generators.picture_codec_model import PictureCodecModel

    kind = CodecModel if recipe.model.codec is not None else PictureCodecModel
    return kind(recipe).to(device())
