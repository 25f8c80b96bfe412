"""The omnimodal model: encoders on the first pipeline stage, language model over all of them. Read this file first.

    hidden [S, B, H] = word embeddings of the ids
    hidden at IMAGE and VIDEO placeholders <- rows of vision(tiles), at AUDIO placeholders <- rows of audio(chunks),
                                              both in the order of the flattened [B, S] grid
    loss [B, S] or logits = language(hidden, 3D positions, who sees whom, token facts for the routers)

Encoders are whole on every tensor-parallel (TP) rank, and share the work: each computes ceil(N / TP) tiles (or chunks)
at most, and all gather the rows. The language model scatters hidden states over the sequence and gathers their gradient,
so every rank has all of it and takes back that of its own rows without a message. A rank's gradient of an encoder's
parameters is then of its own inputs: these are summed over the TP group after the backward, as those of data-parallel
ranks are.

A rank may lack inputs of a modality. Its encoder then runs on one empty input whose rows count zero times, if it is being
trained: every parameter takes part in every backward, which reductions that overlap with it rely on. Without overlap
nothing idle runs, but the backward still goes down to the embeddings.

Shapes: B rows, S tokens, H hidden size, N tiles or chunks, r rows of each.
"""

from collections.abc import Collection
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megatron_omni.batch import IGNORE_LABEL, OmniBatch
from megatron_omni.config.model import ModelConfig
from megatron_omni.models.encoders.audio import AudioEncoder
from megatron_omni.models.encoders.vision import VisionEncoder
from megatron_omni.models.encoders.weights import is_trainable
from megatron_omni.models.moe.context import RoutingStats, TokenContext
from megatron_omni.models.moe.routes import RouteRecord
from megatron_omni.platform.seeds import named_generator

if TYPE_CHECKING:
    from megatron_omni.models.language import LanguageModel


class OmniModel(MegatronModule):
    """Encoders and language model of one pipeline stage. Parameters: ``vision.*``, ``audio.*``, ``language.*``."""

    def __init__(
        self,
        language: "LanguageModel",
        model: ModelConfig,
        *,
        seed: int,
        pg: ProcessGroupCollection,
        overlap: bool = True,
        drawn: bool = True,
    ) -> None:
        """``language`` decides whether this stage embeds; encoder weights are ``drawn`` from ``seed`` and their names.

        ``overlap``: gradients are reduced while the backward goes on, and weights gathered while the forward does, in
        buckets. A trained encoder without input then runs on a small one that counts zero times: a bucket waits for all
        of its parameters. And parameters are registered in the order in which the forward uses them, encoders first:
        buckets follow that order. Without overlap gradient buffers that nothing wrote are zero and reduced all the same,
        and the trunk stays first: the gradient norm is summed in that order, to which such runs owe their last bits.
        """
        super().__init__(language.config)
        self.model_type = ModelType.encoder_or_decoder
        self.tp_group = pg.tp
        self.seed = seed
        self.pre_process = language.pre_process
        self.post_process = language.post_process
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        if not overlap:
            self.language = language
        self.overlap = overlap
        self.add_inputs(model)
        if overlap:
            self.language = language
        if drawn:
            self.draw_inputs()

    def add_inputs(self, model: ModelConfig) -> None:
        """Register the modules that this stage has before its trunk: encoders."""
        self.vision: VisionEncoder | None = None
        self.audio: AudioEncoder | None = None
        if self.pre_process and model.vision is not None:
            self.vision = VisionEncoder(model.vision, model.hidden_size)
        if self.pre_process and model.audio is not None:
            self.audio = AudioEncoder(model.audio, model.hidden_size)
        for encoder in filter(None, (self.vision, self.audio)):
            for parameter in encoder.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]  # its gradient is summed over TP

    def draw_inputs(self, only: Collection[str] | None = None) -> None:
        """Initial values of every parameter before the trunk, or of those called as in ``only``."""
        for prefix, encoder in (("vision.", self.vision), ("audio.", self.audio)):
            if encoder is None:
                continue
            wanted = [name for name, _ in encoder.named_parameters() if only is None or prefix + name in only]
            if len(wanted) == len(list(encoder.parameters())):
                encoder.draw_weights(self._generator, prefix=prefix)
            elif wanted:  # some are drawn from others, which are not to change
                whole = deepcopy(encoder)
                whole.draw_weights(self._generator, prefix=prefix)
                encoder.load_state_dict({name: whole.get_parameter(name) for name in wanted}, strict=False)

    def _generator(self, name: str) -> torch.Generator:
        return named_generator(self.seed, "weights", name)

    def forward(
        self,
        batch: OmniBatch,
        *,
        step: int,
        stochastic: bool,
        aux_loss_scale: float = 0.0,
        stats: RoutingStats | None = None,
        record: RouteRecord | None = None,
        compute_loss: bool = True,
        logits_positions: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_top: bool = False,
    ) -> Tensor:
        """Loss per token [B, S] (0 where nothing is learned), logits without ``compute_loss``, or hidden states.

        Hidden states [S / TP, B, H] come from every stage but the last. ``logits_positions`` [B, n] asks for logits at
        those positions only. ``record`` is told the routes of this stage's layers; ``batch.routes`` are replayed.
        ``temperature``, ``with_entropy`` and ``with_top`` are of the loss (models/language.py).
        """
        return self.language(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention=batch.attention,
            ctx=token_facts(
                batch,
                seed=self.seed,
                step=step,
                stochastic=stochastic,
                aux_loss_scale=aux_loss_scale,
                stats=stats,
                record=record,
            ),
            decoder_input=self.embed(batch) if self.pre_process else None,
            labels=batch.labels if compute_loss else None,
            label_places=batch.label_places,
            logits_positions=logits_positions,
            temperature=temperature,
            with_entropy=with_entropy,
            with_top=with_top,
        )

    def embed_ids(self, input_ids: Tensor) -> Tensor:
        """[S, B, H] of ``input_ids`` [B, S] alone; of the first pipeline stage."""
        return self.language.embed(input_ids)

    @property
    def num_input_ids(self) -> int:
        """Ids that a token of a prompt can have, from 0 on: those that can be chosen, where nothing else is said."""
        return self.language.model_config.vocab_size

    def embed(self, batch: OmniBatch) -> Tensor:
        """[S, B, H]: word embeddings with the encoders' rows in place of the placeholders."""
        idle = self.overlap  # encoders before the embedding: in the order of registration
        kept = batch.kept_rows
        media = [
            (places, kept.rows[name])
            if kept is not None and name in kept.rows
            else _encode(encoder, inputs, places, idle=idle, group=self.tp_group)
            for name, encoder, inputs, places in (
                ("vision", self.vision, batch.pixel_values, batch.picture_places),
                ("audio", self.audio, batch.audio_features, batch.sound_places),
            )
        ]
        if kept is not None and not kept.complete:
            for name, encoder, part in zip(("vision", "audio"), (self.vision, self.audio), media):
                if encoder is not None and part is not None and not is_trainable(encoder):
                    kept.rows[name] = part[1]
            kept.complete = len(kept.rows) == len([*filter(None, media)])
        hidden = self.embed_ids(batch.input_ids)
        for places, rows in filter(None, media):
            flat = hidden.reshape(-1, hidden.shape[-1])
            hidden = flat.index_copy(0, places, rows.to(hidden.dtype)).view_as(hidden)
        if not hidden.requires_grad and any(e is not None and _trains(e) for e in (self.vision, self.audio)):
            # Expert-parallel ranks meet in the backward of every MoE layer. Below a frozen trunk it would end early for a
            # micro-batch without media, and leave the ranks whose micro-batch has some waiting.
            hidden.requires_grad_()
        return hidden

    # -------------------------------------------------------------------------------- what Megatron asks of a model

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the previous pipeline stage, for the next forward."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Whose gradient Megatron sums over the two stages that hold a tied vocabulary."""
        return self.language.tied_parameter()


