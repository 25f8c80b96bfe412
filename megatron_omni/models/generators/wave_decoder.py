"""The codec's decoder: entries of the codebook to sound (WavTokenizer's "backbone" and "head"; docs/speech.md).

    x = conv k7 (vectors)                                                  [B, H, n]
    x = pos_net(x):    2 ResNet blocks, attention, 2 ResNet blocks, GroupNorm
    x = AdaNorm_b(x);  12 ConvNeXt blocks;  LayerNorm
    a | p = Linear(x)                                                      [B, n, 2 (N / 2 + 1)]
    S = min(exp a, 100) (cos p + i sin p),    sound = ISTFT(S)             N = 4 hop

    ResNet    x + conv3(drop swish GN conv3 swish GN x)         GN: GroupNorm(32, eps 1e-6)
    attention x + W_o softmax(q k^T / sqrt H) v of GN x         one head, the whole sequence, no mask, no positions
    ConvNeXt  x + gamma * W_2 gelu W_1 AdaNorm_b(depthwise conv k7 x)
    AdaNorm_b LayerNorm(x) * scale_b + shift_b                  rows b of two tables; row 0 at inference

GroupNorm and attention span the input, so that no part of the sound is independent of any code (streaming.py). With
``decoder_span`` [left, right] code t attends to t - left .. t + right, and GN subtracts and divides by fixed numbers instead of
the input's own: what is far away is not heard (local_decoder.py).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

from megatron_omni.config.generators import CodecConfig
from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal
from megatron_omni.models.generators.istft import istft

NUM_GROUPS, EPSILON = 32, 1e-6
LARGEST_MAGNITUDE = 100.0
FIRST_STD = 0.02
QUERY_BLOCK = 256
WINDOW_HOPS = 4
"""N / hop."""


class AdaptiveNorm(nn.Module):
    """Layer norm whose scale and shift are a row of two tables."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Embedding(num_rows, width), nn.Embedding(num_rows, width)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, hidden: Tensor, row: int) -> Tensor:
        """[..., H]."""
        return layer_norm(hidden, hidden.shape[-1:], self.scale.weight[row], self.shift.weight[row], EPSILON)


class InputNorm(nn.GroupNorm):
    """GroupNorm by the statistics of its input [B, H, n], or by fixed ones."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, *, fixed: bool) -> None:
        super().__init__(NUM_GROUPS, width, eps=EPSILON)
        self.is_fixed = fixed
        if fixed:
            self.register_buffer("mean", torch.zeros(NUM_GROUPS))
            self.register_buffer("variance", torch.ones(NUM_GROUPS))

    def forward(self, hidden: Tensor) -> Tensor:
        """The same shape."""
        if not self.is_fixed:
            return super().forward(hidden)
        each = self.num_channels // NUM_GROUPS
        scale = self.weight * (self.variance + EPSILON).rsqrt().repeat_interleave(each)
        shift = self.bias - self.mean.repeat_interleave(each) * scale
        return hidden * scale[:, None] + shift[:, None]


class ResnetBlock(nn.Module):
    """[B, H, n] to the same."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = _input_norm(config), _input_norm(config)
        self.conv1, self.conv2 = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(silu(self.norm1(hidden)))
        return hidden + self.conv2(self.dropout(silu(self.norm2(inner))))


class AttentionBlock(nn.Module):
    """[B, H, n] to the same."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, self.span = config.hidden_size, config.decoder_span
        self.norm = _input_norm(config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv1d(width, width, 1) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        query, key, value = (part(normed).transpose(1, 2) for part in (self.q, self.k, self.v))
        mix = partial(_attend_near, span=self.span) if self.span else scaled_dot_product_attention
        return hidden + self.proj_out(mix(query, key, value).transpose(1, 2))


class ConvNextBlock(nn.Module):
    """[B, H, n] to the same."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.dwconv = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = AdaptiveNorm(config.num_bandwidths, width)
        self.pwconv1 = nn.Linear(width, config.ffn_hidden_size)
        self.pwconv2 = nn.Linear(config.ffn_hidden_size, width)
        self.gamma = nn.Parameter(torch.full((width,), 1 / config.num_layers))

    def forward(self, hidden: Tensor, row: int) -> Tensor:
        inner = self.norm(self.dwconv(hidden).transpose(1, 2), row)
        inner = self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(inner)))
        return hidden + inner.transpose(1, 2)


