"""The codec: sound to codes and back (WavTokenizer's architecture; docs/speech.md).

    codes = nearest entry of encoder(wave)        wave [B, T] -> [B, ceil(T / hop)]
    wave  = decoder(entries of codes)             [B, n] -> [B, n hop]

Released sizes: 24 kHz, 600 samples a code, 40 codes a second, one codebook of 4096. Files: codec_files.py; sound while codes
arrive: streaming.py; the released checkpoint: checkpoint/wavtokenizer.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.encoders.codec import build_encoder
from megatron_omni.models.encoders.weights import GeneratorFor
from megatron_omni.models.generators.codebook import Codebook, Quantised
from megatron_omni.models.generators.codec_files import load_codec, save_codec, weights_fingerprint
from megatron_omni.models.generators.streaming import StreamingDecoder
from megatron_omni.models.generators.wave_decoder import WaveDecoder

__all__ = ["Codec", "CodecOutput", "StreamingDecoder", "load_codec", "save_codec"]

LONGEST_WAVE = 1 << 24
"""Samples (11.6 minutes at 24 kHz). transformers counts frames in fp32, which is exact up to here."""


@dataclass
class CodecOutput:
    """What :meth:`Codec.forward` gives."""

    log_magnitude: Tensor
    """[B, n, N / 2 + 1], natural logarithm, of the sound's short-time spectrum (N = 4 hop); not clipped."""
    phase: Tensor
    """[B, n, N / 2 + 1]."""
    wave: Tensor
    """[B, n hop]."""
    encoded: Tensor
    """[B, n, D]: before the codebook."""
    quantised: Quantised | None
    """None where the codebook was left out."""


class Codec(nn.Module):
    """Encoder, codebook, decoder."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        check_sizes(config)
        self.config = config
        self.encoder = build_encoder(config)
        self.codebook = Codebook(config.num_codes, config.code_size)
        self.decoder = WaveDecoder(config)

    @property
    def hop_size(self) -> int:
        """Samples of a code."""
        return self.config.hop_size

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        return self.config.sample_rate

    @property
    def codes_per_second(self) -> float:
        """Of a sound."""
        return self.sample_rate / self.hop_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides codes and sound (:func:`weights_fingerprint`), computed at each call."""
        return weights_fingerprint(self.config, self.state_dict())

    def forward(self, wave: Tensor, *, row: int = 0, quantise: bool = True) -> CodecOutput:
        """``wave`` [B, T] through the whole codec.

        ``quantise`` is false before the codebook starts: it is left out, and norms go by their input, whatever
        ``decoder_span`` says.
        """
        self.decoder.by_input(not quantise)
        encoded = self.encoder(wave)
        quantised = self.codebook(encoded) if quantise else None
        log_magnitude, phase = self.decoder.spectrum(encoded if quantised is None else quantised.vectors, row)
        return CodecOutput(log_magnitude, phase, self.decoder.sound(log_magnitude, phase), encoded, quantised)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes [B, ceil(T / hop)], int64, of ``wave`` [B, T]: mono, at ``sample_rate``, about -1 to 1, all equally long.

        What the last code lacks of samples is filled by reflection (``seanet``) or silence (``mel``). ValueError for
        another shape, whole numbers, values that are not finite, or more than 2^24 samples.
        """
        self.check_wave(wave)
        if wave.shape[1] == 0:
            return torch.zeros(wave.shape[0], 0, dtype=torch.int64, device=wave.device)
        return self.codebook.nearest(self.encoder(wave.to(self.decoder.out.weight.dtype)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Sound [B, n hop] of ``codes`` [B, n]. ValueError for another shape or a code outside the codebook."""
        self.check_codes(codes)
        if codes.shape[1] == 0:
            return torch.zeros(codes.shape[0], 0, device=codes.device)
        return self.decoder(self.codebook.lookup(codes).to(self.decoder.out.weight.dtype))

    def check_wave(self, wave: Tensor) -> None:
        """ValueError unless :meth:`encode` can take it."""
        if wave.ndim != 2:
            raise ValueError(
                f"sound of shape {list(wave.shape)}: the codec takes [clips, samples] of one channel; mix stereo down "
                "(the mean of its channels)"
            )
        if not wave.is_floating_point():
            raise ValueError(f"sound of type {wave.dtype}: the codec takes floats from -1 to 1; divide 16-bit by 32768")
        if wave.shape[1] > LONGEST_WAVE:
            raise ValueError(f"sound of {wave.shape[1]} samples: at most {LONGEST_WAVE} at once; cut it into pieces")
        if not bool(wave.isfinite().all()):
            raise ValueError("sound with samples that are NaN or infinite; decode the recording again")

    def check_codes(self, codes: Tensor) -> None:
        """ValueError unless :meth:`decode` can take them."""
        if codes.ndim != 2 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(
                f"codes of shape {list(codes.shape)}, type {codes.dtype}: the codec takes whole [clips, n]"
            )
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.config.num_codes):
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())}: this codec has 0 to {self.config.num_codes - 1}; "
                "they are of another codec, or marks of the speech generator were left among them"
            )

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Weights for training from scratch; the codebook starts later (:meth:`Codebook.start`)."""
        self.encoder.draw_weights(generator_for, prefix=f"{prefix}encoder.")
        self.decoder.draw_weights(generator_for, prefix=f"{prefix}decoder.")


def check_sizes(config: CodecConfig) -> None:
    """ValueError for sizes that do not fit each other."""
    if config.hidden_size % 32:
        raise ValueError(
            f"model.codec.hidden_size={config.hidden_size}: must be a multiple of 32, the decoder's groups"
        )
    if config.hop_size % 2:
        raise ValueError(f"model.codec.strides={config.strides}: their product, {config.hop_size}, must be even")
    if config.decoder_span and len(config.decoder_span) != 2:
        raise ValueError(
            f"model.codec.decoder_span={config.decoder_span}: must be two numbers (before, after) or empty"
        )
