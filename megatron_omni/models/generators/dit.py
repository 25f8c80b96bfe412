"""The picture generator: a diffusion transformer with PixWizard's arithmetic and parameter names (docs/images_out.md).

    c = t_emb(t) + task_emb(task) + vision_emb(mean of the vision rows)                    [B, condition_size]
    h = x_embedder(patches of [x_t, source])                                               rows of patches first
    block:  u = norm1(h) (1 + s_a),  q = rope(q_norm(wq u))
            a = attn(q, rope(k_norm(wk u)), wv u)
              + tanh(gate_for_ii) attn(q, kii_norm(wk_ii m), wv_ii m)      m: vision rows that the block chooses
              + tanh(gate) attn(q, ky_norm(wk_y y), wv_y y)                y: caption rows, masked
            h = h + tanh(g_a) norm2(wo a),    h = h + tanh(g_f) ffn_norm2(w2 (silu(w1 f) * w3 f)),  f = ffn_norm1(h) (1 + s_f)
    v = linear(LN(h) (1 + s))                                                              the second half of it unused

One rotated q is used in all three attentions; only self-attention's keys are rotated. LayerNorms of q and k span all heads.
s_a, g_a, s_f, g_f = Linear(silu(c)). The 2-D rotary table: channel pairs turn by row f0, column f0, row f1, column f1, ...,
f_i = base^(-4 i / d).

A patch goes in as (channel, row, column) and comes out as (row, column, channel): so the released weights are.

Choice of vision rows, in each block: z = input_image_proj(vision); s = in_conv(z + y_pool_proj(task_emb)), the second half of s
replaced by its mean over the rows; logits = out_conv(s). The k = min(kept_vision_tokens, N) rows with the largest logits stay,
in their order. With ``noise`` (Gumbel, as the release draws even at inference) the choice is random. The gradient of the choice is
straight-through, softmax((logits + noise) / 5); an RMSNorm follows, which takes a factor on a row away again, so that little
is left of it: eps / (mean square + eps), 1e-5 for rows of size 1. ``kept_vision_tokens: 0`` keeps all rows and has none of the
layers that choose.

What of the conditions depends neither on t nor on x (the choice, keys and values of vision and caption, task_emb + vision_emb)
is a ``Memory``, made once a picture when drawing. Vision rows that are all zero, or none, add exactly 0.

Sources: PixWizard's models/model.py (https://github.com/AFeng-x/PixWizard), derived from Lumina-Next; written anew from
its description. Shapes: B pictures, T = h w / patch_size^2 patches, R caption rows, N vision rows, d = hidden_size / heads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from megatron_omni.config.pictures import DiTConfig
from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal, draw_weights
from megatron_omni.ops.dit import Rows, joint_attention, modulated_norm, rotary_norm, swiglu

EPSILON, FINAL_EPSILON = 1e-5, 1e-6
FREQUENCIES = 256
"""Channels of the embedding of t before its matrices: cosines, then sines."""
TIME_BASE = 10_000.0
TEMPERATURE = 5.0
EMBEDDING_STD = 0.02
LEAST_ROWS = 16
"""Vectors, one a picture, go through their matrices so many at a time at least: products of a few rows take another path on a
CPU, and a picture would depend in its last bits on how many are drawn beside it."""
ZERO_AT_FIRST = ("adaLN_modulation.1", "task_embedder.1", "global_semantic_embedder.1", "final_layer.linear")
"""Matrices that begin as zeros, so that each block begins as identity and the output as 0."""


class BlockMemory(NamedTuple):
    """What a block keeps of the conditions."""

    vision: Rows | None
    caption: Rows


@dataclass
class Memory:
    """What the generator keeps of the conditions of B pictures: good for every x and t."""

    vector: Tensor
    """[B, condition_size]: task and vision."""
    blocks: list[BlockMemory]


class Norm(nn.RMSNorm):
    """RMSNorm, what modulates it, and what it is added to (ops/dit.py)."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=EPSILON)

    def forward(self, x: Tensor, factor: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """[B, T, H] of ``x``, ``factor`` [B, H] and ``residual`` [B, T, H]."""
        return modulated_norm(x, self.weight, factor=factor, residual=residual, eps=EPSILON)


class RotaryNorm(nn.LayerNorm):
    """LayerNorm of all heads at once; each head's channel pairs then turn (ops/dit.py)."""

    def forward(self, x: Tensor, turns: Tensor | None = None, heads: int = 1) -> Tensor:
        """[B, heads, T, d] of ``x`` [B, T, heads d] with ``turns``; without, the norm alone, [B, T, heads d]."""
        if turns is None:
            return super().forward(x)
        return rotary_norm(x, self.weight, self.bias, turns=turns, heads=heads, eps=self.eps)


class Attention(nn.Module):
    """Self-attention of the patches, and theirs to vision and caption rows."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, self.heads, self.groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
        narrow = width // self.heads * self.groups
        self.wq, self.wo = _matrix(width, width), _matrix(width, width)
        self.wk, self.wv = _matrix(width, narrow), _matrix(width, narrow)
        self.wk_ii, self.wv_ii = _matrix(width, narrow), _matrix(width, narrow)
        self.wk_y, self.wv_y = _matrix(config.caption_size, narrow), _matrix(config.caption_size, narrow)
        self.gate, self.gate_for_ii = nn.Parameter(torch.zeros(self.heads)), nn.Parameter(torch.zeros(self.heads))
        self.q_norm, self.k_norm = RotaryNorm(width), RotaryNorm(narrow)
        self.ky_norm, self.kii_norm = nn.LayerNorm(narrow), nn.LayerNorm(narrow)

    def forward(self, hidden: Tensor, turns: Tensor, memory: BlockMemory, scale: float) -> Tensor:
        """[B, T, H]; ``scale`` of the scores of self-attention."""
        query = self.q_norm(self.wq(hidden), turns, self.heads)
        keys = self.k_norm(self.wk(hidden), turns, self.groups)
        vision = None if memory.vision is None else (memory.vision, self.gate_for_ii.tanh())
        caption = memory.caption, self.gate.tanh()
        return self.wo(joint_attention(query, keys, self.wv(hidden), scale=scale, vision=vision, caption=caption))

    def caption_rows(self, caption: Tensor, mask: Tensor) -> Rows:
        """Of normed caption rows [B, R, caption_size], masked."""
        return Rows(self.ky_norm(self.wk_y(caption)), self.wv_y(caption), mask)

    def vision_rows(self, vision: Tensor) -> Rows:
        """Of normed vision rows [B, k, H]."""
        return Rows(self.kii_norm(self.wk_ii(vision)), self.wv_ii(vision))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.w1, self.w2, self.w3 = _matrix(width, inner), _matrix(inner, width), _matrix(width, inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H]."""
        return self.w2(swiglu(self.w1(hidden), self.w3(hidden)))


class Block(nn.Module):
    """One layer, with its choice of vision rows."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, condition = config.hidden_size, config.condition_size
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm1, self.attention_norm2 = Norm(width), Norm(width)
        self.ffn_norm1, self.ffn_norm2 = Norm(width), Norm(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition, 4 * width))
        self.attention_y_norm, self.attention_input_norm = Norm(config.caption_size), Norm(width)
        self.input_image_proj = _matrix(config.vision_size, width)
        self.kept = config.kept_vision_tokens
        if self.kept:
            self.y_pool_proj = _matrix(condition, width)
            self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            self.out_conv = nn.Sequential(
                nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(), nn.Linear(width // 4, 1)
            )  # fmt: skip

    def forward(self, hidden: Tensor, condition: Tensor, turns: Tensor, memory: BlockMemory, scale: float) -> Tensor:
        """[B, T, H]; ``condition`` [B, condition_size]."""
        scale_a, gate_a, scale_f, gate_f = in_company(self.adaLN_modulation, condition).chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(hidden, 1 + scale_a), turns, memory, scale)
        hidden = self.attention_norm2(attended, gate_a.tanh(), hidden)
        fed = self.feed_forward(self.ffn_norm1(hidden, 1 + scale_f))
        return self.ffn_norm2(fed, gate_f.tanh(), hidden)

    def remember(
        self,
        caption: Tensor,
        mask: Tensor,
        task: Tensor,
        vision: Tensor,
        noise: Tensor | None,
        shown: Tensor | None = None,
    ) -> BlockMemory:
        """Of ``caption`` [B, R, caption_size] with its mask [B, R], embedded ``task`` [B, condition_size], ``vision``
        [B, N, vision_size] and Gumbel ``noise`` [B, N]; ``shown``: numbers of the pictures that have vision, None for all."""
        seen = None
        if vision.shape[1]:
            given = [part if part is None or shown is None else part[shown] for part in (vision, task, noise)]
            seen = self.attention.vision_rows(self.attention_input_norm(self.choose(*given)))  # type: ignore[arg-type]
            seen = seen if shown is None else _among(seen, shown, len(vision))
        return BlockMemory(seen, self.attention.caption_rows(self.attention_y_norm(caption), mask))

    def choose(self, vision: Tensor, task: Tensor, noise: Tensor | None) -> Tensor:
        """[B, k, H]: projected rows that the block attends to."""
        rows = self.input_image_proj(vision)
        # All rows stay: without a gradient there is nothing to compute.
        if not self.kept or (rows.shape[1] <= self.kept and not torch.is_grad_enabled()):
            return rows
        inner = self.in_conv(rows + in_company(self.y_pool_proj, task).unsqueeze(1))
        half = inner.shape[-1] // 2
        whole = inner[..., half:].mean(dim=1, keepdim=True).expand(-1, rows.shape[1], -1)
        logits = self.out_conv(torch.cat([inner[..., :half], whole], dim=-1)).squeeze(-1)
        logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
        if noise is not None:
            logits = logits + noise
        soft = (logits / TEMPERATURE).softmax(dim=-1)
        chosen = logits.topk(min(self.kept, rows.shape[1]), dim=-1).indices.sort(dim=-1).values
        soft = soft.gather(1, chosen)
        factor = (1 + (soft - soft.detach())).unsqueeze(-1).to(rows.dtype)  # exactly 1
        return rows.gather(1, chosen.unsqueeze(-1).expand(-1, -1, rows.shape[-1])) * factor


class TimeEmbedder(nn.Module):
    """t in [0, 1], not times 1000."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        """[B] to [B, size]."""
        dtype = next(self.mlp.parameters()).dtype
        wide = torch.promote_types(torch.float32, dtype)
        half = FREQUENCIES // 2
        powers = TIME_BASE ** (-torch.arange(half, dtype=wide, device=t.device) / half)
        angles = t.to(wide)[:, None] * powers
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return in_company(self.mlp, waves.to(dtype))


class FinalLayer(nn.Module):
    """To velocities."""

    def __init__(self, config: DiTConfig, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=FINAL_EPSILON)
        self.linear = nn.Linear(config.hidden_size, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.condition_size, config.hidden_size))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """[B, T, out]."""
        scale = in_company(self.adaLN_modulation, condition).unsqueeze(1)
        return self.linear(self.norm_final(hidden) * (1 + scale))


class DiT(nn.Module):
    """The generator. ``recompute``: in training a block keeps its input alone and is computed again for its gradient."""

    def __init__(self, config: DiTConfig, *, recompute: bool = False) -> None:
        super().__init__()
        heads = config.num_attention_heads
        assert config.hidden_size % (4 * heads) == 0 and heads % config.num_query_groups == 0
        self.config, self.recompute = config, recompute
        patch, channels = config.patch_size**2, config.latent_channels
        self.x_embedder = nn.Linear(patch * 2 * channels, config.hidden_size)
        self.t_embedder = TimeEmbedder(config.condition_size)
        self.task_embedder = _normed(config.task_size, config.condition_size)
        self.global_semantic_embedder = _normed(config.vision_size, config.condition_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config, patch * channels * (2 if config.learn_sigma else 1))
        # Fills a padded batch of sizes in PixWizard's training; sizes are grouped here. Kept for the released weights.
        self.pad_token = nn.Parameter(torch.zeros(config.hidden_size), requires_grad=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        source: Tensor,
        caption: Tensor,
        caption_mask: Tensor,
        task: Tensor,
        vision: Tensor,
        noise: Tensor | None = None,
        shown: Tensor | None = None,
        base_tokens: int = 0,
    ) -> Tensor:
        """Velocity [B, C, h, w], of ``x``'s type, at times ``t`` [B].

        ``source`` [B, C, h, w]: latents of the source picture, or zeros. ``caption`` [B, R, caption_size] with
        ``caption_mask`` [B, R], true where a row counts (a picture without any reads nothing); ``task`` [B, task_size];
        ``vision`` [B, N, vision_size], N may be 0; ``noise`` [B, layers, N]: Gumbel noise of the choice of vision rows.
        ``shown`` [n]: numbers of the pictures that have vision, None for all; rows of the others are constant zeros, which add
        0 and have gradients of 0, so nothing is computed of them.
        ``base_tokens``: scores of self-attention are multiplied by sqrt(log T / log base_tokens), as PixWizard draws
        ((resolution / 16)^2); 0: not. ValueError for sizes that do not fit.
        """
        self._check(x, source)
        dtype = self.x_embedder.weight.dtype
        caption, vision, embedded = caption.to(dtype), vision.to(dtype), in_company(self.task_embedder, task.to(dtype))
        condition = self.t_embedder(t) + self._vector(embedded, vision)
        hidden, turns, scale = self._begin(x, source, base_tokens)

        def block(layer: Block, hidden: Tensor, number: int) -> Tensor:
            drawn = None if noise is None else noise[:, number]
            memory = layer.remember(caption, caption_mask, embedded, vision, drawn, shown)
            return layer(hidden, condition, turns, memory, scale)

        for number, layer in enumerate(self._blocks):
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(block, layer, hidden, number, use_reentrant=False)
            else:
                hidden = block(layer, hidden, number)
        return self._end(hidden, condition, x)

    def remember(
        self, *, caption: Tensor, caption_mask: Tensor, task: Tensor, vision: Tensor, noise: Tensor | None = None
    ) -> Memory:
        """Of conditions as :meth:`forward` takes them."""
        dtype = self.x_embedder.weight.dtype
        caption, vision, embedded = caption.to(dtype), vision.to(dtype), in_company(self.task_embedder, task.to(dtype))
        blocks = [
            layer.remember(caption, caption_mask, embedded, vision, None if noise is None else noise[:, number])
            for number, layer in enumerate(self._blocks)
        ]
        return Memory(self._vector(embedded, vision), blocks)

    def velocity(self, x: Tensor, t: Tensor, *, source: Tensor, memory: Memory, base_tokens: int = 0) -> Tensor:
        """:meth:`forward` with conditions that were remembered."""
        self._check(x, source)
        condition = self.t_embedder(t) + memory.vector
        hidden, turns, scale = self._begin(x, source, base_tokens)
        for layer, kept in zip(self._blocks, memory.blocks, strict=True):
            hidden = layer(hidden, condition, turns, kept, scale)
        return self._end(hidden, condition, x)

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], [*self.layers])

    def _vector(self, task: Tensor, vision: Tensor) -> Tensor:
        mean = vision.mean(dim=1) if vision.shape[1] else vision.new_zeros(vision.shape[0], vision.shape[2])
        return task + in_company(self.global_semantic_embedder, mean)

    def _begin(self, x: Tensor, source: Tensor, base_tokens: int) -> tuple[Tensor, Tensor, float]:
        """Embedded patches [B, T, H], their turns [T, d / 2], the scale of self-attention."""
        size, (height, width) = self.config.patch_size, x.shape[2:]
        patches = torch.cat([x, source.to(x.dtype)], dim=1).to(self.x_embedder.weight.dtype)
        patches = patches.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        hidden = self.x_embedder(patches.flatten(3).flatten(1, 2))
        head = self.config.hidden_size // self.config.num_attention_heads
        angles = rotary_angles(height // size, width // size, head, self.config.rope_base)
        wide = torch.promote_types(torch.complex64, hidden.dtype)
        turns = torch.polar(torch.ones_like(angles), angles).to(x.device, wide)
        longer = math.log(hidden.shape[1], base_tokens) if base_tokens > 1 else 1.0
        return hidden, turns, (longer / head) ** 0.5

    def _end(self, hidden: Tensor, condition: Tensor, x: Tensor) -> Tensor:
        size, (height, width) = self.config.patch_size, x.shape[2:]
        out = self.final_layer(hidden, condition).view(x.shape[0], height // size, width // size, size, size, -1)
        out = out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return out[:, : self.config.latent_channels].to(x.dtype)

    def _check(self, x: Tensor, source: Tensor) -> None:
        channels, size = self.config.latent_channels, self.config.patch_size
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % size or x.shape[3] % size:
            raise ValueError(
                f"latents of shape {list(x.shape)}: this generator takes [B, {channels}, h, w], h and w multiples of {size}"
            )
        if source.shape != x.shape:
            raise ValueError(f"source latents of shape {list(source.shape)} beside {list(x.shape)}: must be the same")

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str = "") -> None:
        """Weights for training from scratch: matrices Xavier uniform, embeddings of t normal, gates and what modulates 0."""
        draw_weights(self, generator_for, prefix=prefix)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, nn.RMSNorm):
                    module.weight.fill_(1.0)
                if name.endswith(ZERO_AT_FIRST):
                    module.weight.zero_()
        for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "pad_token"):
            draw_normal(self.get_parameter(name), EMBEDDING_STD, generator_for(prefix + name))


def in_company(module: nn.Module, vectors: Tensor) -> Tensor:
    """``module`` of ``vectors`` [B, n], with zeros behind them where they are few."""
    count = vectors.shape[0]
    if count >= LEAST_ROWS or vectors.device.type != "cpu":
        return module(vectors)
    return module(pad(vectors, (0, 0, 0, LEAST_ROWS - count)))[:count]


def _among(rows: Rows, shown: Tensor, pictures: int) -> Rows:
    """``rows`` of the pictures ``shown`` beside masked ones of the others."""
    keys, values = (x.new_zeros(pictures, *x.shape[1:]).index_copy(0, shown, x) for x in (rows.keys, rows.values))
    mask = shown.new_zeros(keys.shape[:2], dtype=torch.bool).index_fill(0, shown, True)
    return Rows(keys, values, mask)


def rotary_angles(rows: int, columns: int, head: int, base: float) -> Tensor:
    """[rows columns, head / 2] fp64 angles of channel pairs: row f0, column f0, row f1, column f1, ..."""
    frequencies = base ** (-4 * torch.arange(head // 4, dtype=torch.float64) / head)
    down = torch.arange(rows, dtype=torch.float64)[:, None, None] * frequencies
    across = torch.arange(columns, dtype=torch.float64)[None, :, None] * frequencies
    return torch.stack([down.expand(-1, columns, -1), across.expand(rows, -1, -1)], dim=-1).flatten(2).flatten(0, 1)


def _matrix(size_in: int, size_out: int) -> nn.Linear:
    return nn.Linear(size_in, size_out, bias=False)


def _normed(size_in: int, size_out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(size_in, eps=EPSILON), nn.Linear(size_in, size_out))
