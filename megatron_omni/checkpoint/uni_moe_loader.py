"""Where the published code computes something else than a model was trained with, said once each at an export.

Their loader builds some parts from constants of its own, whatever ``config.json`` says, and has one way of what is a
setting here. This code base reads the settings back from ``config.json``; other loaders of the directory do not.
"""

import dataclasses
from collections.abc import Iterator

from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_omni.config.pictures import DiTConfig, ImageGeneratorConfig, ProjectorConfig

POSITIONS_PER_SECOND = 2.0
CHUNK_SECONDS, QUERY_TOKENS = 30.0, 200
TOWER = VisionConfig()
"""SigLIP so400m/14-384: it builds this one and does not read ``vision_config``."""
RELEASED_IMAGE_TOKENS, RELEASED_GUIDED_CHANNELS = 64, 3
TOWER_FIELDS = ("image_size", "patch_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads")


def other_arithmetic(model: ModelConfig, data: DataConfig) -> list[str]:
    """One line for each setting that the published code does not follow; empty where it computes the same."""
    lines = list(_language(model))
    if model.moe is not None:
        lines += _mixture(model.moe)
    if model.vision is not None:
        lines += _vision(model.vision)
        if data.frame_choice != "release":
            lines.append(
                f"data.frame_choice={data.frame_choice} (it takes other frames of a video; release does the same)"
            )
    if model.audio is not None:
        lines += _audio(model.audio)
    return lines + other_drawing(model)


def other_drawing(model: ModelConfig) -> list[str]:
    """The lines of what draws."""
    return list(_image(model.image)) if model.image is not None else []


def _language(model: ModelConfig) -> Iterator[str]:
    if model.rope_theta_seconds != POSITIONS_PER_SECOND:
        yield f"model.rope_theta_seconds={model.rope_theta_seconds} (always {POSITIONS_PER_SECOND} there)"
    if model.audio is not None and not model.audio_only_1d:
        yield "model.audio_only_1d=false (samples with sound alone get plain positions there)"
    if (model.audio is not None or model.vision is not None) and not model.half_even_positions:
        yield "model.half_even_positions=false (half a position step rounds to the even one there)"
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        yield (
            f"model.kv_channels={model.kv_channels} (always hidden_size / num_attention_heads there, "
            f"{model.hidden_size / model.num_attention_heads:g}: its layers do not fit the weights)"
        )


def _mixture(moe: MoEConfig) -> Iterator[str]:
    if moe.routing_weight_mode != "release":
        yield f"model.moe.routing_weight_mode={moe.routing_weight_mode} (always release there)"
    if moe.max_routed is not None:
        yield f"model.moe.max_routed={moe.max_routed} (no such cap there)"
    if moe.capacity_factor is not None:
        yield f"model.moe.capacity_factor={moe.capacity_factor} (token_drop is on, in its evaluation too)"


def _vision(vision: VisionConfig) -> Iterator[str]:
    ours, theirs = dataclasses.asdict(vision), dataclasses.asdict(TOWER)
    other = ", ".join(f"{name}={ours[name]}" for name in TOWER_FIELDS if ours[name] != theirs[name])
    if other:
        yield f"model.vision: {other} (it builds so400m/14-384 whatever vision_config says: weights that do not fit)"


def _audio(audio: AudioConfig) -> Iterator[str]:
    if audio.tokens_per_position != AudioConfig().tokens_per_position:
        yield f"model.audio.tokens_per_position={audio.tokens_per_position} (always {AudioConfig().tokens_per_position} there)"
    if not audio.causal_queries:
        yield "model.audio.causal_queries=false (always causal there)"
    if audio.chunk_seconds != CHUNK_SECONDS:
        yield f"model.audio.chunk_seconds={audio.chunk_seconds:g} (always {CHUNK_SECONDS:g} there)"
    if audio.num_query_tokens != QUERY_TOKENS:
        yield f"model.audio.num_query_tokens={audio.num_query_tokens} (its positions know {QUERY_TOKENS} alone)"


def _image(image: ImageGeneratorConfig) -> Iterator[str]:
    for name, ours, built in (("dit", image.dit, DiTConfig()), ("projectors", image.projectors, ProjectorConfig())):
        said, theirs = dataclasses.asdict(ours), dataclasses.asdict(built)
        free = ("noisy_selection", "query_init", "input_positions")
        other = ", ".join(f"{key}={said[key]}" for key in said if key not in free and said[key] != theirs[key])
        if other:
            yield f"model.image.{name}: {other} (it builds one size whatever is written: weights that do not fit)"
    if not image.dit.noisy_selection:
        yield "model.image.dit.noisy_selection=false (noise decides there which rows of the source are seen)"
    if image.projectors.input_positions:
        yield "model.image.projectors.input_positions=true (no positions there: their weights are not read)"
    if image.num_image_tokens * image.image_token_repeat != RELEASED_IMAGE_TOKENS:
        positions = image.num_image_tokens * image.image_token_repeat
        yield f"model.image: a block of {positions} image tokens (always {RELEASED_IMAGE_TOKENS} there)"
    if not image.release:
        yield "model.image.release=false (no learned nulls there: theirs are a file and two rows of the task's projector)"
    if image.blank_source != "white":
        yield f"model.image.blank_source={image.blank_source} (a picture without a source has a white one there)"
    if image.sampling.guided_channels != RELEASED_GUIDED_CHANNELS:
        yield (
            f"model.image.sampling.guided_channels={image.sampling.guided_channels} "
            f"(guidance acts on {RELEASED_GUIDED_CHANNELS} there)"
        )
