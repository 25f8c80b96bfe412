"""Whisper encoder, Whisper decoder as Q-former, linear projector: log-mel chunks to language rows (paper section 2.2).

    frames  [C, 50 per second, D] = tower(log-mel [C, mel bins, 100 per second])
    queries [C, Q, D]             = decoder layers over Q learned query vectors, cross-attending to the frames
    rows    [C, Q, H]             = Linear

Query j stands for the j-th Q-th of the chunk. Self-attention among queries is causal, as Hugging Face's decoder is, or
bidirectional by ``causal_queries: false``. Both are built from Hugging Face's Whisper under its parameter names; the
decoder's token table has no use here and does not exist.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import (
    WhisperDecoderLayer,
    WhisperEncoder,
    WhisperPositionalEmbedding,
)

from megatron_omni.config.model import AudioConfig
from megatron_omni.models.encoders.replay import run_layer
from megatron_omni.models.encoders.weights import (
    GeneratorFor,
    draw_normal,
    draw_weights,
    is_trainable,
)

FRAMES_PER_SECOND = 50
"""Encoder positions; the log-mel input has twice as many."""
ALIGNED_QUERY_SIZE, ALIGNED_SHARPNESS, ALIGNED_VALUE_GAIN = 0.3, 2.0, 3.0
ALIGNED_CONVOLUTION_GAIN, ALIGNED_BRANCH_GAIN = 2.0, 0.05
"""Of ``query_init: aligned``; chosen on spoken words (docs/log.md)."""


def whisper_config(config: AudioConfig) -> WhisperConfig:
    """Hugging Face's configuration, without dropout; the vocabulary is the smallest that it accepts."""
    positions = config.chunk_seconds * FRAMES_PER_SECOND
    if positions != int(positions):
        raise ValueError(
            f"model.audio.chunk_seconds={config.chunk_seconds}: must be a multiple of {1 / FRAMES_PER_SECOND} s, "
            "one position of the audio encoder"
        )
    whisper = WhisperConfig(
        vocab_size=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        num_mel_bins=config.num_mel_bins,
        d_model=config.hidden_size,
        encoder_layers=config.num_encoder_layers,
        decoder_layers=config.num_decoder_layers,
        encoder_attention_heads=config.num_attention_heads,
        decoder_attention_heads=config.num_attention_heads,
        encoder_ffn_dim=config.ffn_hidden_size,
        decoder_ffn_dim=config.ffn_hidden_size,
        max_source_positions=int(positions),
        max_target_positions=config.max_target_positions,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    whisper._attn_implementation = "sdpa"
    return whisper


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Whisper's sinusoidal embedding [n, width] at any positions, fractions included."""
    half = width // 2
    rates = torch.exp(-torch.log(torch.tensor(10_000.0, dtype=torch.float64)) / (half - 1) * torch.arange(half))
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class WhisperQformer(nn.Module):
    """Whisper's decoder layers over learned queries."""

    def __init__(self, config: AudioConfig, whisper: WhisperConfig) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.embed_positions = WhisperPositionalEmbedding(config.max_target_positions, config.hidden_size)
        layers = [WhisperDecoderLayer(whisper, i) for i in range(config.num_decoder_layers)]
        for layer in layers:  # without a mask, SDPA is causal exactly where the module says so
            layer.self_attn.is_causal = config.causal_queries
        self.layers = nn.ModuleList(layers)
        self.layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, frames: Tensor, *, recompute: bool = False) -> Tensor:
        num_queries = self.query_tokens.shape[1]
        hidden = self.query_tokens + self.embed_positions.weight[:num_queries]
        hidden = hidden.expand(frames.shape[0], -1, -1)
        for layer in self.layers:
            hidden = run_layer(layer, hidden, None, frames, use_cache=False, recompute=recompute)
        return self.layer_norm(hidden)


