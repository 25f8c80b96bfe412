"""From hidden rows of a block to what the diffusion transformer is told: caption rows, task vectors, vision rows.

    caption, task   Y = out_fc(decoder(Q, encoder(in_fc(X) + P)))      Q learned queries, P learned positions of the inputs
    vision          y = W x + b                                        of each row of the vision encoder, behind its aligner

Encoder and decoder are those of ``nn.Transformer``: norms before attention and MLP and at the end, ReLU, no masks, no
dropout. The released weights have no P and began with Q = 0: then all rows of Y are equal, and stay so where only a loss
teaches them that does not tell its rows apart. Names of parameters are the released ones (``in_fc``, ``tfm``,
``query_embs``, ``out_fc``; ``model``), behind ``image.caption.``, ``image.task.`` and ``image.visual.``.

Source: ``TextFcLayer`` of the published code of Uni-MoE-2.0-Omni (https://arxiv.org/abs/2511.12609).

Shapes: G blocks, T tokens of a block, H width of the language model, R queries, D width of what comes out.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu, scaled_dot_product_attention

from megatron_omni.config.pictures import ProjectorConfig
from megatron_omni.models.encoders.weights import GeneratorFor, draw_normal, draw_weights

QUERY_STD = 0.02
"""Of queries and input positions at the start."""


class TokenProjector(nn.Module):
    """[G, T, H] to [G, R, D]."""

    def __init__(
        self, config: ProjectorConfig, *, hidden_size: int, num_inputs: int, num_rows: int, out_size: int
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.query_init = config.query_init
        self.in_fc = nn.Linear(hidden_size, width)
        self.input_positions = nn.Parameter(torch.empty(num_inputs, width)) if config.input_positions else None
        self.tfm = _EncoderDecoder(config)
        self.query_embs = nn.Parameter(torch.empty(1, num_rows, width))
        self.out_fc = nn.Linear(width, out_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rows [G, R, D] of ``hidden`` [G, T, H]."""
        inputs = self.in_fc(hidden.to(self.in_fc.weight.dtype))
        if self.input_positions is not None:
            inputs = inputs + self.input_positions
        return self.out_fc(self.tfm(inputs, self.query_embs.expand(len(hidden), -1, -1)))

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str) -> None:
        """Initial values: those of the encoders, and of queries and positions as the configuration says."""
        draw_weights(self, generator_for, prefix=prefix)
        if self.query_init == "normal":
            draw_normal(self.query_embs, QUERY_STD, generator_for(f"{prefix}query_embs"))
        else:
            nn.init.zeros_(self.query_embs)
        if self.input_positions is not None:
            draw_normal(self.input_positions, QUERY_STD, generator_for(f"{prefix}input_positions"))


class VisualProjector(nn.Module):
    """[n, H] to [n, D], row by row."""

    def __init__(self, *, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.model = nn.Linear(hidden_size, out_size)

    def forward(self, rows: Tensor) -> Tensor:
        """[n, D] of the vision encoder's ``rows`` [n, H]."""
        return self.model(rows.to(self.model.weight.dtype))

    def draw_weights(self, generator_for: GeneratorFor, *, prefix: str) -> None:
        """Initial values, by the rules of the encoders."""
        draw_weights(self, generator_for, prefix=prefix)


class _EncoderDecoder(nn.Module):
    """``nn.Transformer`` with norms in front."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = _Stack(config, crossing=False), _Stack(config, crossing=True)

    def forward(self, inputs: Tensor, queries: Tensor) -> Tensor:
        return self.decoder(queries, self.encoder(inputs, None))


class _Stack(nn.Module):
    def __init__(self, config: ProjectorConfig, *, crossing: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config, crossing=crossing) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, rows: Tensor, memory: Tensor | None) -> Tensor:
        for layer in self.layers:
            rows = layer(rows, memory)
        return self.norm(rows)


class _Layer(nn.Module):
    """Self-attention, attention to the encoder's rows where the layer is ``crossing``, MLP; each behind its norm."""

    def __init__(self, config: ProjectorConfig, *, crossing: bool) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.self_attn = _Attention(width, heads)
        self.multihead_attn = _Attention(width, heads) if crossing else None
        self.linear1, self.linear2 = nn.Linear(width, config.ffn_hidden_size), nn.Linear(config.ffn_hidden_size, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width) if crossing else None

    def forward(self, rows: Tensor, memory: Tensor | None) -> Tensor:
        inside = self.norm1(rows)
        rows, last = rows + self.self_attn(inside, inside), self.norm2
        if self.multihead_attn is not None:
            assert memory is not None and self.norm3 is not None
            rows, last = rows + self.multihead_attn(self.norm2(rows), memory), self.norm3
        return rows + self.linear2(relu(self.linear1(last(rows))))


class _Attention(nn.Module):
    """``nn.MultiheadAttention``, whose own reads weights of a module that it does not call: with weights that are gathered
    while the forward goes on (parallel/wrap.py) these may be those of the step before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, others: Tensor) -> Tensor:
        """Of ``queries`` [G, n, W] to ``others`` [G, m, W]."""
        parts = zip((queries, others, others), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, w, b in parts)
        return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
