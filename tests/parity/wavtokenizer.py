"""WavTokenizer from its formulas (docs/speech.md), in float64 on the released keys, and those keys with their shapes.

Written from the description, with no module of ours or of transformers: convolutions are sums over shifted inputs, the Fourier
transform a matrix.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

ENCODEC, CODEBOOK = "feature_extractor.encodec.", "feature_extractor.encodec.quantizer.vq.layers.0._codebook."
STRIDES, HOP, WINDOW = [4, 5, 5, 6], 600, 2400
State = Mapping[str, Tensor]


def released_shapes() -> dict[str, list[int]]:
    """The 289 keys of the released checkpoint without discriminators."""
    shapes: dict[str, list[int]] = {}
    for part, blocks in (("encoder", _encoder_shapes()), ("decoder", _unused_shapes())):
        for key, shape in blocks:
            shapes[f"{ENCODEC}{part}.model.{key}"] = shape
    shapes |= {f"{CODEBOOK}{name}": [4096, 512] for name in ("embed", "embed_avg")}
    shapes |= {f"{CODEBOOK}cluster_size": [4096], f"{CODEBOOK}inited": [1]}
    shapes |= {f"backbone.{key}": shape for key, shape in _backbone_shapes()}
    return shapes | {"head.out.weight": [2402, 768], "head.out.bias": [2402], "head.istft.window": [2400]}


def _normed(name: str, outputs: int, inputs: int, size: int) -> Iterator[tuple[str, list[int]]]:
    yield f"{name}.weight_g", [outputs, 1, 1]
    yield f"{name}.weight_v", [outputs, inputs, size]
    yield f"{name}.bias", [outputs]


def _residual(name: str, width: int) -> Iterator[tuple[str, list[int]]]:
    yield from _normed(f"{name}.block.1.conv.conv", width // 2, width, 3)
    yield from _normed(f"{name}.block.3.conv.conv", width, width // 2, 1)
    yield from _normed(f"{name}.shortcut.conv.conv", width, width, 1)


def _lstm(name: str) -> Iterator[tuple[str, list[int]]]:
    for layer in (0, 1):
        for side in ("ih", "hh"):
            yield f"{name}.lstm.weight_{side}_l{layer}", [2048, 512]
            yield f"{name}.lstm.bias_{side}_l{layer}", [2048]


def _encoder_shapes() -> Iterator[tuple[str, list[int]]]:
    yield from _normed("0.conv.conv", 32, 1, 7)
    for i, stride in enumerate(STRIDES):
        width = 32 << i
        yield from _residual(str(1 + 3 * i), width)
        yield from _normed(f"{3 + 3 * i}.conv.conv", 2 * width, width, 2 * stride)
    yield from _lstm("13")
    yield from _normed("15.conv.conv", 512, 512, 7)


def _unused_shapes() -> Iterator[tuple[str, list[int]]]:
    yield from _normed("0.conv.conv", 512, 512, 7)
    yield from _lstm("1")
    for i, stride in enumerate([8, 5, 4, 2]):
        width = 512 >> i
        yield f"{3 + 3 * i}.convtr.convtr.weight_g", [width, 1, 1]
        yield f"{3 + 3 * i}.convtr.convtr.weight_v", [width, width // 2, 2 * stride]
        yield f"{3 + 3 * i}.convtr.convtr.bias", [width // 2]
        yield from _residual(str(4 + 3 * i), width // 2)
    yield from _normed("15.conv.conv", 1, 32, 7)


def _pair(name: str, *weight: int) -> Iterator[tuple[str, list[int]]]:
    yield f"{name}.weight", list(weight)
    yield f"{name}.bias", [weight[0]]


def _backbone_shapes() -> Iterator[tuple[str, list[int]]]:
    yield from _pair("embed", 768, 512, 7)
    for block in (0, 1, 3, 4):
        for i in (1, 2):
            yield from _pair(f"pos_net.{block}.norm{i}", 768)
            yield from _pair(f"pos_net.{block}.conv{i}", 768, 768, 3)
    yield from _pair("pos_net.2.norm", 768)
    for name in ("q", "k", "v", "proj_out"):
        yield from _pair(f"pos_net.2.{name}", 768, 768, 1)
    yield from _pair("pos_net.5", 768)
    yield from ((f"norm.{name}.weight", [4, 768]) for name in ("scale", "shift"))
    for block in range(12):
        yield f"convnext.{block}.gamma", [768]
        yield from _pair(f"convnext.{block}.dwconv", 768, 1, 7)
        yield from ((f"convnext.{block}.norm.{name}.weight", [4, 768]) for name in ("scale", "shift"))
        yield from _pair(f"convnext.{block}.pwconv1", 2304, 768)
        yield from _pair(f"convnext.{block}.pwconv2", 768, 2304)
    yield from _pair("final_layer_norm", 768)


# ------------------------------------------------------------------------------------------------ encoder


def encode(state: State, wave: Tensor) -> Tensor:
    """[T] to the encoder's vectors [n, 512]."""
    at = f"{ENCODEC}encoder.model."
    x = _padded_conv(state, f"{at}0.conv.conv", wave.double()[None], 1)
    for i, stride in enumerate(STRIDES):
        name = f"{at}{1 + 3 * i}"
        inner = _padded_conv(state, f"{name}.block.1.conv.conv", _elu(x), 1)
        inner = _padded_conv(state, f"{name}.block.3.conv.conv", _elu(inner), 1)
        x = _padded_conv(state, f"{name}.shortcut.conv.conv", x, 1) + inner
        x = _padded_conv(state, f"{at}{3 + 3 * i}.conv.conv", _elu(x), stride)
    y = x.T
    for layer in (0, 1):
        y = _run_lstm(state, f"{at}13.lstm", layer, y)
    return _padded_conv(state, f"{at}15.conv.conv", _elu(x + y.T), 1).T


