"""The picture generator written out from its description, in float64, loop by loop: what models/generators/dit.py is held
against. Nothing here comes from the package but the sizes."""

import math

import torch
from torch import Tensor

from megatron_omni.config.pictures import DiTConfig

Weights = dict[str, Tensor]


def velocity(
    w: Weights,
    config: DiTConfig,
    x: Tensor,
    t: Tensor,
    source: Tensor,
    caption: Tensor,
    mask: Tensor,
    task: Tensor,
    vision: Tensor,
    noise: Tensor | None = None,
    base_tokens: int = 0,
) -> Tensor:
    """[B, C, h, w], one picture after the other. ``noise`` [B, layers, N]."""
    pictures = range(x.shape[0])
    return torch.stack(
        [
            _one(
                w, config, x[b], t[b], source[b], caption[b], mask[b], task[b], vision[b],
                None if noise is None else noise[b], base_tokens,
            )
            for b in pictures
        ]
    )  # fmt: skip


def _one(w, config, x, t, source, caption, mask, task, vision, noise, base_tokens):
    p, channels = config.patch_size, config.latent_channels
    both = torch.cat([x, source])
    rows, columns = x.shape[1] // p, x.shape[2] // p
    tokens = []
    for r in range(rows):
        for k in range(columns):
            patch = [
                both[c, r * p + i, k * p + j] for c in range(2 * channels) for i in range(p) for j in range(p)
            ]  # channel, row, column
            tokens.append(w["x_embedder.weight"] @ torch.stack(patch) + w["x_embedder.bias"])
    h = torch.stack(tokens)

    wave = [t * 10000 ** (-i / 128) for i in range(128)]
    wave = torch.stack([v.cos() for v in wave] + [v.sin() for v in wave])
    t_emb = _linear(w, "t_embedder.mlp.2", _silu(_linear(w, "t_embedder.mlp.0", wave)))
    task_emb = _linear(w, "task_embedder.1", _layer_norm(w, "task_embedder.0", task))
    mean = vision.sum(0) / vision.shape[0]
    seen = _linear(w, "global_semantic_embedder.1", _layer_norm(w, "global_semantic_embedder.0", mean))
    cond = t_emb + task_emb + seen

    for n in range(config.num_layers):
        gumbel = None if noise is None else noise[n]
        h = _block(w, f"layers.{n}.", config, h, columns, cond, task_emb, caption, mask, vision, gumbel, base_tokens)

    scale = _linear(w, "final_layer.adaLN_modulation.1", _silu(cond))
    out = torch.zeros(channels, *x.shape[1:], dtype=x.dtype)
    of_out = 2 * channels if config.learn_sigma else channels
    pieces = []
    for row in h:
        centred = row - row.mean()
        normed = centred / (centred.square().mean() + 1e-6).sqrt()
        pieces.append(_linear(w, "final_layer.linear", normed * (1 + scale)))
    index = [
        [
            ((r // p) * columns + k // p, ((r % p) * p + k % p) * of_out)  # token; row, column, channel
            for k in range(x.shape[2])
        ]
        for r in range(x.shape[1])
    ]
    flat = torch.stack(pieces)
    return (
        torch.stack(
            [torch.stack([torch.stack([flat[a, b + c] for a, b in line]) for line in index]) for c in range(channels)]
        )
        + 0 * out
    )


def _block(w, name, config, h, columns, cond, task_emb, caption, mask, vision, gumbel, base_tokens):
    width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
    d = width // heads
    scale_a, gate_a, scale_f, gate_f = _linear(w, name + "adaLN_modulation.1", _silu(cond)).split(width)
    u = _rms(w, name + "attention_norm1", h) * (1 + scale_a)
    a = name + "attention."
    q = _layer_norm(w, a + "q_norm", u @ w[a + "wq.weight"].T)
    k = _layer_norm(w, a + "k_norm", u @ w[a + "wk.weight"].T)
    v = u @ w[a + "wv.weight"].T
    m = _rms(w, name + "attention_input_norm", _chosen(w, name, config, task_emb, vision, gumbel))
    k_ii = _layer_norm(w, a + "kii_norm", m @ w[a + "wk_ii.weight"].T)
    v_ii = m @ w[a + "wv_ii.weight"].T
    y = _rms(w, name + "attention_y_norm", caption)
    k_y = _layer_norm(w, a + "ky_norm", y @ w[a + "wk_y.weight"].T)
    v_y = y @ w[a + "wv_y.weight"].T
    longer = math.log(len(h)) / math.log(base_tokens) if base_tokens else 1.0
    outs = []
    for head in range(heads):
        group = head // (heads // groups)
        mine, of_group = slice(head * d, head * d + d), slice(group * d, group * d + d)
        q_h = _turned(q[:, mine], columns, config.rope_base)
        k_h = _turned(k[:, of_group], columns, config.rope_base)
        out = _attend(q_h, k_h, v[:, of_group], None, longer)
        out = out + w[a + "gate_for_ii"][head].tanh() * _attend(q_h, k_ii[:, of_group], v_ii[:, of_group], None)
        out = out + w[a + "gate"][head].tanh() * _attend(q_h, k_y[:, of_group], v_y[:, of_group], mask)
        outs.append(out)
    attended = torch.cat(outs, dim=1) @ w[a + "wo.weight"].T
    h = h + gate_a.tanh() * _rms(w, name + "attention_norm2", attended)
    f = _rms(w, name + "ffn_norm1", h) * (1 + scale_f)
    f = name + "feed_forward.", f
    inner = _silu(f[1] @ w[f[0] + "w1.weight"].T) * (f[1] @ w[f[0] + "w3.weight"].T)
    return h + gate_f.tanh() * _rms(w, name + "ffn_norm2", inner @ w[f[0] + "w2.weight"].T)


def _chosen(w, name, config, task_emb, vision, gumbel):
    rows = vision @ w[name + "input_image_proj.weight"].T
    if not config.kept_vision_tokens:
        return rows
    s = rows + w[name + "y_pool_proj.weight"] @ task_emb
    s = _gelu(_linear(w, name + "in_conv.1", _layer_norm(w, name + "in_conv.0", s)))
    half = config.hidden_size // 2
    s = torch.cat([s[:, :half], s[:, half:].mean(0).expand(len(s), -1)], dim=1)
    s = _gelu(_linear(w, name + "out_conv.0", s))
    logits = _linear(w, name + "out_conv.4", _gelu(_linear(w, name + "out_conv.2", s)))[:, 0]
    soft = ((logits + (0 if gumbel is None else gumbel)) / 5).softmax(0)
    k = min(config.kept_vision_tokens, len(rows))
    best = sorted(sorted(range(len(rows)), key=lambda i: -soft[i].item())[:k])
    hard = torch.zeros_like(soft)
    hard[best] = 1
    through = hard - soft.detach() + soft
    return torch.stack([rows[i] * through[i] for i in best])


def _attend(q, k, v, mask, longer=1.0):
    scores = q @ k.T * math.sqrt(longer / q.shape[1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(1) @ v


def _turned(rows, columns, base):
    d = rows.shape[1]
    out = []
    for n, row in enumerate(rows):
        place = (n // columns, n % columns)
        pairs = []
        for pair in range(d // 2):
            angle = place[pair % 2] * base ** (-4 * (pair // 2) / d)
            a, b = row[2 * pair], row[2 * pair + 1]
            pairs += [
                a * math.cos(angle) - b * math.sin(angle),
                a * math.sin(angle) + b * math.cos(angle),
            ]
        out.append(torch.stack(pairs))
    return torch.stack(out)


def _linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def _layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * w[name + ".weight"] + w[name + ".bias"]


def _rms(w, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]


def _silu(x):
    return x / (1 + (-x).exp())


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
