"""Floating-point operations of a recipe: 6 per parameter and token for forward and backward, attention scores counted
causally. What ``TFLOP/s`` and ``MFU`` in a log are made of, and what the loader balances ranks with.
"""

from collections.abc import Collection
from typing import NamedTuple

from megatron_omni.config.model import ModelConfig
from megatron_omni.estimate.parameters import AUDIO_POSITIONS_PER_SECOND, count_parameters, padded_vocab_size


class MediaForward(NamedTuple):
    """FLOPs of the forward of one tile or chunk, attention scores included."""

    tower: float
    """SigLIP, or Whisper's encoder."""
    projector: float
    """The vision MLP, or the Q-former; without its last projection."""


def flops_per_token(model: ModelConfig, seq_length: float, mean_k: float, *, prefix_share: float = 0.0) -> float:
    """Training FLOPs (forward + backward) of the language model for one token of a sequence of ``seq_length``.

    ``mean_k`` is the measured mean number of real experts per token: null slots cost nothing. ``prefix_share``: of the
    tokens, those that all see each other (a speech generator's condition).
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
    pairs = seq_length / 2 * (1 + prefix_share**2)  # a token's, of L (L + 1) / 2 + p L (p L - 1) / 2
    scores = 2 * model.num_layers * model.num_attention_heads * model.kv_channels * pairs
    # Below the projection of text nothing is trained: no gradient of its input.
    return 6.0 * (dense + routed + scores) + 4.0 * counts.text_projection


def tile_forward(model: ModelConfig) -> MediaForward:
    """Of one vision tile; zeros without a vision encoder."""
    if (vision := model.vision) is None:
        return MediaForward(0.0, 0.0)
    width, patches, out = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2, model.hidden_size
    layer = 2 * (4 * width + 2 * vision.ffn_hidden_size) * width + 4 * patches * width
    projector = 2 * (patches * width + vision.pooled_side**2 * out) * out  # the second matrix meets pooled rows
    return MediaForward(patches * vision.num_layers * layer, projector)


def chunk_forward(model: ModelConfig) -> MediaForward:
    """Of one chunk of sound; zeros without an audio encoder."""
    if (audio := model.audio) is None:
        return MediaForward(0.0, 0.0)
    width, ffn, queries = audio.hidden_size, audio.ffn_hidden_size, audio.num_query_tokens
    frames = int(audio.chunk_seconds * AUDIO_POSITIONS_PER_SECOND)
    encoder = frames * (2 * (4 * width + 2 * ffn) * width + 4 * frames * width)
    # Every decoder layer projects all frames to keys and values once more.
    decoder = queries * 2 * (8 * width + 2 * ffn) * width + frames * 4 * width * width
    decoder += 4 * queries * (queries + frames) * width
    return MediaForward(audio.num_encoder_layers * encoder, audio.num_decoder_layers * decoder)


def media_flops(model: ModelConfig, *, tiles: float, chunks: float, trained: Collection[str]) -> float:
    """Training FLOPs of the encoders on these media; ``trained``: names of the parts that are.

    A trained part costs two products in the backward for each of its forward, a frozen one above a trained one costs
    one (for the gradient of its input), and one below which nothing is trained costs its forward alone.
    """
    total = 0.0
    for name, number, forward in (("vision", tiles, tile_forward(model)), ("audio", chunks, chunk_forward(model))):
        tower = 3 if name in trained else 1
        projector = 3 if "projectors" in trained else 2 if name in trained else 1
        total += number * (tower * forward.tower + projector * forward.projector)
    return total


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
