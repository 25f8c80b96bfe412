"""The layout of the released Uni-MoE-2.0-Omni: names of its weights and fields of its ``config.json``, both ways.

    model.* lm_head                        Qwen2.5; in each layer ``mlp.gate``, ``mlp.fixed_real_moe.{s}`` (shared) and
                                           ``mlp.dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts.{e}`` (routed)
    vision_tower.vision_tower.*            SigLIP without its last layer; ``vision_aligner.{0,2}``
    audio_tower.audio_tower.*              Whisper encoder; ``audio_aligner``: queries, Whisper decoder, projector

A dense model in the same layout (a warm-up run) has Qwen2.5's ``mlp.{gate,up,down}_proj`` instead of the experts.

Gate rows are ordered [routed | null | shared] on both sides. The release's SigLIP keeps its post-layernorm and its Q-former
keeps Whisper's token table: weights that nothing reads (:func:`unused_shapes`). They are carried where they exist; where
they do not, export fills in what leaves the loader content. The speech generator and the VAE (:data:`CARRIED_GENERATORS`) are
carried as well; the picture generator is in uni_moe_image.py.

``config.json`` cannot say everything that a recipe says, and its readers ignore fields they do not know: the model group
of the recipe goes along under :data:`OURS`, and wins over the defaults of a release when it is read back.

Names and fields: attributes of the published modules and what they and lmms-eval's ``uni_moe_2_omni`` read of their
configuration. The released checkpoint's own index was not at hand.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_omni.checkpoint.hf_config import Fields, rotary
from megatron_omni.checkpoint.names import (
    FEED_FORWARD,
    THEIR_BLOCK,
    Cut,
    Row,
    Shape,
    audio_projector_rows,
    dense_ffn_rows,
    siglip_rows,
    trunk_rows,
    vision_projector_rows,
    whisper_decoder_rows,
    whisper_encoder_rows,
)
from megatron_omni.checkpoint.transforms import DownTransposed, GateUpTransposed, Transpose
from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig

MODEL_TYPES = ("grin_qwen2_vl_out", "grin_qwen2_vl")
"""With and without generators; the first is what export writes."""
ARCHITECTURE = "GrinQwen2VLOutForConditionalGeneration"
OURS = "megatron_omni"

SIGLIP_PREFIX = "vision_tower.vision_tower.vision_model."
WHISPER_ENCODER_PREFIX = "audio_tower.audio_tower."
WHISPER_DECODER_PREFIX = "audio_aligner.decoder.audio_decoder."
ROUTED = THEIR_BLOCK + "mlp.dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts.{expert}."
SHARED = THEIR_BLOCK + "mlp.fixed_real_moe.{shared}."
GATE = THEIR_BLOCK + "mlp.gate.weight"
CARRIED_GENERATORS = (r"speech_generator\..*", r"image_generator\.vae\..*")
"""Keys of models of their own in a release: carried through as they are."""
PICTURE_GENERATOR = (r"image_generator\..*", r"(image|task|visual)_hidden_fcs\..*")
"""Keys of the picture generator: carried where there is no whole one."""
GENERATORS = (*CARRIED_GENERATORS, *PICTURE_GENERATOR)
"""Keys of all generators of a release."""
WHISPER_VOCABULARY = 51866
"""Rows of Whisper-large-v3's token table."""
POSITIONS_PER_SECOND = 50

# What a recipe cannot choose: the published code has one way of it.
SIGLIP_ACTIVATION, WHISPER_ACTIVATION = "gelu_pytorch_tanh", "gelu"
TOKEN_FIELDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_start_token_id": "<|audio_start|>",
    "audio_end_token_id": "<|audio_end|>",
    "audio_token_id": "<|audio_pad|>",
    "speech_start_token_id": "<|speech_start|>",
    "speech_end_token_id": "<|speech_end|>",
    "speech_prompt_token_id": "<|speech_prompt|>",
    "speech_split_token_id": "<|speech_split|>",
    "bos_token_id": "<|endoftext|>",
    "pad_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}


# ------------------------------------------------------------------------------------------------ weights


def uni_moe_rows(model: ModelConfig) -> list[Row]:
    """Rows of the whole model: trunk, experts (or dense feed-forward parts), encoders and projectors that it has."""
    rows = trunk_rows(model)
    last = max(i for i, row in enumerate(rows) if row.layers)
    rows[last + 1 : last + 1] = moe_rows(model) if model.moe is not None else dense_ffn_rows(model)
    if model.vision is not None:
        rows += siglip_rows(model.vision, prefix=SIGLIP_PREFIX) + vision_projector_rows(model)
    if model.audio is not None:
        rows += whisper_encoder_rows(model.audio, prefix=WHISPER_ENCODER_PREFIX)
        rows += whisper_decoder_rows(model.audio, prefix=WHISPER_DECODER_PREFIX) + audio_projector_rows(model)
    return rows