def token_facts(
    batch: OmniBatch,
    *,
    seed: int,
    step: int,
    stochastic: bool,
    aux_loss_scale: float,
    stats: RoutingStats | None,
    record: RouteRecord | None = None,
) -> TokenContext:
    """What routers must know about each token, for the full sequence in the order of hidden states: [S * B]."""

    def flat(per_token: Tensor) -> Tensor:
        return per_token.transpose(0, 1).flatten(0, 1)

    return TokenContext(
        sample_ids=flat(batch.sample_ids),
        sample_positions=flat(batch.sample_positions),
        modality=flat(batch.modality),
        has_label=flat(batch.labels != IGNORE_LABEL),
        padding=flat(batch.padding_mask),
        seed=seed,
        step=step,
        stochastic=stochastic,
        aux_loss_scale=aux_loss_scale,
        stats=stats,
        routes=None if batch.routes is None else flat(batch.routes),
        record=record,
    )


def _encode(
    encoder: VisionEncoder | AudioEncoder | None,
    inputs: Tensor | None,
    places: Tensor,
    *,
    idle: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor] | None:
    """``places`` [n] in the flattened [S, B] grid and the encoder's rows for them, [n, H]; None where there are none.

    ``idle``: no rows of a trained encoder instead (``overlap`` of OmniModel). The reader has checked that inputs, places
    and encoder belong together (data/collate.py).
    """
    if encoder is None:
        assert inputs is None and not len(places), "media for an encoder that the model has not"
        return None
    if inputs is None:
        assert not len(places), f"{len(places)} placeholders without media"
        return (places, _no_rows(encoder, idle=True)) if idle and _trains(encoder) else None
    rows = _shared_rows(encoder, inputs, idle=idle, group=group)
    assert len(rows) == len(places), f"{len(rows)} encoder rows for {len(places)} placeholders"
    return places, rows


def _shared_rows(
    encoder: VisionEncoder | AudioEncoder, inputs: Tensor, *, idle: bool, group: dist.ProcessGroup
) -> Tensor:
    """The encoder's rows of ``inputs`` [N, ...], [N r, H]: each rank of ``group`` computes ceil(N / TP) inputs at most."""
    share = -(-len(inputs) // group.size())
    mine = inputs[group.rank() * share :][:share]
    trains = _trains(encoder)
    with torch.set_grad_enabled(trains):
        rows = encoder(mine).flatten(0, 1) if len(mine) else _no_rows(encoder, idle=idle and trains)
        if group.size() == 1:
            return rows
        if len(mine) < share:
            rows = F.pad(rows, (0, 0, 0, share * encoder.rows_per_input - len(rows)))
        # The gradient that comes back is whole on every rank: it is split, not summed.
        gathered = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=group)
        return gathered[: len(inputs) * encoder.rows_per_input]


def _no_rows(encoder: VisionEncoder | AudioEncoder, *, idle: bool) -> Tensor:
    """[0, H]; ``idle``: of an empty input, so that every parameter takes part in the backward."""
    if idle:
        return encoder(encoder.idle_input()).flatten(0, 1)[:0]
    return next(encoder.parameters()).new_zeros(0, encoder.out_hidden)


def _trains(encoder: VisionEncoder | AudioEncoder) -> bool:
    return torch.is_grad_enabled() and is_trainable(encoder)
