"""The released speech generator in float64, from its formulas (speech.md 3.1, 3.2), on tensors under its own names.

    [C+4 PROMPT C+5] [C+6 PREFIX C+7]? [C TEXT C+8] [C+1 y_1 .. y_n]       ids of ``audio_embedding``; text through the table

Everything before C+1 sees all of itself; C+1 and the codes are causal and see it. Positions 0 .. L-1, rotary base 10,000,
RMSNorm with 1e-6, SwiGLU. The mixture: softmax over the experts, the two largest, divided by their sum.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def released_logits(
    weights: Mapping[str, Tensor],
    *,
    heads: int,
    prompt: Sequence[int],
    prefix: Sequence[int],
    text: Sequence[int],
    codes: Sequence[int],
) -> Tensor:
    """[n + 1, C + 9]: of the start of codes and of each of the n ``codes``. ``weights`` have no prefix in their names."""
    w = {key: value.double() for key, value in weights.items()}
    marks = w["audio_embedding.weight"].shape[0] - 9

    def sound(*ids: int) -> Tensor:
        return w["audio_embedding.weight"][torch.tensor(ids)]

    def words(ids: Sequence[int]) -> Tensor:
        if "embed_tokens.weight" in w:  # the predecessor
            return w["embed_tokens.weight"][torch.tensor(list(ids))]
        return F.linear(w["qwenvl_embed_tokens.weight"][torch.tensor(list(ids))], w["in_fnn.weight"], w["in_fnn.bias"])

    parts = [sound(marks + 4), words(prompt), sound(marks + 5)]
    if prefix:
        parts += [sound(marks + 6, *prefix, marks + 7)]
    parts += [sound(marks), words(text), sound(marks + 8)]
    told = sum(len(part) for part in parts)
    x = torch.cat([*parts, sound(marks + 1, *codes)])
    mask = torch.ones(len(x), len(x)).tril().bool()
    mask[:told, :told] = True
    layer = 0
    while f"layers.{layer}.input_layernorm.weight" in w:
        x = _block(
            {k.removeprefix(f"layers.{layer}."): v for k, v in w.items() if k.startswith(f"layers.{layer}.")},
            x,
            mask,
            heads,
        )
        layer += 1
    x = _norm(x, w["norm.weight"])
    return F.linear(x[told:], w["out_fnn.weight"], w["out_fnn.bias"])


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _rotated(x: Tensor) -> Tensor:
    """[heads, L, d]: halves of a head are the two coordinates of its planes."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _block(w: Mapping[str, Tensor], x: Tensor, mask: Tensor, heads: int) -> Tensor:
    normed, size = _norm(x, w["input_layernorm.weight"]), w["self_attn.q_proj.weight"].shape[0] // heads
    q, k, v = (
        F.linear(normed, w[f"self_attn.{n}_proj.weight"], w[f"self_attn.{n}_proj.bias"])
        .unflatten(1, (-1, size))
        .transpose(0, 1)
        for n in "qkv"
    )
    q, k = _rotated(q), _rotated(k)
    k, v = (part.repeat_interleave(heads // len(part), 0) for part in (k, v))
    scores = (q @ k.transpose(1, 2) / math.sqrt(size)).masked_fill(~mask, -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = x + mixed @ w["self_attn.o_proj.weight"].t()
    normed = _norm(x, w["post_attention_layernorm.weight"])
    if "mlp.gate_proj.weight" in w:
        return x + _swiglu(w, "mlp.", normed)
    gate = "mlp.deepspeed_moe.gate.wg.weight"
    chances, chosen = (normed @ w[gate].t()).softmax(-1).topk(2, dim=-1)
    shares = torch.zeros(len(x), w[gate].shape[0], dtype=torch.float64).scatter(
        1, chosen, chances / chances.sum(-1, keepdim=True)
    )
    experts = [_swiglu(w, f"mlp.deepspeed_moe.experts.deepspeed_experts.{e}.", normed) for e in range(w[gate].shape[0])]
    return x + sum(shares[:, e : e + 1] * said for e, said in enumerate(experts))


def _swiglu(w: Mapping[str, Tensor], part: str, x: Tensor) -> Tensor:
    gate, up = (F.linear(x, w[f"{part}{name}_proj.weight"]) for name in ("gate", "up"))
    return F.linear(F.silu(gate) * up, w[f"{part}down_proj.weight"])
