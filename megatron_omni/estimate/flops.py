"""Floating-point operations of a recipe: 6 per parameter and token for forward and backward, attention scores counted
causally. What ``TFLOP/s`` and ``MFU`` in a log divide by, and what the loader balances ranks with.
"""

from megatron_omni.config.model import ModelConfig
from megatron_omni.estimate.parameters import AUDIO_POSITIONS_PER_SECOND, count_parameters, padded_vocab_size


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
        tile = 6.0 * patches * vision.num_layers * _layer(vision.hidden_size, vision.ffn_hidden_size)
    if (audio := model.audio) is not None:
        width, ffn = audio.hidden_size, audio.ffn_hidden_size
        frames = int(audio.chunk_seconds * AUDIO_POSITIONS_PER_SECOND)
        convolutions = 3 * width * (2 * audio.num_mel_bins + width)  # the first runs before the time axis is halved
        encoder = frames * (convolutions + audio.num_encoder_layers * _layer(width, ffn, biases=3))
        # Every decoder layer projects all frames to keys and values once more.
        decoder = audio.num_decoder_layers * (
            audio.num_query_tokens * _layer(width, ffn, attentions=2, biases=3) + frames * 2 * width * width
        )
        chunk = 6.0 * (encoder + decoder)
    return tile, chunk


def _layer(width: int, ffn: int, *, attentions: int = 1, biases: int = 4) -> int:
    """Parameters of an encoder layer (SigLIP, Whisper), each of which a position meets once."""
    attention = 4 * width * width + biases * width
    norms = (attentions + 1) * 2 * width
    return attentions * attention + 2 * width * ffn + ffn + width + norms
