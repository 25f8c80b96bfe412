"""The omnimodal model: encoders on the first pipeline stage, language model over all of them. Read this file first.

    hidden [S, B, H] = word embeddings of the ids
    hidden at IMAGE and VIDEO placeholders <- rows of vision(tiles), at AUDIO placeholders <- rows of audio(chunks),
                                              both in the order of the flattened [B, S] grid
    loss [B, S] or logits = language(hidden, 3D positions, who sees whom, token facts for the routers)

Under context parallelism (CP) a rank embeds, computes and scores its own tokens of every row, and gets the losses of all
(context_parallel.py).

Encoders are whole on every tensor-parallel (TP) and CP rank, and share the work: each computes ceil(N / (TP x CP)) tiles
(or chunks) at most, and all gather the rows. The language model scatters hidden states over the sequence and gathers their
gradient, so every TP rank has all of it and takes back that of its own rows without a message; a CP rank has that of its own
tokens, and they are summed on the way back. A rank's gradient of an encoder's parameters is then of its own inputs: these
are summed over both groups after the backward, as those of data-parallel ranks are.

A rank may lack inputs of a modality. Its encoder then runs on one empty input whose rows count zero times, if it is being
trained: every parameter takes part in every backward, which reductions that overlap with it rely on. Without overlap
nothing idle runs, but the backward still goes down to the embeddings.

A model that draws (``model.image``) has its generator on the last stage (generators/image.py). The forward then also gives
what that reads: the last layer's rows at the blocks of drawn pictures, and the vision encoder's rows of their sources. Where
the last stage is not the first, it has a frozen copy of the vision encoder, under the same names, whose values are the first
stage's; checkpoints hold one of the two.

Shapes: B rows, S tokens, H hidden size, N tiles or chunks, r rows of each; G drawn pictures, T tokens of a block.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional as F

from megatron_omni.batch import IGNORE_LABEL, KeptRows, OmniBatch
from megatron_omni.config.model import ModelConfig
from megatron_omni.models.context_parallel import SequenceCut
from megatron_omni.models.encoders.audio import AudioEncoder
from megatron_omni.models.encoders.vision import VisionEncoder
from megatron_omni.models.encoders.weights import INPUTS_AT_ONCE, draw_parts, frozen_part, is_trainable
from megatron_omni.models.exchange import GatherRows
from megatron_omni.models.generators.image import ImageGenerator
from megatron_omni.models.moe.context import RoutingStats, TokenContext
from megatron_omni.models.moe.routes import RouteRecord
from megatron_omni.platform.seeds import named_generator

if TYPE_CHECKING:
    from megatron_omni.models.language import LanguageModel


class OmniModel(MegatronModule):
    """Encoders, language model and generator of one pipeline stage. Parameters: ``vision.*``, ``audio.*``, ``language.*``,
    ``image.*``."""

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
        self.tp_group, self.cp_group = pg.tp, pg.cp
        self.cut = SequenceCut(pg.cp) if pg.cp.size() > 1 else None
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
        self.image: ImageGenerator | None = None
        if self.post_process and model.image is not None:
            visual = model.vision is not None
            self.image = ImageGenerator(model.image, model.hidden_size, visual=visual, overlap=overlap)
            self.image.copies = pg.cp.size()
        if drawn:
            self.draw_inputs()

    def add_inputs(self, model: ModelConfig) -> None:
        """Register the modules that this stage has beside its trunk: encoders."""
        self.vision: VisionEncoder | None = None
        self.audio: AudioEncoder | None = None
        copied = self.post_process and model.image is not None  # of source pictures
        if (self.pre_process or copied) and model.vision is not None:
            self.vision = VisionEncoder(model.vision, model.hidden_size)
        if self.pre_process and model.audio is not None:
            self.audio = AudioEncoder(model.audio, model.hidden_size)
        for encoder in filter(None, (self.vision, self.audio)):
            for parameter in encoder.parameters():
                parameter.sequence_parallel = True  # type: ignore[attr-defined]  # its gradient is summed over TP
        if not self.pre_process and self.vision is not None:
            self.vision.requires_grad_(False)

    def draw_inputs(self, only: Collection[str] | None = None) -> None:
        """Initial values of every parameter beside the trunk, or of those called as in ``only``."""
        for prefix, module in (("vision.", self.vision), ("audio.", self.audio)):
            if module is not None:
                draw_parts(module, self._generator, prefix=prefix, only=only)
        if self.image is not None:
            self.image.draw_weights(self._generator, prefix="image.", only=only)

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
        drawn: bool = False,
        hidden_places: Tensor | None = None,
    ) -> Any:
        """Loss per token [B, S] (0 where nothing is learned), logits without ``compute_loss``, or hidden states.

        Hidden states [S / TP, B, H] come from every stage but the last. ``logits_positions`` [B, n] asks for logits at
        those positions only. ``record`` is told the routes of this stage's layers; ``batch.routes`` are replayed.
        ``temperature``, ``with_entropy`` and ``with_top`` are of the loss (models/language.py).

        ``drawn``: the last stage gives three things, the loss, the hidden rows [G, T, H] of ``batch.drawn`` (G is 0 where it
        is None), and a list with the vision encoder's rows [n, H] of each source, None where a picture has none.
        ``hidden_places`` asks for rows of other places, and gives two (models/language.py).
        """
        if drawn and self.post_process:
            assert self.image is not None and hidden_places is None
            hidden_places = self._drawn_places(batch)
        cut = self.cut if compute_loss else None
        places = hidden_places
        if cut is not None:
            if hidden_places is not None:
                places = cut.places(hidden_places, *batch.input_ids.shape)
            batch = cut.part(batch)
        if record is not None:
            record.cut = cut is not None
        media = self._media(batch) if self.pre_process else []
        num_tokens = batch.input_ids.numel()
        output = self.language(
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
            decoder_input=self._embedded(batch, media) if self.pre_process else None,
            labels=batch.labels if compute_loss else None,
            label_places=batch.label_places,
            logits_positions=logits_positions,
            hidden_places=None if places is None else places.clamp(max=num_tokens - 1),
            temperature=temperature,
            with_entropy=with_entropy,
            with_top=with_top,
        )
        if cut is not None and self.post_process:
            if places is None:
                output = cut.whole(output)
            else:
                output = cut.whole(output[0]), cut.shared_rows(output[1], places < num_tokens)
        return (*output, self._source_rows(batch, media)) if drawn and self.post_process else output

    def embed_ids(self, input_ids: Tensor) -> Tensor:
        """[S, B, H] of ``input_ids`` [B, S] alone; of the first pipeline stage."""
        return self.language.embed(input_ids)

    @property
    def num_input_ids(self) -> int:
        """Ids that a token of a prompt can have, from 0 on: those that can be chosen, where nothing else is said."""
        return self.language.model_config.vocab_size

    def _media(self, batch: OmniBatch) -> list[tuple[Tensor, Tensor] | None]:
        """Places and rows of the vision encoder, and of the audio encoder; None where there are none."""
        kept = batch.kept_rows
        inputs = {"vision": batch.pixel_values, "audio": batch.audio_features}
        media = [
            self._medium(name, encoder, inputs[name], places, kept)
            for name, encoder, places in (  # before the embedding: in the order of registration
                ("vision", self.vision, batch.picture_places),
                ("audio", self.audio, batch.sound_places),
            )
        ]
        if kept is not None and not kept.complete:
            kept.complete = all(name in kept.rows for name, given in inputs.items() if given is not None)
        return media

    def _medium(
        self,
        name: str,
        encoder: VisionEncoder | AudioEncoder | None,
        inputs: Tensor | None,
        places: Tensor,
        kept: KeptRows | None,
    ) -> tuple[Tensor, Tensor] | None:
        """As :func:`_encode`; what is frozen of the encoder is ``kept``, or comes from there."""
        features, groups = False, (self.tp_group, self.cp_group)
        part = None if encoder is None else frozen_part(encoder)
        if kept is not None and encoder is not None and part is not None:
            if inputs is not None and name not in kept.rows:
                kept.rows[name] = _frozen(encoder, inputs, kept.places.get(name) or [len(places)])
            features = part == "features"
            if name in kept.rows and not features:
                return places, kept.rows[name]
            inputs = kept.rows.get(name)
        return _encode(encoder, inputs, places, idle=self.overlap, groups=groups, features=features)

    def _embedded(self, batch: OmniBatch, media: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
        """[S, B, H]: word embeddings with the encoders' rows in place of the placeholders."""
        hidden = self.embed_ids(batch.input_ids)
        for places, rows in filter(None, media):
            flat = hidden.reshape(-1, hidden.shape[-1])
            if self.cut is not None:  # rows of other ranks' placeholders go into one more, which is left out
                flat = F.pad(flat, (0, 0, 0, 1))
            flat = flat.index_copy(0, places, rows.to(hidden.dtype))
            hidden = flat[: hidden.shape[0] * hidden.shape[1]].view_as(hidden)
        if not hidden.requires_grad and any(e is not None and _trains(e) for e in (self.vision, self.audio)):
            # Expert-parallel ranks meet in the backward of every MoE layer. Below a frozen trunk it would end early for a
            # micro-batch without media, and leave the ranks whose micro-batch has some waiting.
            hidden.requires_grad_()
        return hidden

    # ------------------------------------------------------------------------------------------- what the generator reads

    def _drawn_places(self, batch: OmniBatch) -> Tensor:
        """[G, T] of ``batch.drawn``."""
        if batch.drawn is not None:
            return batch.drawn.places
        assert self.image is not None
        return batch.label_places.new_zeros(0, len(self.image.config.block))

    def _source_rows(self, batch: OmniBatch, media: Sequence[tuple[Tensor, Tensor] | None]) -> list[Tensor | None]:
        """[n, H] of each source: rows that were kept, or those of this micro-batch's vision encoder."""
        drawn = batch.drawn
        if drawn is None:
            return []
        rows = media[0][1] if media and media[0] is not None else None
        if rows is None and drawn.wants_pixels:
            assert self.vision is not None and batch.pixel_values is not None, (
                "sources without pixels on the last stage"
            )
            groups = self.tp_group, self.cp_group
            rows = _shared_rows(self.vision, batch.pixel_values, idle=False, groups=groups)
        found: list[Tensor | None] = []
        for kept, place in zip(drawn.vision, drawn.vision_rows, strict=True):
            assert rows is not None or place is None or kept is not None
            found.append(kept if kept is not None or place is None or rows is None else rows[slice(*place)])
        return found

    # -------------------------------------------------------------------------------- what Megatron asks of a model

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the previous pipeline stage, for the next forward."""
        self.language.set_input_tensor(input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's. The last stage's copy of the vision encoder is one of the first stage's."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if not self.pre_process:
            for name, tensor in state.items():
                if name.startswith(f"{prefix}vision.") and hasattr(tensor, "replica_id"):
                    state[name] = replace(tensor, replica_id=(1, *tensor.replica_id[1:]))
        return state

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


def _frozen(encoder: VisionEncoder | AudioEncoder, inputs: Tensor, places: Sequence[int]) -> Tensor:
    """What is frozen of what the encoder makes of samples with so many ``places`` each (:data:`SampleRows`). Every rank
    computes all of them, each sample alone: as in a rollout, whose bits these are."""
    whole = frozen_part(encoder) == "rows"
    compute = encoder if whole else encoder.features
    samples = inputs.split([number // encoder.rows_per_input for number in places])
    made = torch.cat([compute(some) for own in samples for some in own.split(INPUTS_AT_ONCE)])
    return made.flatten(0, 1) if whole else made


def _encode(
    encoder: VisionEncoder | AudioEncoder | None,
    inputs: Tensor | None,
    places: Tensor,
    *,
    idle: bool,
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
    features: bool = False,
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
    rows = _shared_rows(encoder, inputs, idle=idle, groups=groups, features=features)
    assert len(rows) == len(places), f"{len(rows)} encoder rows for {len(places)} placeholders"
    return places, rows


def _shared_rows(
    encoder: VisionEncoder | AudioEncoder,
    inputs: Tensor,
    *,
    idle: bool,
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
    features: bool = False,
) -> Tensor:
    """The encoder's rows of ``inputs`` [N, ...], [N r, H]: each rank of the TP and CP ``groups`` computes ceil(N / (TP x CP))
    inputs at most. ``features``: inputs are those of its tower, and only the projector computes."""
    tensor, context = groups
    share = -(-len(inputs) // (tensor.size() * context.size()))
    mine = inputs[(context.rank() * tensor.size() + tensor.rank()) * share :][:share]
    trains = _trains(encoder)
    with torch.set_grad_enabled(trains):
        compute = encoder.project if features else encoder
        rows = compute(mine).flatten(0, 1) if len(mine) else _no_rows(encoder, idle=idle and trains)
        if len(mine) < share:
            rows = F.pad(rows, (0, 0, 0, share * encoder.rows_per_input - len(rows)))
        if tensor.size() > 1:
            # The gradient that comes back is whole on every rank: it is split, not summed.
            rows = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=tensor)
        if context.size() > 1:  # here each rank has that of its own tokens, and all meet in the backward
            rows = rows if rows.requires_grad or not trains else rows.requires_grad_()
            rows = GatherRows.apply(rows, [len(rows)] * context.size(), context)
        return rows[: len(inputs) * encoder.rows_per_input]


def _no_rows(encoder: VisionEncoder | AudioEncoder, *, idle: bool) -> Tensor:
    """[0, H]; ``idle``: of an empty input, so that every parameter takes part in the backward."""
    if idle:
        return encoder(encoder.idle_input()).flatten(0, 1)[:0]
    return next(encoder.parameters()).new_zeros(0, encoder.out_hidden)


def _trains(encoder: VisionEncoder | AudioEncoder) -> bool:
    return torch.is_grad_enabled() and is_trainable(encoder)
