"""The released layout: every key and shape of the full model, and a configuration that survives the way there and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperModel,
)

from megatron_omni.checkpoint.hf_config import qwen2_config, qwen2_model
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.uni_moe import (
    OURS,
    config_to_theirs,
    model_from_theirs,
    uni_moe_rows,
    unused_shapes,
)
from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_omni.estimate import count_parameters
from tests.distributed.test_omni_layouts import MODEL as TINY
from tests.distributed.test_omni_layouts import one_rank

FILE = Path("config.json")
QWEN_TOKENS = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
    "<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656, "<|audio_start|>": 151665,
    "<|audio_end|>": 151666, "<|audio_pad|>": 151667, "<|speech_start|>": 151668, "<|speech_end|>": 151669,
    "<|speech_prompt|>": 151670, "<|speech_split|>": 151671,
}  # fmt: skip


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    entries = expand(uni_moe_rows(model))
    keys = [key for entry in entries for key in entry.theirs]
    assert len(keys) == len(set(keys)), "two rows give the same key"
    return {key: tuple(shape) for entry in entries for key, shape in zip(entry.theirs, entry.shapes)}


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the release, from Hugging Face's own modules on the meta device and the key list of the spec."""
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
            )
        )  # fmt: skip
        siglip = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
                patch_size=14,
            )
        )  # fmt: skip
        whisper = WhisperModel(
            WhisperConfig(
                vocab_size=51866, num_mel_bins=128, d_model=1280, encoder_layers=32, decoder_layers=32,
                encoder_attention_heads=20, decoder_attention_heads=20, encoder_ffn_dim=5120, decoder_ffn_dim=5120,
            )
        )  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in qwen.state_dict().items() if ".mlp." not in key}
    for layer in range(28):
        prefix = f"model.layers.{layer}.mlp."
        shapes[prefix + "gate.weight"] = (7, 3584)
        for number in range(4):
            expert = f"{prefix}dynamic_real_moe.deepspeed_moe.experts.deepspeed_experts.{number}."
            shapes |= {f"{expert}{name}_proj.weight": (18944, 3584) for name in ("gate", "up")}
            shapes[f"{expert}down_proj.weight"] = (3584, 18944)
        for number in range(2):
            expert = f"{prefix}fixed_real_moe.{number}."
            shapes |= {f"{expert}{name}_proj.weight": (2368, 3584) for name in ("gate", "up")}
            shapes[f"{expert}down_proj.weight"] = (3584, 2368)
    for key, value in siglip.state_dict().items():
        key = key.removeprefix("vision_model.")
        if not key.startswith(("encoder.layers.26.", "head.")):
            shapes[f"vision_tower.vision_tower.vision_model.{key}"] = tuple(value.shape)
    shapes |= {"vision_aligner.0.weight": (3584, 1152), "vision_aligner.0.bias": (3584,)}
    shapes |= {"vision_aligner.2.weight": (3584, 3584), "vision_aligner.2.bias": (3584,)}
    for key, value in whisper.encoder.state_dict().items():
        shapes[f"audio_tower.audio_tower.{key}"] = tuple(value.shape)
    for key, value in whisper.decoder.state_dict().items():
        shapes[f"audio_aligner.decoder.audio_decoder.{key}"] = tuple(value.shape)
    shapes |= {"audio_aligner.query_tokens": (1, 200, 1280)}
    return shapes | {"audio_aligner.projector.weight": (3584, 1280), "audio_aligner.projector.bias": (3584,)}


def test_every_key_and_shape_of_the_release() -> None:
    model = ModelConfig()
    ours = shapes_of(model) | unused_shapes(model)
    released = released_shapes()
    assert ours.keys() == released.keys()
    assert ours == released
    assert len(released) == 339 + 28 * (1 + 4 * 3 + 2 * 3) - 28 * 3 + sum(
        key.startswith(("vision_", "audio_")) for key in released
    ), "339 is the number of tensors of Qwen2.5-7B"
    language = sum(torch.Size(shape).numel() for key, shape in ours.items() if key.startswith(("model.", "lm_head")))
    assert language == 26_151_734_784


