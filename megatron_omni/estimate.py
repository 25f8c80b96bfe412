"""Parameters, FLOPs and bytes of a recipe, from its sizes alone: no torch, no process group.

Sources: parameter shapes of docs/model.md (they reproduce the paper's Table 1: 26,151,734,784 in the language model with
4 routed and 2 shared experts); 6 FLOPs per parameter and token for forward + backward, attention scores counted causally.
"""

from dataclasses import dataclass

from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.config.run import Recipe

BYTES_PER_PARAM_FP32_OPTIMIZER = 12
"""fp32 master weight and two Adam moments."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by named part, over all ranks."""

    embeddings: int
    output: int
    attention: int
    norms: int
    ffn: int
    experts: int
    shared_experts: int
    gate: int
    vision: int
    audio: int
    projectors: int

    @property
    def language(self) -> int:
        """Everything but perception."""
        return self.total - self.vision - self.audio - self.projectors

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(vars(self).values())


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding and output matrices; the same on every layout, so that checkpoints and losses are, too."""
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameter counts by part."""
    width, blocks, moe = model.hidden_size, model.num_layers, model.moe
    vocab = padded_vocab_size(model) * width
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    attention = width * (query + key_value) + query * width + (query + key_value) * model.add_qkv_bias
    slots = moe.num_routed_experts + moe.num_null_experts + moe.num_shared_experts if moe else 0
    vision, vision_projector = _vision(model.vision, width)
    audio, audio_projector = _audio(model.audio, width)
    return ParameterCount(
        embeddings=vocab,
        output=vocab if model.untie_embeddings_and_output_weights else 0,
        attention=blocks * attention,
        norms=(2 * blocks + 1) * width,
        ffn=0 if moe else blocks * 3 * width * model.ffn_hidden_size,
        experts=blocks * 3 * width * moe.moe_ffn_hidden_size * moe.num_routed_experts if moe else 0,
        shared_experts=blocks * 3 * width * moe.moe_shared_expert_intermediate_size * moe.num_shared_experts
        if moe
        else 0,
        gate=blocks * slots * width,
        vision=vision,
        audio=audio,
        projectors=vision_projector + audio_projector,
    )


def _transformer_layer(width: int, ffn: int, attentions: int = 1, biases_per_attention: int = 4) -> int:
    """Biased pre-norm layer with a two-matrix MLP (SigLIP, Whisper)."""
    attention = 4 * width * width + biases_per_attention * width
    norms = (attentions + 1) * 2 * width
    return attentions * attention + 2 * width * ffn + ffn + width + norms


def _vision(config: VisionConfig | None, out: int) -> tuple[int, int]:
    if config is None:
        return 0, 0
    width, grid = config.hidden_size, config.image_size // config.patch_size
    embeddings = 3 * config.patch_size**2 * width + width + grid * grid * width
    tower = embeddings + config.num_layers * _transformer_layer(width, config.ffn_hidden_size)
    return tower, width * out + out + out * out + out


def _audio(config: AudioConfig | None, out: int) -> tuple[int, int]:
    if config is None:
        return 0, 0
    width, ffn = config.hidden_size, config.ffn_hidden_size
    convolutions = 3 * config.num_mel_bins * width + width + 3 * width * width + width
    positions = int(config.chunk_seconds * 50) * width
    # Whisper's key projections carry no bias: three biases an attention.
    encoder = convolutions + positions + config.num_encoder_layers * _transformer_layer(width, ffn, 1, 3) + 2 * width
    queries = config.num_query_tokens * width + config.max_target_positions * width
    decoder = queries + config.num_decoder_layers * _transformer_layer(width, ffn, 2, 3) + 2 * width
    return encoder, decoder + width * out + out  # the Q-former belongs to the projectors (models/parts.py)


def flops_per_token(model: ModelConfig, seq_length: int, mean_k: float) -> float:
    """Training FLOPs (forward + backward) of the language model for one token of a sequence of ``seq_length``.

    ``mean_k`` is the measured mean number of real experts per token: null slots cost nothing.
    """
    counts = count_parameters(model)
    dense = (
        counts.attention
        + counts.ffn
        + counts.shared_experts
        + counts.gate
        + padded_vocab_size(model) * model.hidden_size
    )
    routed = counts.experts / model.moe.num_routed_experts * mean_k if model.moe else 0.0
    scores = 2 * model.num_layers * model.num_attention_heads * model.kv_channels * seq_length / 2
    return 6.0 * (dense + routed + scores)


def encoder_flops(model: ModelConfig) -> tuple[float, float]:
    """Training FLOPs of one vision tile and of one audio chunk, without attention scores; 0 for an absent encoder."""
    tile = chunk = 0.0
    if (vision := model.vision) is not None:
        patches = (vision.image_size // vision.patch_size) ** 2
        tile = 6.0 * patches * vision.num_layers * _transformer_layer(vision.hidden_size, vision.ffn_hidden_size)
    if (audio := model.audio) is not None:
        width, ffn = audio.hidden_size, audio.ffn_hidden_size
        frames = int(audio.chunk_seconds * 50)
        convolutions = 3 * width * (2 * audio.num_mel_bins + width)  # the first runs before the time axis is halved
        encoder = frames * (convolutions + audio.num_encoder_layers * _transformer_layer(width, ffn, 1, 3))
        # Every decoder layer projects all frames to keys and values once more.
        decoder = audio.num_decoder_layers * (
            audio.num_query_tokens * _transformer_layer(width, ffn, 2, 3) + frames * 2 * width * width
        )
        chunk = 6.0 * (encoder + decoder)
    return tile, chunk


def weight_bytes_per_rank(recipe: Recipe, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on the fullest rank (first stage), without activations."""
    model, parallel = recipe.model, recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    counts = count_parameters(model)
    sharded = (counts.attention + counts.ffn) // (tp * pp) + counts.embeddings // tp
    if pp == 1:
        sharded += counts.output // tp
    replicated = (counts.norms + counts.gate + counts.shared_experts) // pp
    perception = counts.vision + counts.audio + counts.projectors
    dense = sharded + replicated + perception
    experts = counts.experts // (expert_ranks * pp)
    size = 2 if recipe.optim.precision == "bf16" else 4
    dense_ranks, expert_replicas = world_size // (tp * pp), world_size // (expert_ranks * pp)
    shard = recipe.optim.use_distributed_optimizer
    state = BYTES_PER_PARAM_FP32_OPTIMIZER if size == 2 else 8
    optimizer = dense * state // (dense_ranks if shard else 1) + experts * state // (expert_replicas if shard else 1)
    return {"weights": (dense + experts) * size, "gradients": (dense + experts) * 4, "optimizer": optimizer}
