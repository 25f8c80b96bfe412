"""The language trunk on Megatron's hybrid model. The only file that touches ``HybridModel`` and ``HybridStack``.

A transformer block is two hybrid layers: attention ``*`` and then a dense FFN ``-`` or a mixture of experts ``E``;
``|`` separates pipeline stages, which may differ (28 MoE blocks on 2 stages: ``*E`` x 13, ``|``, ``*E`` x 15). Against
upstream this file adds: 3D rotary positions, our core attention, a final norm and layer specs that need no Transformer Engine, the
token context that MoE layers read, recomputation that replays it, a loss that computes logits for labelled tokens
only, a chunk of them at a time (ops/token_log_probs.py), and rows of new tokens that are trained where the vocabulary is
frozen (token_rows.py).

Shapes: S sequence, B rows, H width; hidden states are [S, B, H], under sequence parallelism [S / TP, B, H] between
layers.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from megatron_omni.config.model import ModelConfig
from megatron_omni.config.parallel import LOGITS_CHUNK, ParallelConfig, stage_blocks
from megatron_omni.config.parts import NEW_TOKEN_ROWS
from megatron_omni.estimate import padded_vocab_size
from megatron_omni.models.attention import CoreAttention, current_cache
from megatron_omni.models.decoding import cached_layers, product
from megatron_omni.models.moe.context import TokenContext, token_context, without_stats
from megatron_omni.models.rope import rotary_angles, rotation
from megatron_omni.models.token_rows import NewTokenRows
from megatron_omni.ops.token_log_probs import token_log_probs
from megatron_omni.platform import adam
from megatron_omni.platform.device import accelerator_present
from megatron_omni.segments import AttentionSegments

logger = logging.getLogger(__name__)

ATTENTION, DENSE, MOE, STAGE = "*", "-", "E", "|"


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, in fp32. Its gradient is summed over tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        # Decoding alone: any other forward without gradients, of old log-probabilities, has the bits of one with them.
        if current_cache() is not None:  # one tensor as large as x where the other way has six
            size = x.shape[-1]
            scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().add_(size * self.eps)
            return (wide * scale.rsqrt_().mul_(size**0.5)).to(x.dtype).mul_(self.weight)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def layer_pattern(blocks: Sequence[int], *, moe: bool) -> str:
    """Hybrid pattern of equal blocks, so many on each pipeline stage."""
    return STAGE.join((ATTENTION + (MOE if moe else DENSE)) * count for count in blocks)


def vocab_rows(model: ModelConfig, tensor_size: int) -> int:
    """Padded vocabulary, checked to divide over ``tensor_size`` ranks."""
    padded = padded_vocab_size(model)
    if padded % tensor_size != 0:
        raise ValueError(
            f"model.make_vocab_size_divisible_by={model.make_vocab_size_divisible_by} pads the vocabulary to {padded} rows, which "
            f"parallel.tensor_model_parallel_size={tensor_size} does not divide; use a multiple of {tensor_size}"
        )
    return padded


@functools.cache
def spec_provider() -> BackendSpecProvider:
    """Linear layers and norms: Transformer Engine's where it and an accelerator are there, else Megatron's own."""
    if accelerator_present() and HAVE_TE:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        logger.info(
            "backends: linear=transformer_engine norm=transformer_engine attention=transformer_engine adam=%s",
            adam.name(),
        )
        return TESpecProvider()
    attention = "torch_varlen" if accelerator_present() else "torch_flash_cpu"  # ops/segment_attention.py
    logger.info("backends: linear=megatron_local norm=own attention=%s adam=%s", attention, adam.name())
    return LocalSpecProvider()


def stack_spec(model: ModelConfig) -> ModuleSpec:
    """What Megatron builds for each symbol of the pattern."""
    provider = spec_provider()
    norm: Any = RMSNorm if isinstance(provider, LocalSpecProvider) else provider.layer_norm(rms_norm=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=CoreAttention,
            linear_proj=provider.row_parallel_linear(),
        ),
    )
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
        ),
    )

    def feed_forward(module: Any) -> ModuleSpec:
        parts = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=module, mlp_bda=get_bias_dropout_add)
        return ModuleSpec(module=TransformerLayer, submodules=parts)

    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
            ),
        ),
        mlp_layer=feed_forward(mlp),
    )
    if model.moe is not None:
        from megatron_omni.models.moe.layer import OmniMoELayer

        layers.moe_layer = feed_forward(functools.partial(OmniMoELayer, moe=model.moe))
    return ModuleSpec(module=OmniStack, submodules=layers, params={"norm": norm})


class OmniStack(HybridStack):
    """Megatron's layers with our forward loop: a token context around each layer, inside what recomputation replays."""

    recompute: str = "none"
    """``ParallelConfig.recompute``; set by :class:`LanguageModel`."""

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, *, norm: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor | None,
        attention: AttentionSegments,
        rotary_pos_emb: Tensor | None,
        ctx: TokenContext | None,
    ) -> Tensor:
        """Hidden states after this stage's layers; the first stage gets them as argument, the others from the
        schedule.
        """
        hidden = hidden_states if self.pre_process else self.input_tensor
        assert hidden is not None, "no hidden states: the previous stage's output was not set"
        cache = current_cache()
        if cache is not None:
            is_attention = [kind == ATTENTION for kind in self.layer_type_list]
            hidden = cached_layers(zip(is_attention, self.layers), hidden, cache, ctx)
            return self.final_norm(hidden) if self.post_process else hidden
        layers = list(zip(self.layer_type_list, self.layers))
        at_once = 2 if self.recompute == "full" else 1  # a block keeps one input, its attention's
        for start in range(0, len(layers), at_once):
            kinds, block = zip(*layers[start : start + at_once])
            call = functools.partial(_run_layers, block, attention_mask=attention, rotary_pos_emb=rotary_pos_emb)
            replayed = self.recompute == "full" or (self.recompute == "moe" and MOE in kinds)
            if replayed and self.training and torch.is_grad_enabled():
                hidden = _checkpointed(call, hidden, ctx)
            else:
                hidden = call(hidden, ctx)
        if self.post_process:
            hidden = self.final_norm(hidden)
        # The schedule frees a stage's output after sending it, which it cannot do to a view.
        return make_viewless_tensor(hidden, requires_grad=hidden.requires_grad, keep_graph=True)