class AudioEncoder(nn.Module):
    """Tower, Q-former and projector."""

    recompute = False
    """Layers are replayed in the backward (``parallel.recompute: full``); set by models/build.py."""

    def __init__(self, config: AudioConfig, out_hidden: int) -> None:
        super().__init__()
        self.config, self.out_hidden = config, out_hidden
        whisper = whisper_config(config)
        self.tower = WhisperEncoder(whisper)
        self.qformer = WhisperQformer(config, whisper)
        self.projector = nn.Linear(config.hidden_size, out_hidden)

    def forward(self, audio_features: Tensor) -> Tensor:
        """[C, mel bins, frames] to [C, Q, H]."""
        return self.project(self.features(audio_features))

    def features(self, audio_features: Tensor) -> Tensor:
        """[C, mel bins, frames] to the tower's [C, 50 per second, D]. A frozen one keeps nothing for the backward."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trainable(self.tower)):
            return self._encode(audio_features.to(self.projector.weight.dtype))

    def project(self, frames: Tensor) -> Tensor:
        """[C, 50 per second, D] to [C, Q, H]."""
        rows: Tensor = self.projector(self.qformer(frames, recompute=self.recompute))
        return rows

    def _encode(self, audio_features: Tensor) -> Tensor:
        """``WhisperEncoder.forward`` without its output capturing."""
        tower = self.tower
        expected = 2 * tower.max_source_positions
        assert audio_features.shape[-1] == expected, f"{audio_features.shape[-1]} mel frames, not {expected}"
        hidden = nn.functional.gelu(tower.conv1(audio_features))
        hidden = nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight
        for layer in tower.layers:
            hidden = run_layer(layer, hidden, None, recompute=self.recompute)
        return tower.layer_norm(hidden)

    @property
    def rows_per_input(self) -> int:
        """Q."""
        return self.config.num_query_tokens

    def idle_input(self) -> Tensor:
        """The smallest input, for a micro-batch without sound: one chunk of zeros."""
        return self.projector.weight.new_zeros(1, self.config.num_mel_bins, 2 * self.tower.max_source_positions)

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Weights for training from scratch.

        Encoder positions are Whisper's fixed sinusoids; decoder positions and queries N(0, 0.02). ``query_init:
        aligned`` starts with an alignment instead of having to find one: query j is the sinusoid of the encoder
        position in the middle of its span, and cross-attention begins as a similarity (query matrix = 2 x key matrix),
        so that it looks at its span. Convolutions are drawn twice as wide, for sound to stand out against the
        unit-sized positions; queries smaller and cross-attention values larger, for it to stand out in the Q-former's
        residual stream; the other branches (self-attention, feed-forward) start small. Otherwise a tiny model has
        outputs that hardly differ between clips, and stays at chance for thousands of steps.
        """
        draw_weights(self, generator_for, prefix=prefix)
        width, num_positions = self.config.hidden_size, self.tower.max_source_positions
        with torch.no_grad():
            self.tower.embed_positions.weight.copy_(sinusoids(torch.arange(num_positions), width))
            for name in ("qformer.query_tokens", "qformer.embed_positions.weight"):
                draw_normal(self.get_parameter(name), 0.02, generator_for(prefix + name))
            if self.config.query_init == "aligned":
                self._align_queries(num_positions / self.config.num_query_tokens)

    def _align_queries(self, span: float) -> None:
        middles = (torch.arange(self.config.num_query_tokens) + 0.5) * span - 0.5
        self.qformer.query_tokens.copy_(ALIGNED_QUERY_SIZE * sinusoids(middles, self.config.hidden_size)[None])
        layer: Any
        for layer in self.qformer.layers:
            layer.encoder_attn.q_proj.weight.copy_(ALIGNED_SHARPNESS * layer.encoder_attn.k_proj.weight)
            layer.encoder_attn.v_proj.weight.mul_(ALIGNED_VALUE_GAIN)
        for convolution in (self.tower.conv1, self.tower.conv2):
            convolution.weight.mul_(ALIGNED_CONVOLUTION_GAIN)
        for layer in (*self.tower.layers, *self.qformer.layers):
            for branch in (layer.self_attn.out_proj, layer.fc2):
                branch.weight.mul_(ALIGNED_BRANCH_GAIN)