def test_rows_fill_the_whole_model_and_nothing_else() -> None:
    """Our side of the table against the state dict of a real (tiny) model."""
    entries = expand(uni_moe_rows(TINY))
    assert {entry.ours for entry in entries} == {key for key in one_rank()["keys"] if "_extra_state" not in key}
    # A row of experts stands for one expert, so each counts once.
    assert sum(torch.Size(entry.shape).numel() for entry in entries) == count_parameters(TINY).total


def test_a_dense_model_has_qwen_feed_forward_keys() -> None:
    dense = shapes_of(dataclasses.replace(TINY, moe=None))
    assert dense["model.layers.0.mlp.gate_proj.weight"] == (48, 32)
    assert not any("moe" in key or "mlp.gate." in key for key in dense)


MODELS: dict[str, ModelConfig] = {
    "released shape": ModelConfig(),
    "tiny": TINY,
    "dense": dataclasses.replace(TINY, moe=None),
    "text only": dataclasses.replace(TINY, vision=None, audio=None),
    "other settings": dataclasses.replace(
        TINY,
        untie_embeddings_and_output_weights=False,
        rope_theta_seconds=1.0,
        audio_only_1d=True,
        half_even_positions=True,
        moe=MoEConfig(
            num_routed_experts=2, num_null_experts=0, num_shared_experts=1, moe_ffn_hidden_size=24, top_k=2,
            moe_shared_expert_intermediate_size=8, capacity_factor=3.0, sample_experts=False, max_routed=1,
            gradient_estimator="none", aux_loss_probs="full",
        ),
        audio=dataclasses.replace(TINY.audio or AudioConfig(), causal_queries=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_configuration_survives_the_way_there_and_back(name: str) -> None:
    theirs = json.loads(json.dumps(config_to_theirs(MODELS[name], DataConfig(), tokens=QWEN_TOKENS)))
    assert model_from_theirs(theirs, file=FILE) == MODELS[name]


def test_fields_that_the_released_loader_and_lmms_eval_read() -> None:
    config = config_to_theirs(ModelConfig(), DataConfig(), tokens=QWEN_TOKENS)
    expected = {
        "model_type": "grin_qwen2_vl_out", "architectures": ["GrinQwen2VLOutForConditionalGeneration"],
        "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": False,
        "mlp_dynamic_expert_num": 4, "mlp_dynamic_null_expert_num": 1, "mlp_fixed_expert_num": 2,
        "mlp_dynamic_top_p": 0.7, "dynamic_intermediate_size": 18944, "shared_intermediate_size": 2368,
        "ep_size": 1, "token_drop": False, "drop_policy": "probs", "min_capacity": 8, "fp32_gate": True,
        "router_jitter_noise": 0.01, "input_jitter_noise": 0.01, "mm_hidden_size": 1152,
        "vision_spatial_pool_stride": 12, "image_grid_pinpoints": "(1x1),...,(6x6)", "video_fps": 1.0,
        "video_pixel_upbound": 384, "frames_upbound": 64, "whisper_hidden_size": 1280,
        "whisper_query_tokens_size": 200, "whisper_projector_type": "linear", "whisper_audio_time": 40,
        "tune_image_generator": False, "image_token_id": 151655, "video_token_id": 151656, "audio_token_id": 151667,
        "vision_start_token_id": 151652, "audio_start_token_id": 151665, "speech_start_token_id": 151668,
        "speech_end_token_id": 151669, "speech_prompt_token_id": 151670, "speech_split_token_id": 151671,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    assert "speech_generator_type" not in config, "its presence alone makes the loader build a speech generator"
    assert config["vision_config"]["num_hidden_layers"] == 27, "the loader removes the last layer itself"
    SiglipVisionConfig(**config["vision_config"])
    whisper = WhisperConfig(**config["audio_config"])
    assert (whisper.d_model, whisper.max_source_positions, whisper.vocab_size) == (1280, 1500, 51866)
    assert "ignore_differentiable_router" in config and "l_aux_weight_decay_steps" in config


def release_config(**changes: Any) -> dict[str, Any]:
    """As the authors' own tools would have written it: without what we add."""
    config = config_to_theirs(ModelConfig(), DataConfig(), tokens=QWEN_TOKENS)
    del config[OURS], config["head_dim"]
    return config | changes


def test_a_release_is_read_with_the_published_arithmetic() -> None:
    model = model_from_theirs(release_config(token_drop=True, capacity_factor=3.0), file=FILE)
    assert model.moe is not None
    assert (model.moe.routing_weight_mode, model.moe.gradient_estimator) == ("release", "grin")
    assert (
        model.audio_only_1d
        and model.half_even_positions
        and model.moe.capacity_factor == 3.0
        and model.kv_channels == 128
    )
    assert model.vision == VisionConfig() and model.audio == AudioConfig()
    fixed = model_from_theirs(release_config(mlp_dynamic_top_p=0, mlp_dynamic_top_k=2), file=FILE).moe
    assert fixed is not None and fixed.top_k == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type: expected one of grin_qwen2_vl_out, grin_qwen2_vl, found 'qwen2'"),
        ({"drop_policy": "position"}, "drop_policy: expected 'probs', found 'position'"),
        ({"image_grid_pinpoints": "(1x1),...,(2x3)"}, "image_grid_pinpoints"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_dynamic_top_p": None}, "mlp_dynamic_top_p: expected a number, found None"),
        ({"fp32_gate": "yes"}, "fp32_gate: expected true or false, found 'yes'"),
        (
            {"mlp_dynamic_null_expert_num": -1},
            "mlp_dynamic_null_expert_num: expected a whole number from 0 on, found -1",
        ),
        ({"vision_config": 3}, "vision_config: expected a table, found 3"),
        ({"rope_scaling": {"mrope_section": [16, "24"]}}, "rope_scaling.mrope_section: expected a list"),
        ({"whisper_projector_type": "mlp2x_gelu"}, "whisper_projector_type"),
        ({OURS: {"model": {"hiden_size": 3}}}, "did you mean 'hidden_size'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type: expected 'default' or 'mrope'"),
    ],
)
def test_what_is_not_supported_is_one_error_with_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json.*") as error:
        model_from_theirs(release_config(**changes), file=FILE)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 3e4, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_theta": None}, "rope_theta": 7e4},
        {},
    ],
)
def test_the_rotary_base_is_where_transformers_finds_it(fields: dict[str, Any]) -> None:
    dense = {key: value for key, value in qwen2_config(ModelConfig(), "bfloat16").items() if key != "rope_theta"}
    wanted = dict(fields)
    if (wanted.get("rope_parameters") or {}).get("rope_theta", 0) is None:
        wanted["rope_parameters"] = {}  # transformers would compute with None
    theirs = Qwen2Config.from_dict(json.loads(json.dumps(dense | wanted)))
    assert qwen2_model(dense | fields, FILE).rotary_base == theirs.rope_parameters["rope_theta"]


def test_section_and_base_of_a_release_come_from_either_table() -> None:
    table = {"type": "mrope", "mrope_section": [8, 28, 28], "rope_theta": 1e4}
    for place in ("rope_scaling", "rope_parameters"):
        config = release_config(**{"rope_scaling": None, place: table})
        model = model_from_theirs(config, file=FILE)
        assert (model.mrope_section, model.rotary_base) == ([8, 28, 28], 1e4)
    with pytest.raises(ValueError, match=r"rope_parameters: expected what rope_scaling says.*disagree"):
        model_from_theirs(
            release_config(rope_scaling=table, rope_parameters=table | {"mrope_section": [16, 24, 24]}), file=FILE
        )


def test_a_missing_field_is_named() -> None:
    config = release_config()
    del config["mlp_fixed_expert_num"]
    with pytest.raises(ValueError, match=r"config\.json: mlp_fixed_expert_num: expected .*, found nothing"):
        model_from_theirs(config, file=FILE)
