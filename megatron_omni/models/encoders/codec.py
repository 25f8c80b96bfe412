"""Encoders of the codec: waveform [B, T] to one vector a code, [B, ceil(T / hop), D].

``seanet`` (released: WavTokenizer, docs/speech.md) is transformers' ``EncodecEncoder`` with other sizes: not causal,
weight norm, ELU, reflect padding, a residual block and a strided convolution for each stride, a 2-layer LSTM with a skip.
``mel`` trains from scratch in minutes, where convolutions on the waveform do not start: two frames of a log-mel spectrogram a
code,

    M = log max(mel |STFT|, 1e-3)          [B, bins, 2 n], frames centred on the middle of each half code
    conv k5 | GELU | conv k4 stride 2 | 2 x (x + conv k3 GELU conv k3 (LayerNorm x)) | LayerNorm | conv k3
"""

import math

import torch
from torch import Tensor, nn
from transformers import EncodecConfig
from transformers.audio_utils import mel_filter_bank
from transformers.models.encodec.modeling_encodec import EncodecEncoder

from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal

LEAST_MAGNITUDE = 1e-3
"""Below it a mel band counts as silent."""
MEL_MEAN, MEL_SCALE = 0.0, 3.0
"""Log-mel values of speech are about 0 +- 3."""
ELU_GAIN = 1.245
"""1 / sqrt(E ELU(x)^2) for x ~ N(0, 1): what keeps the variance through an ELU and a convolution."""
WAVE_GAIN = 10.0
"""Of the first convolution: the root mean square of speech is about 0.1."""
RESIDUAL_BLOCKS = 2


def encodec_config(config: CodecConfig) -> EncodecConfig:
    """Transformers' configuration of the SEANet encoder."""
    return EncodecConfig(
        sampling_rate=config.sample_rate,
        audio_channels=1,
        hidden_size=config.code_size,
        num_filters=config.num_filters,
        num_residual_layers=1,
        upsampling_ratios=list(reversed(config.strides)),
        norm_type="weight_norm",
        kernel_size=7,
        last_kernel_size=7,
        residual_kernel_size=3,
        dilation_growth_rate=2,
        use_causal_conv=False,
        pad_mode="reflect",
        compress=2,
        num_lstm_layers=2,
        use_conv_shortcut=True,
    )


class SeanetEncoder(nn.Module):
    """WavTokenizer's encoder."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.seanet = EncodecEncoder(encodec_config(config))

    def forward(self, wave: Tensor) -> Tensor:
        """[B, T] to [B, n, D]."""
        return self.seanet(wave[:, None]).transpose(1, 2)

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Convolutions keep the variance of their input; biases 0; the LSTM uniform in +- D^-0.5."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                generator = generator_for(prefix + name)
                if ".lstm." in name:
                    bound = parameter.shape[0] // 4
                    value = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator)
                    parameter.copy_(value * bound**-0.5)
                elif name.endswith("original1"):
                    draw_normal(parameter, parameter[0].numel() ** -0.5, generator)
                elif name.endswith("original0"):
                    parameter.fill_(self._gain(name))
                else:
                    parameter.zero_()

    def _gain(self, name: str) -> float:
        """Norm of each filter: weight norm makes the variance behind it this squared."""
        if name.startswith("seanet.layers.0."):
            return WAVE_GAIN
        if ".shortcut." in name:
            return 0.5**0.5  # it and the block add up to the variance of one
        return ELU_GAIN * (0.5**0.5 if ".block.3." in name else 1.0)


class MelEncoder(nn.Module):
    """Convolutions on the log-mel spectrogram."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.hop_size = config.hop_size
        self.fft_size = mel_fft_size(config)
        width = config.encoder_hidden_size
        self.register_buffer("window", torch.hann_window(self.fft_size), persistent=False)
        self.register_buffer("filters", _mel_filters(config), persistent=False)
        self.first = nn.Conv1d(config.num_mel_bins, width, 5, padding=2)
        self.halving = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(_ResidualBlock(width) for _ in range(RESIDUAL_BLOCKS))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Conv1d(width, config.code_size, 3, padding=1)

    def forward(self, wave: Tensor) -> Tensor:
        """[B, T] to [B, n, D]."""
        hidden = nn.functional.gelu(self.first(self.log_mel(wave)))
        hidden = self.halving(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.last(hidden).transpose(1, 2)

    def log_mel(self, wave: Tensor) -> Tensor:
        """[B, T] to [B, bins, 2 n], scaled to about unit size. What a last code lacks of samples is silence."""
        missing = -wave.shape[1] % self.hop_size
        beside = (self.fft_size - self.hop_size // 2) // 2
        wave = nn.functional.pad(wave.to(self.window.dtype), (beside, missing + beside))
        frames = wave.unfold(1, self.fft_size, self.hop_size // 2)
        magnitude = torch.fft.rfft(frames * self.window).abs()
        mel = torch.log((magnitude @ self.filters).clamp(min=LEAST_MAGNITUDE))
        return (((mel - MEL_MEAN) / MEL_SCALE).transpose(1, 2)).to(self.first.weight.dtype)

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Convolutions N(0, 1 / fan-in), biases 0, norms 1."""
        norms = {id(module.weight) for module in self.modules() if isinstance(module, nn.LayerNorm)}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0 if id(parameter) in norms else 0.0)
                else:
                    draw_normal(parameter, parameter[0].numel() ** -0.5, generator_for(prefix + name))


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Conv1d(width, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.second(nn.functional.gelu(self.first(inner)))


def mel_fft_size(config: CodecConfig) -> int:
    """Samples of a frame: the power of two from 2.5 codes on (1024 at 400 samples a code)."""
    return int(2 ** math.ceil(math.log2(2.5 * config.hop_size)))


def _mel_filters(config: CodecConfig) -> Tensor:
    """[frequencies, bins], triangles on the HTK scale from 0 to half the sample rate."""
    filters = mel_filter_bank(
        mel_fft_size(config) // 2 + 1,
        config.num_mel_bins,
        0.0,
        config.sample_rate / 2,
        config.sample_rate,
        norm=None,
        mel_scale="htk",
    )
    return torch.from_numpy(filters).float()


def build_encoder(config: CodecConfig) -> SeanetEncoder | MelEncoder:
    """The encoder that ``config.encoder`` names."""
    return SeanetEncoder(config) if config.encoder == "seanet" else MelEncoder(config)