def moe_rows(model: ModelConfig) -> list[Row]:
    """Gate, routed and shared experts of every layer."""
    moe = model.moe
    assert moe is not None
    width, ffn, shared_ffn = model.hidden_size, moe.moe_ffn_hidden_size, moe.moe_shared_expert_intermediate_size
    experts: dict[str, Any] = {
        "layers": model.num_layers,
        "experts": tuple(range(moe.num_routed_experts)),
        "num_experts": moe.num_routed_experts,
    }
    rows = [
        Row(
            ours=f"{FEED_FORWARD}mlp.router.weight",
            theirs=(GATE,),
            shapes=((num_gate_rows(moe), width),),
            layers=model.num_layers,
        ),
        Row(
            ours=f"{FEED_FORWARD}mlp.experts.experts.linear_fc1.weight",
            theirs=(f"{ROUTED}gate_proj.weight", f"{ROUTED}up_proj.weight"),
            shapes=((ffn, width), (ffn, width)),
            transform=GateUpTransposed(),
            cut=Cut(1, "etp", parts=2),
            **experts,
        ),
        Row(
            ours=f"{FEED_FORWARD}mlp.experts.experts.linear_fc2.weight",
            theirs=(f"{ROUTED}down_proj.weight",),
            shapes=((width, ffn),),
            transform=Transpose(),
            cut=Cut(0, "etp"),
            **experts,
        ),
    ]
    if moe.num_shared_experts:
        shared = [SHARED.replace("{shared}", str(s)) for s in range(moe.num_shared_experts)]
        rows += [
            Row(
                ours=f"{FEED_FORWARD}mlp.shared_experts.weight1",
                theirs=tuple(f"{prefix}{name}_proj.weight" for prefix in shared for name in ("gate", "up")),
                shapes=((shared_ffn, width),) * (2 * moe.num_shared_experts),
                transform=GateUpTransposed(moe.num_shared_experts),
                layers=model.num_layers,
            ),
            Row(
                ours=f"{FEED_FORWARD}mlp.shared_experts.weight2",
                theirs=tuple(f"{prefix}down_proj.weight" for prefix in shared),
                shapes=((width, shared_ffn),) * moe.num_shared_experts,
                transform=DownTransposed(moe.num_shared_experts),
                layers=model.num_layers,
            ),
        ]
    return rows


def num_gate_rows(moe: MoEConfig) -> int:
    """Routed, null and shared."""
    return moe.num_routed_experts + moe.num_null_experts + moe.num_shared_experts


def unused_shapes(model: ModelConfig, *, whisper_vocabulary: int = WHISPER_VOCABULARY) -> dict[str, Shape]:
    """Weights that the release has and no computation reads: carried through conversion, never trained."""
    unused: dict[str, Shape] = {}
    if model.vision is not None:
        width = model.vision.hidden_size
        unused |= {f"{SIGLIP_PREFIX}post_layernorm.{kind}": (width,) for kind in ("weight", "bias")}
    if model.audio is not None:
        unused[f"{WHISPER_DECODER_PREFIX}embed_tokens.weight"] = (whisper_vocabulary, model.audio.hidden_size)
    return unused


# ------------------------------------------------------------------------------------------------ config.json


def config_to_theirs(
    model: ModelConfig, data: DataConfig, *, tokens: dict[str, int], dtype: str = "bfloat16"
) -> dict[str, Any]:
    """``config.json`` of ``model``. ``tokens`` are the ids of special tokens by name."""
    vision, audio = model.vision, model.audio
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPES[0],
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": {"type": "mrope", "mrope_section": list(model.mrope_section)},
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_dropout": model.attention_dropout,
        "use_cache": True,
        "use_sliding_window": False,
        "tune_image_generator": model.image is not None,  # and no speech_generator_type: it has no speech generator
        **{field: tokens[name] for field, name in TOKEN_FIELDS.items() if name in tokens},
    }
    if model.moe is not None:
        config |= _moe_to_theirs(model.moe)
    config["vision_config"] = _vision_to_theirs(vision) if vision is not None else {}
    config["audio_config"] = _audio_to_theirs(audio) if audio is not None else {}
    if vision is not None:
        config |= {
            "mm_hidden_size": vision.hidden_size,
            "vision_hidden_size": vision.hidden_size,
            "visual_aligner_type": "mlp2x_gelu",
            "vision_spatial_pool_stride": vision.pooled_side,  # in fact the side of the output
            "image_grid_pinpoints": f"(1x1),...,({vision.max_tiles_per_side}x{vision.max_tiles_per_side})",
            "video_fps": data.video_fps,
            "frames_upbound": data.max_frames,
            "video_pixel_upbound": vision.image_size,
        }
    if audio is not None:
        config |= {
            "whisper_hidden_size": audio.hidden_size,
            "whisper_query_tokens_size": audio.num_query_tokens,
            "whisper_projector_type": "linear",
            "whisper_audio_time": audio.max_chunks,
        }
    config[OURS] = {"model": dataclasses.asdict(model)}
    return config