def codes(state: State, vectors: Tensor) -> Tensor:
    """Numbers [n] of the nearest entries, by their distance as it is defined."""
    entries = state[f"{CODEBOOK}embed"].double()
    return torch.stack([(entries - vector).square().sum(1).argmin() for vector in vectors])


def _elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x.clamp(max=0)) - 1)


def _padded_conv(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """[C, T] to [C', ceil(T / stride)]: g v / |v|, reflection of k - stride values, and what fills the last stride."""
    v, g = state[f"{name}.weight_v"].double(), state[f"{name}.weight_g"].double()
    weight = g * v / v.square().sum((1, 2), keepdim=True).sqrt()
    size, length = weight.shape[2], x.shape[1]
    total = size - stride
    count = math.ceil((length - size + total) / stride + 1)
    extra = (count - 1) * stride + size - total - length
    right = total // 2
    x = _reflect(x, total - right, right + extra)
    windows = x.unfold(1, size, stride)
    return torch.einsum("ock,cnk->on", weight, windows) + state[f"{name}.bias"].double()[:, None]


def _reflect(x: Tensor, left: int, right: int) -> Tensor:
    missing = max(0, max(left, right) - x.shape[1] + 1)
    x = torch.cat([x, x.new_zeros(x.shape[0], missing)], 1)
    places = torch.arange(-left, x.shape[1] + right - missing).abs()
    last = x.shape[1] - 1
    return x[:, torch.where(places > last, 2 * last - places, places)]


def _run_lstm(state: State, name: str, layer: int, x: Tensor) -> Tensor:
    weights = {k: state[f"{name}.{k}_l{layer}"].double() for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    hidden = cell = x.new_zeros(x.shape[1])
    out = []
    for value in x:
        gates = weights["weight_ih"] @ value + weights["bias_ih"] + weights["weight_hh"] @ hidden + weights["bias_hh"]
        i, f, g, o = gates.chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        out.append(hidden)
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------ decoder


def decode(state: State, vectors: Tensor, row: int = 0) -> Tensor:
    """Entries [n, 512] to sound [600 n]."""
    x = _conv(state, "backbone.embed", vectors.double().T, 3)
    for block in (0, 1, 2, 3, 4):
        x = x + (_attention(state, x) if block == 2 else _resnet(state, f"backbone.pos_net.{block}", x))
    x = _group_norm(state, "backbone.pos_net.5", x)
    x = _adaptive_norm(state, "backbone.norm", x.T, row).T
    for block in range(12):
        name = f"backbone.convnext.{block}"
        depthwise = torch.nn.functional.pad(x, (3, 3)).unfold(1, 7, 1)
        inner = torch.einsum("ck,cnk->cn", state[f"{name}.dwconv.weight"].double()[:, 0], depthwise)
        inner = _adaptive_norm(state, f"{name}.norm", (inner + _bias(state, f"{name}.dwconv")).T, row)
        inner = _linear(state, f"{name}.pwconv1", inner)
        inner = _linear(state, f"{name}.pwconv2", inner * 0.5 * (1 + torch.erf(inner / 2**0.5)))
        x = x + (state[f"{name}.gamma"].double() * inner).T
    last = _layer_norm(x.T) * state["backbone.final_layer_norm.weight"].double()
    out = _linear(state, "head.out", last + state["backbone.final_layer_norm.bias"].double())
    log_magnitude, phase = out[:, :1201], out[:, 1201:]
    magnitude = torch.minimum(torch.exp(log_magnitude), torch.tensor(100.0))
    return inverse_stft(magnitude * torch.exp(1j * phase), WINDOW, HOP)


def inverse_stft(spectrum: Tensor, size: int, hop: int) -> Tensor:
    """[n, size / 2 + 1] to [n hop]: every sample from the sums that define it."""
    k, t = torch.arange(size // 2 + 1).double(), torch.arange(size).double()
    twice = torch.where((k == 0) | (k == size // 2), 1.0, 2.0)  # the negative frequencies; both ends are real
    angles = 2 * math.pi * k[:, None] * t / size
    frames = (spectrum.real * twice) @ torch.cos(angles) / size - (spectrum.imag * twice) @ torch.sin(angles) / size
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * t / size)
    length = (len(frames) - 1) * hop + size
    sums, weights = torch.zeros(length).double(), torch.zeros(length).double()
    for i, frame in enumerate(frames):
        sums[i * hop : i * hop + size] += frame * window
        weights[i * hop : i * hop + size] += window**2
    beside = (size - hop) // 2
    return (sums[beside : length - beside]) / weights[beside : length - beside]


def _bias(state: State, name: str) -> Tensor:
    return state[f"{name}.bias"].double()[:, None]


def _conv(state: State, name: str, x: Tensor, beside: int) -> Tensor:
    weight = state[f"{name}.weight"].double()
    windows = torch.nn.functional.pad(x, (beside, beside)).unfold(1, weight.shape[2], 1)
    return torch.einsum("ock,cnk->on", weight, windows) + _bias(state, name)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()


def _layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def _adaptive_norm(state: State, name: str, x: Tensor, row: int) -> Tensor:
    scale, shift = (state[f"{name}.{kind}.weight"][row].double() for kind in ("scale", "shift"))
    return _layer_norm(x) * scale + shift


def _group_norm(state: State, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(32, -1)
    normed = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return normed.reshape(x.shape) * state[f"{name}.weight"].double()[:, None] + _bias(state, name)


def _resnet(state: State, name: str, x: Tensor) -> Tensor:
    for i in (1, 2):
        x = _group_norm(state, f"{name}.norm{i}", x)
        x = _conv(state, f"{name}.conv{i}", x / (1 + torch.exp(-x)), 1)
    return x


def _attention(state: State, x: Tensor) -> Tensor:
    normed = _group_norm(state, "backbone.pos_net.2.norm", x)
    q, k, v = (_conv(state, f"backbone.pos_net.2.{name}", normed, 0) for name in "qkv")
    scores = torch.exp(q.T @ k / 768**0.5)
    mixed = v @ (scores / scores.sum(1, keepdim=True)).T
    return _conv(state, "backbone.pos_net.2.proj_out", mixed, 0)