def _run_layers(layers: Sequence[Any], hidden: Tensor, ctx: TokenContext | None, **inputs: Any) -> Tensor:
    with token_context(ctx):
        for layer in layers:
            hidden, _ = layer(hidden_states=hidden, **inputs)
    return hidden


def _checkpointed(call: Any, hidden: Tensor, ctx: TokenContext | None) -> Tensor:
    """``call(hidden, ctx)``, computed again in the backward pass, then without counting its tokens a second time."""
    contexts = [ctx]

    def run(hidden: Tensor) -> Tensor:
        return call(hidden, contexts.pop() if contexts else None if ctx is None else without_stats(ctx))

    # Stopping early would let ranks with different saved tensors (an expert without tokens) skip different collectives.
    with set_checkpoint_early_stop(False):
        return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)


class LanguageModel(HybridModel):
    """Embedding, this stage's blocks, output layer."""

    logits_chunk = LOGITS_CHUNK

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, parallel: ParallelConfig, *, pg: ProcessGroupCollection
    ) -> None:
        tensor_size, stages = pg.tp.size(), pg.pp.size()
        blocks = stage_blocks(parallel, model.num_layers)
        assert len(blocks) == stages, "process groups of another layout"
        super().__init__(
            config,
            hybrid_stack_spec=stack_spec(model),
            vocab_size=vocab_rows(model, tensor_size),
            max_sequence_length=model.max_position_embeddings,
            hybrid_layer_pattern=layer_pattern(blocks, moe=model.moe is not None),
            pre_process=pg.pp.rank() == 0,
            post_process=pg.pp.rank() == stages - 1,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            pg_collection=pg,
        )
        self.model_config, self.stage_blocks = model, blocks
        self.decoder.recompute = parallel.recompute
        if self.post_process:
            # The loss gathers the sequence itself, to keep only labelled tokens: the output layer then gets whole rows.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = tensor_size > 1
            if model.output_bias:
                # The layer knows what to do with one, but Megatron's model does not ask for it.
                bias = torch.nn.Parameter(torch.zeros_like(self.output_layer.weight[:, 0]))
                set_tensor_model_parallel_attributes(bias, is_parallel=True, dim=0, stride=1)
                self.output_layer.bias = bias

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings [S, B, H] of ``input_ids`` [B, S], the full sequence on every tensor-parallel rank."""
        rows = _new_token_rows(self.embedding)
        if rows is None:
            embedded = self.embedding.word_embeddings(input_ids)
        else:
            trained = rows(self.embedding.word_embeddings.weight)
            embedded = rows.looked_up(self.embedding.word_embeddings(input_ids), trained, input_ids)
        return embedded.transpose(0, 1).contiguous()

    def train_new_token_rows(self, ids: Sequence[int]) -> None:
        """Train the rows of tokens ``ids`` of this stage's frozen vocabulary matrices, as parameters of their own.

        Call it before weights are loaded and the model is wrapped. What is saved and loaded are matrices with these rows.
        """
        for holder, matrix in self._vocabulary():
            if matrix.requires_grad:
                continue
            rows = NewTokenRows(matrix, ids, tp_group=self.pg_collection.tp)
            weight: Any = rows.weight  # Megatron hangs what it must know of a parameter on it
            weight.sequence_parallel = True  # each rank's gradient is of its own tokens and ids: they are summed
            weight.shared_embedding = getattr(matrix, "shared_embedding", False)
            weight.shared = getattr(matrix, "shared", False)
            self.get_submodule(holder).add_module(NEW_TOKEN_ROWS, rows)

    @torch.no_grad()
    def take_new_token_rows(self) -> None:
        """Make the trained rows those of their matrices, after these were given values."""
        for _, matrix, rows in self._trained_rows():
            rows.weight.copy_(rows.of(matrix))

    def tied_parameter(self) -> Tensor | None:
        """What the first and the last stage both hold of a tied vocabulary: the matrix, or its trained rows."""
        matrix = self.shared_embedding_or_output_weight()
        rows = (
            _new_token_rows(self.embedding if self.pre_process else self.output_layer) if matrix is not None else None
        )
        return matrix if rows is None else rows.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, with whole matrices; trained rows are listed too, for the optimizer's state of them."""
        for _, matrix, rows in self._trained_rows():
            rows.write_into(matrix)
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for holder, _, _ in self._trained_rows():
            if self.share_embeddings_and_output_weights and holder == "output_layer":
                # A copy of the first stage's, as the matrix is.
                name = f"{prefix}{holder}.{NEW_TOKEN_ROWS}.weight"
                key, replica = f"{prefix}embedding.{NEW_TOKEN_ROWS}.weight", (1, *state[name].replica_id[1:])
                state[name] = replace(state[name], key=key, replica_id=replica)
        return state

    def _vocabulary(self) -> Iterator[tuple[str, Tensor]]:
        """(module that holds it, matrix) of this stage's vocabulary matrices; a tied one is the embedding's."""
        if self.pre_process:
            yield "embedding", self.embedding.word_embeddings.weight
        if self.post_process and self.output_layer.weight is not None:
            yield "output_layer", self.output_layer.weight

    def _trained_rows(self) -> Iterator[tuple[str, Tensor, NewTokenRows]]:
        """(module that holds them, matrix, rows) of the matrices of which only new tokens' rows are trained."""
        for holder, matrix in self._vocabulary():
            rows = _new_token_rows(self.get_submodule(holder))
            if rows is not None:
                yield holder, matrix, rows

    def forward(  # type: ignore[override]
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention: AttentionSegments,
        ctx: TokenContext | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        label_places: Tensor | None = None,
        logits_positions: Tensor | None = None,
        hidden_places: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_top: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of each token [B, S] fp32 (0 where unlabelled) with ``labels``, else logits; hidden states on earlier
        stages.

        The loss is -log softmax(logits / ``temperature``), what a sampler at that temperature draws from;
        ``with_entropy``: [2, B, S], the loss and the entropy of that distribution in nats. ``with_top``: one more, 1 where
        the label is the most probable token.

        ``position_ids`` [3, B, S]; ``attention`` says who sees whom in the [B, S] grid; ``ctx`` of the full sequence in
        [S * B] order; ``decoder_input`` [S, B, H] replaces the word embeddings; ``label_places`` [n] says where ``labels``
        has any (batch.py); ``logits_positions`` [B, n] selects the positions whose logits [B, n, V] are wanted (all when
        None). With ``hidden_places`` [..], places in the flattened [S, B] grid, the last stage also gives the rows [.., H] of
        its last layer there, behind the final norm.
        """
        size, tensor_size = position_ids.shape[2], self.pg_collection.tp.size()
        if size % tensor_size != 0:
            raise ValueError(
                f"sequence of {size} tokens under parallel.tensor_model_parallel_size={tensor_size}: pad it to a "
                f"multiple (data.pad_to_multiple_of)"
            )
        if self.config.fine_grained_activation_offloading and torch.is_grad_enabled():
            self.preprocess_for_fine_grained_offloading()
        hidden = None
        if self.pre_process:
            hidden = self.embed(input_ids) if decoder_input is None else decoder_input
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        angles = rotary_angles(
            position_ids,
            head_dim=self.model_config.kv_channels,
            base=self.model_config.rotary_base,
            sections=self.model_config.mrope_section,
        )
        cache = current_cache()
        if cache is not None:
            cache.rotation = rotation(angles, self.config.pipeline_dtype)
        hidden = self.decoder(hidden, attention, angles if cache is None else None, self._shard_of(ctx))
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            # Every rank computes the same gradient for the whole sequence below: it is split, not summed, on the way
            # back.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if labels is None:
            output = self._logits(hidden, logits_positions)
        else:
            assert label_places is not None, "labels without their places"
            asked = {"with_entropy": with_entropy, "with_top": with_top}
            output = self._loss(hidden, labels, label_places, temperature=temperature, **asked)
        if hidden_places is None:
            return output
        rows = hidden.flatten(0, 1).index_select(0, hidden_places.flatten())
        return output, rows.view(*hidden_places.shape, hidden.shape[-1])

    def _shard_of(self, ctx: TokenContext | None) -> TokenContext | None:
        """The part of ``ctx`` that describes this rank's sequence shard."""
        tensor_size = self.pg_collection.tp.size()
        if ctx is None or tensor_size == 1:
            return ctx
        rank = self.pg_collection.tp.rank()
        tokens = {f.name: getattr(ctx, f.name) for f in fields(ctx) if isinstance(getattr(ctx, f.name), Tensor)}
        return replace(ctx, **{name: value.chunk(tensor_size)[rank] for name, value in tokens.items()})

    def _output(self, hidden: Tensor, *, gather: bool) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        rows = _new_token_rows(self.embedding if weight is not None and self.pre_process else self.output_layer)
        if rows is None and current_cache() is not None and self.pg_collection.tp.size() == 1:
            return product(self.output_layer, hidden, weight)
        if rows is None:
            return self.output_layer(hidden, weight=weight, runtime_gather_output=gather)[0]
        trained = rows(self.output_layer.weight if weight is None else weight)
        logits = self.output_layer(hidden, weight=weight, runtime_gather_output=False)[0]
        logits = rows.scored(logits, trained, hidden)
        return gather_from_tensor_model_parallel_region(logits, group=self.pg_collection.tp) if gather else logits

    def _logits(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """[B, n, V] logits of ``positions`` [B, n] of ``hidden`` [S, B, H]."""
        rows = hidden.transpose(0, 1)
        if positions is not None:
            rows = rows.gather(1, positions.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        return self._output(rows, gather=True)[..., : self.model_config.vocab_size]

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        places: Tensor,
        *,
        temperature: float,
        with_entropy: bool,
        with_top: bool,
    ) -> Tensor:
        """[B, S] cross entropy of ``labels`` [B, S], or [1 + n, B, S] with what is asked for; the output layer sees labelled
        rows only, a chunk at a time."""

        def logits(rows: Tensor) -> Tensor:
            found = self._output(rows.unsqueeze(1), gather=False).squeeze(1)
            # In fp32, as the sampler divides.
            return (
                found if temperature == 1.0 else found.to(torch.promote_types(found.dtype, torch.float32)) / temperature
            )

        # By numbers of rows: by a mask, their count would have to come back from the device, in the backward as well.
        found = token_log_probs(
            logits,
            hidden.flatten(0, 1).index_select(0, places),
            labels.t().flatten().index_select(0, places),
            parameters=self._output_parameters(),
            num_columns=self.vocab_size // self.pg_collection.tp.size(),
            vocab_size=self.model_config.vocab_size,
            group=self.pg_collection.tp,
            with_entropy=with_entropy,
            with_top=with_top,
            # So many that the rows of a chunk, and with them the bits of a product, do not depend on who asks for entropy.
            chunk_elements=self.logits_chunk * (1 + with_entropy),
        )

        def grid(values: Tensor) -> Tensor:
            return values.new_zeros(labels.numel()).index_copy(0, places, values).view(hidden.shape[:2]).t()

        loss = -found.log_prob
        more = [found.entropy, None if found.is_top is None else found.is_top.to(loss.dtype)]
        grids = [grid(values) for values in (loss, *more) if values is not None]
        return grids[0] if len(grids) == 1 else torch.stack(grids)

    def _output_parameters(self) -> list[Tensor]:
        """Every parameter that :meth:`_output` computes with."""
        tied = self.share_embeddings_and_output_weights and self.pre_process
        return list((self.embedding if tied else self.output_layer).parameters())


def _new_token_rows(module: torch.nn.Module) -> NewTokenRows | None:
    """The rows that ``module`` trains of its frozen matrix."""
    return getattr(module, NEW_TOKEN_ROWS, None)