class WaveDecoder(nn.Module):
    """Parameters by the released names, except for the head's (``out``, ``window``)."""

    window: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width, self.hop_size = config.hidden_size, config.hop_size
        window_size = WINDOW_HOPS * self.hop_size
        self.embed = nn.Conv1d(config.code_size, width, 7, padding=3)
        blocks = [ResnetBlock(config) for _ in range(4)]
        self.pos_net = nn.Sequential(*blocks[:2], AttentionBlock(config), *blocks[2:], _input_norm(config))
        self.norm = AdaptiveNorm(config.num_bandwidths, width)
        self.convnext = nn.ModuleList(ConvNextBlock(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(width, eps=EPSILON)
        self.out = nn.Linear(width, window_size + 2)
        self.register_buffer("window", torch.hann_window(window_size))

    def norms(self) -> list[InputNorm]:
        """GroupNorms, in the order in which the sound passes them."""
        return [part for part in self.modules() if isinstance(part, InputNorm)]

    def by_input(self, go: bool) -> None:
        """Whether a decoder with a span normalises by its input for now: as long as it has no statistics of its own."""
        for norm in self.norms():
            norm.is_fixed = hasattr(norm, "mean") and not go

    def spectrum(self, vectors: Tensor, row: int = 0) -> tuple[Tensor, Tensor]:
        """Log magnitude (natural, not yet clipped) and phase, each [B, n, N / 2 + 1], of ``vectors`` [B, n, D]."""
        hidden = self.pos_net(self.embed(vectors.transpose(1, 2)))
        hidden = self.norm(hidden.transpose(1, 2), row).transpose(1, 2)
        for block in self.convnext:
            hidden = block(hidden, row)
        log_magnitude, phase = self.out(self.final_layer_norm(hidden.transpose(1, 2))).chunk(2, dim=-1)
        return log_magnitude, phase

    def sound(self, log_magnitude: Tensor, phase: Tensor) -> Tensor:
        """[B, n hop] in fp32, whatever the weights are in."""
        magnitude = log_magnitude.to(self.window.dtype).exp().clamp(max=LARGEST_MAGNITUDE)
        return istft(torch.polar(magnitude, phase.to(self.window.dtype)), self.window, self.hop_size)

    def forward(self, vectors: Tensor, row: int = 0) -> Tensor:
        """[B, n, D] to [B, n hop]."""
        return self.sound(*self.spectrum(vectors, row))

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """N(0, 0.02) in ``embed`` and the ConvNeXt blocks, as released, N(0, 1 / fan-in) elsewhere; norms 1, biases 0."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1 or ".scale." in name or ".shift." in name:
                    continue
                std = FIRST_STD if name.startswith(("embed.", "convnext.")) else parameter[0].numel() ** -0.5
                draw_normal(parameter, std, generator_for(prefix + name))
            for module in self.modules():
                if isinstance(module, nn.Conv1d | nn.Linear) and module.bias is not None:
                    module.bias.zero_()


def _input_norm(config: CodecConfig) -> InputNorm:
    return InputNorm(config.hidden_size, fixed=bool(config.decoder_span))


def _attend_near(query: Tensor, key: Tensor, value: Tensor, *, span: Sequence[int]) -> Tensor:
    """Attention [B, n, H] of each code to those within ``span``, in blocks: memory grows with n, not its square."""
    left, right = span
    parts = []
    for start in range(0, query.shape[1], QUERY_BLOCK):
        queries = torch.arange(start, min(start + QUERY_BLOCK, query.shape[1]), device=query.device)
        first, last = max(0, start - left), min(query.shape[1], start + QUERY_BLOCK + right)
        distance = torch.arange(first, last, device=query.device) - queries[:, None]
        near = (distance >= -left) & (distance <= right)
        some = query[:, start : start + QUERY_BLOCK]
        parts.append(scaled_dot_product_attention(some, key[:, first:last], value[:, first:last], attn_mask=near))
    return torch.cat(parts, dim=1)
