"""Where the published code computes something else than a model was trained with, said once each at an export.

Their loader builds some parts from constants of its own, whatever ``config.json`` says, and has one way of what is a
setting here. This code base reads the settings back from ``config.json``; other loaders of the directory do not.
"""

import dataclasses
from collections.abc import Iterator

from megatron_omni.config.data import DataConfig
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig

POSITIONS_PER_SECOND = 2.0
CHUNK_SECONDS, QUERY_TOKENS = 30.0, 200
TOWER = VisionConfig()
"""SigLIP so400m/14-384: it builds this one and does not read ``vision_config``."""
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
    return lines


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