def _moe_to_theirs(moe: MoEConfig) -> dict[str, Any]:
    return {
        "mlp_dynamic_expert_num": moe.num_routed_experts,
        "mlp_dynamic_null_expert_num": moe.num_null_experts,
        "mlp_fixed_expert_num": moe.num_shared_experts,
        "mlp_dynamic_top_p": moe.top_p if moe.top_k is None else 0,  # 0 is its way to say "a fixed number"
        "mlp_dynamic_top_k": moe.top_k or 2,
        "dynamic_intermediate_size": moe.moe_ffn_hidden_size,
        "shared_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "ignore_differentiable_router": moe.gradient_estimator == "none",
        "enable_expert_tensor_parallelism": False,
        "ep_size": 1,
        "fixed_ep_size": 1,
        "router_jitter_noise": moe.router_jitter_eps,
        "input_jitter_noise": moe.input_jitter,
        "token_drop": moe.capacity_factor is not None,
        "drop_policy": "probs",
        "min_capacity": moe.min_capacity,
        "capacity_factor": moe.capacity_factor if moe.capacity_factor is not None else 1.0,
        "fp32_gate": moe.fp32_gate,
        "avg_hidden_states_last": False,
        "drop_token_num_print": False,
        "l_aux_weight": moe.moe_aux_loss_coeff,
        "min_l_aux_weight": moe.moe_aux_loss_coeff_min,
        "l_aux_weight_decay_steps": moe.moe_aux_loss_decay_iters,
    }


def _vision_to_theirs(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers + 1,  # its loader builds this many and removes the last
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": SIGLIP_ACTIVATION,
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "image_mean": [0.5, 0.5, 0.5],
    }


def _audio_to_theirs(audio: AudioConfig) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "vocab_size": WHISPER_VOCABULARY,
        "num_mel_bins": audio.num_mel_bins,
        "d_model": audio.hidden_size,
        "encoder_layers": audio.num_encoder_layers,
        "decoder_layers": audio.num_decoder_layers,
        "encoder_attention_heads": audio.num_attention_heads,
        "decoder_attention_heads": audio.num_attention_heads,
        "encoder_ffn_dim": audio.ffn_hidden_size,
        "decoder_ffn_dim": audio.ffn_hidden_size,
        "max_source_positions": round(audio.chunk_seconds * POSITIONS_PER_SECOND),
        "max_target_positions": audio.max_target_positions,
        "activation_function": WHISPER_ACTIVATION,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
    }


def is_uni_moe(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of this layout."""
    return config.get("model_type") in MODEL_TYPES


def model_from_theirs(config: dict[str, Any], *, file: Path) -> ModelConfig:
    """The model that ``config`` (the ``config.json`` at ``file``) describes.

    A release's own configuration gives the published arithmetic: ``routing_weight_mode: release``, its estimator, and plain
    positions for samples that have sound alone. ValueError names the field, what it says and what is supported.
    """
    get = Fields(config, file)
    if not is_uni_moe(config):
        get.refuse("model_type", f"one of {', '.join(MODEL_TYPES)}")
    get.expect("hidden_act", "silu", default="silu")
    get.expect("use_sliding_window", False, default=False)
    base_of_positions, section = rotary(get, 1e6, types=("default", "mrope"))
    hidden, heads = get.size("hidden_size"), get.size("num_attention_heads")
    recorded = recorded_model(get)
    base = recorded or ModelConfig(audio_only_1d=True, half_even_positions=True)
    return dataclasses.replace(
        base,
        num_layers=get.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=get.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=get.size("num_key_value_heads"),
        kv_channels=get.size("head_dim") if config.get("head_dim") is not None else hidden // heads,
        vocab_size=get.size("vocab_size"),
        max_position_embeddings=get.size("max_position_embeddings"),
        rotary_base=base_of_positions,
        mrope_section=section or [16, 24, 24],
        layernorm_epsilon=get.number("rms_norm_eps"),
        untie_embeddings_and_output_weights=not get.flag("tie_word_embeddings", False),
        init_method_std=get.number("initializer_range", 0.02),
        attention_dropout=get.number("attention_dropout", 0.0),
        moe=_moe_from_theirs(get, recorded.moe if recorded else None),
        vision=_vision_from_theirs(get) if config.get("vision_config") else None,
        audio=_audio_from_theirs(get, recorded.audio if recorded else None) if config.get("audio_config") else None,
    )


def recorded_model(get: Fields) -> ModelConfig | None:
    """The recipe's model group that our export left, checked against the schema."""
    from megatron_omni.config.load import recipe_from_dict

    recorded = get.inside(OURS).config.get("model")
    return None if recorded is None else recipe_from_dict({"model": recorded}, origin=f"{get.path}: {OURS}").model


def _moe_from_theirs(get: Fields, recorded: MoEConfig | None) -> MoEConfig | None:
    if "mlp_dynamic_expert_num" not in get.config:
        return None  # a dense warm-up model
    get.expect("drop_policy", "probs", default="probs")
    grin = "none" if get.flag("ignore_differentiable_router", False) else "grin"
    release = MoEConfig(routing_weight_mode="release", gradient_estimator=grin)  # type: ignore[arg-type]
    top_p = get.number("mlp_dynamic_top_p")
    return dataclasses.replace(
        recorded or release,
        num_routed_experts=get.size("mlp_dynamic_expert_num"),
        num_null_experts=get.size("mlp_dynamic_null_expert_num", least=0),
        num_shared_experts=get.size("mlp_fixed_expert_num", least=0),
        moe_ffn_hidden_size=get.size("dynamic_intermediate_size"),
        moe_shared_expert_intermediate_size=get.size("shared_intermediate_size", least=0),
        top_p=top_p or (recorded or release).top_p,
        top_k=None if top_p else get.size("mlp_dynamic_top_k"),
        router_jitter_eps=get.number("router_jitter_noise"),
        input_jitter=get.number("input_jitter_noise"),
        capacity_factor=get.number("capacity_factor") if get.flag("token_drop") else None,
        min_capacity=get.size("min_capacity", least=0),
        fp32_gate=get.flag("fp32_gate"),
        moe_aux_loss_coeff=get.number("l_aux_weight"),
        moe_aux_loss_coeff_min=get.number("min_l_aux_weight"),
        moe_aux_loss_decay_iters=get.size("l_aux_weight_decay_steps", least=0),
    )


def _vision_from_theirs(get: Fields) -> VisionConfig:
    tower = get.inside("vision_config")
    tower.expect("hidden_act", SIGLIP_ACTIVATION, default=SIGLIP_ACTIVATION)
    default = VisionConfig()  # a release may leave out what its class defaults to, so400m
    return VisionConfig(
        image_size=tower.size("image_size", default.image_size),
        patch_size=tower.size("patch_size", default.patch_size),
        hidden_size=tower.size("hidden_size", default.hidden_size),
        ffn_hidden_size=tower.size("intermediate_size", default.ffn_hidden_size),
        num_layers=tower.size("num_hidden_layers", default.num_layers + 1, least=2) - 1,
        num_attention_heads=tower.size("num_attention_heads", default.num_attention_heads),
        pooled_side=get.size("vision_spatial_pool_stride"),
        max_tiles_per_side=_tiles_per_side(get),
    )


def _tiles_per_side(get: Fields) -> int:
    """n of ``"(1x1),...,(nxn)"``."""
    found = re.findall(r"\((\d+)x(\d+)\)", str(get.config.get("image_grid_pinpoints")))
    if not found or found[0] != ("1", "1") or found[-1][0] != found[-1][1]:
        get.refuse("image_grid_pinpoints", "a square range '(1x1),...,(nxn)'")
    return int(found[-1][0])


def _audio_from_theirs(get: Fields, recorded: AudioConfig | None) -> AudioConfig:
    whisper = get.inside("audio_config")
    get.expect("whisper_projector_type", "linear", default="linear")
    for name in ("attention_heads", "ffn_dim"):  # one configuration stands for both halves
        whisper.expect(f"decoder_{name}", whisper.size(f"encoder_{name}"))
    return dataclasses.replace(
        recorded or AudioConfig(),
        num_mel_bins=whisper.size("num_mel_bins"),
        chunk_seconds=whisper.size("max_source_positions") / POSITIONS_PER_SECOND,
        hidden_size=whisper.size("d_model"),
        ffn_hidden_size=whisper.size("encoder_ffn_dim"),
        num_encoder_layers=whisper.size("encoder_layers"),
        num_decoder_layers=whisper.size("decoder_layers"),
        num_attention_heads=whisper.size("encoder_attention_heads"),
        num_query_tokens=get.size("whisper_query_tokens_size"),
        max_target_positions=whisper.size("max_target_positions"),
        max_chunks=get.size("whisper_audio_time"),
    )
