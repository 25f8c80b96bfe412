"""The table of weights: one row for each kind of tensor, (our pattern, their pattern(s), invertible transform).

Patterns hold ``{layer}`` (the Hugging Face layer number) and ``{expert}``; on our side the language model's block
``{layer}`` is two hybrid layers, ``{attention}`` = 2 layer and ``{ffn}`` = 2 layer + 1. A row with ``experts`` fills one
entry of a leading axis per expert. ``cut`` says how tensor (or expert tensor) parallelism splits our tensor; everything
without one is whole on every rank.

:func:`expand` turns rows into entries, one for each tensor (or expert) of ours; ``shapes`` of their tensors are part of
a row, so that a checkpoint of another size is found from its headers alone. Tests hold the table against the keys and
shapes of the real model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from megatron_omni.checkpoint.transforms import Concat, Identity, PadRows, QkvInterleave, Transform
from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.estimate import padded_vocab_size

Shape = tuple[int, ...]


class Cut(NamedTuple):
    """Our tensor is split along ``axis`` over ``by``; ``parts`` blocks (gate, up) are each split so."""

    axis: int
    by: Literal["tp", "etp"] = "tp"
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A kind of tensor."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Of ``theirs``, one each."""
    transform: Transform = field(default_factory=Identity)
    cut: Cut | None = None
    """Axes of one expert's tensor where there are experts."""
    layers: int | None = None
    """Number of layers of a pattern with ``{layer}``."""
    experts: tuple[int, ...] | None = None
    """Experts that this row fills, of ``num_experts``."""
    num_experts: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of ours, or one expert's share of it, and where it comes from."""

    ours: str
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: Transform
    cut: Cut | None
    expert: int | None = None
    """Index on the leading axis of our tensor; None where there is no such axis."""
    num_experts: int = 0

    @property
    def shape(self) -> Shape:
        """Of what ``transform.to_ours`` returns: without the experts' axis."""
        parts = [torch.empty(shape, device="meta") for shape in self.shapes]
        return tuple(self.transform.to_ours(parts).shape)

    @property
    def global_shape(self) -> Shape:
        """Of our whole tensor."""
        return self.shape if self.expert is None else (self.num_experts, *self.shape)


def expand(rows: Iterable[Row]) -> list[Entry]:
    """Entries of ``rows``, layer by layer, in the order of the rows within a layer."""
    entries: list[Entry] = []
    group: list[Row] = []
    for row in [*rows, None]:
        if group and (row is None or row.layers != group[0].layers):
            for layer in range(group[0].layers or 1):
                entries += [entry for member in group for entry in _entries(member, layer)]
            group = []
        if row is not None:
            group.append(row)
    return entries


def _entries(row: Row, layer: int) -> list[Entry]:
    numbers = {"layer": layer, "attention": 2 * layer, "ffn": 2 * layer + 1}
    return [
        Entry(
            ours=row.ours.format(**numbers),
            theirs=tuple(pattern.format(**numbers, expert=expert) for pattern in row.theirs),
            shapes=row.shapes,
            transform=row.transform,
            cut=row.cut,
            expert=expert,
            num_experts=row.num_experts,
        )
        for expert in (row.experts if row.experts is not None else (None,))
    ]


# ------------------------------------------------------------------------------------------------ language model

BLOCK = "language.decoder.layers.{attention}."
FEED_FORWARD = "language.decoder.layers.{ffn}."
THEIR_BLOCK = "model.layers.{layer}."


def trunk_rows(model: ModelConfig) -> list[Row]:
    """Qwen2.5 without its feed-forward parts: embeddings, attention, norms, output."""
    width, padded = model.hidden_size, padded_vocab_size(model)
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    matrix: dict[str, Any] = {
        "shapes": ((model.vocab_size, width),),
        "transform": PadRows(model.vocab_size, padded),
        "cut": Cut(0),
    }
    interleave = QkvInterleave(model.num_attention_heads, model.num_query_groups)
    count = model.num_layers

    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"{THEIR_BLOCK}self_attn.{name}_proj.{kind}" for name in "qkv")

    def norm(ours: str, theirs: str, layers: int | None = count) -> Row:
        return Row(ours=ours, theirs=(theirs,), shapes=((width,),), layers=layers)

    rows = [
        Row(ours="language.embedding.word_embeddings.weight", theirs=("model.embed_tokens.weight",), **matrix),
        norm(f"{BLOCK}input_layernorm.weight", f"{THEIR_BLOCK}input_layernorm.weight"),
        Row(
            ours=f"{BLOCK}self_attention.linear_qkv.weight",
            theirs=qkv("weight"),
            shapes=((query, width), (key, width), (key, width)),
            transform=interleave,
            cut=Cut(0),
            layers=count,
        ),
        Row(
            ours=f"{BLOCK}self_attention.linear_proj.weight",
            theirs=(f"{THEIR_BLOCK}self_attn.o_proj.weight",),
            shapes=((width, query),),
            cut=Cut(1),
            layers=count,
        ),
        norm(f"{FEED_FORWARD}pre_mlp_layernorm.weight", f"{THEIR_BLOCK}post_attention_layernorm.weight"),
        norm("language.decoder.final_norm.weight", "model.norm.weight", layers=None),
    ]
    if model.add_qkv_bias:
        bias = Row(
            ours=f"{BLOCK}self_attention.linear_qkv.bias",
            theirs=qkv("bias"),
            shapes=((query,), (key,), (key,)),
            transform=interleave,
            cut=Cut(0),
            layers=count,
        )
        rows.insert(3, bias)
    if model.untie_embeddings_and_output_weights:
        rows.append(Row(ours="language.output_layer.weight", theirs=("lm_head.weight",), **matrix))
    return rows


def dense_ffn_rows(model: ModelConfig) -> list[Row]:
    """Qwen2.5's feed-forward parts, for a model without experts."""
    width, ffn = model.hidden_size, model.ffn_hidden_size
    return [
        Row(
            ours=f"{FEED_FORWARD}mlp.linear_fc1.weight",
            theirs=(f"{THEIR_BLOCK}mlp.gate_proj.weight", f"{THEIR_BLOCK}mlp.up_proj.weight"),
            shapes=((ffn, width), (ffn, width)),
            transform=Concat(2),
            cut=Cut(0, parts=2),
            layers=model.num_layers,
        ),
        Row(
            ours=f"{FEED_FORWARD}mlp.linear_fc2.weight",
            theirs=(f"{THEIR_BLOCK}mlp.down_proj.weight",),
            shapes=((width, ffn),),
            cut=Cut(1),
            layers=model.num_layers,
        ),
    ]


def qwen2_rows(model: ModelConfig) -> list[Row]:
    """Qwen2.5 of any size, dense."""
    rows = trunk_rows(model)
    last = max(i for i, row in enumerate(rows) if row.layers)
    return [*rows[: last + 1], *dense_ffn_rows(model), *rows[last + 1 :]]


# ------------------------------------------------------------------------------------------------ perception


def siglip_rows(vision: VisionConfig, *, prefix: str = "vision_model.") -> list[Row]:
    """The kept layers of SigLIP; ``prefix`` of their names differs between releases."""
    if vision.stem != "patch":
        raise ValueError(
            f"model.vision.stem={vision.stem}: SigLIP's format has one patch matrix and no place for a convolutional "
            "stem; such a model can be trained and run here, not converted"
        )
    width, ffn, side = vision.hidden_size, vision.ffn_hidden_size, vision.image_size // vision.patch_size
    embeddings: dict[str, Shape] = {
        "embeddings.patch_embedding.weight": (width, 3, vision.patch_size, vision.patch_size),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (side * side, width),
    }
    layer: dict[str, Shape] = {
        **_linears([f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")], width, width),
        **_norms(["layer_norm1", "layer_norm2"], width),
        **_linears(["mlp.fc1"], ffn, width),
        **_linears(["mlp.fc2"], width, ffn),
    }
    rows = _same_names("vision.tower.", prefix, embeddings)
    return rows + _same_names(
        "vision.tower.encoder.layers.{layer}.", f"{prefix}encoder.layers.{{layer}}.", layer, layers=vision.num_layers
    )


def whisper_encoder_rows(audio: AudioConfig, *, prefix: str = "model.encoder.") -> list[Row]:
    """Whisper's encoder."""
    width = audio.hidden_size
    outside: dict[str, Shape] = {
        "conv1.weight": (width, audio.num_mel_bins, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "embed_positions.weight": (round(audio.chunk_seconds * 50), width),
        **_norms(["layer_norm"], width),
    }
    rows = _same_names("audio.tower.", prefix, outside)
    layer = _whisper_layer(audio, ["self_attn"])
    return rows + _same_names(
        "audio.tower.layers.{layer}.", f"{prefix}layers.{{layer}}.", layer, layers=audio.num_encoder_layers
    )


def whisper_decoder_rows(audio: AudioConfig, *, prefix: str = "model.decoder.") -> list[Row]:
    """Whisper's decoder, which is the Q-former; its token table has no row: it is carried, not used."""
    width = audio.hidden_size
    outside: dict[str, Shape] = {
        "embed_positions.weight": (audio.max_target_positions, width),
        **_norms(["layer_norm"], width),
    }
    rows = _same_names("audio.qformer.", prefix, outside)
    layer = _whisper_layer(audio, ["self_attn", "encoder_attn"])
    return rows + _same_names(
        "audio.qformer.layers.{layer}.", f"{prefix}layers.{{layer}}.", layer, layers=audio.num_decoder_layers
    )


def vision_projector_rows(model: ModelConfig, *, prefix: str = "vision_aligner.") -> list[Row]:
    """Linear, GELU, Linear."""
    assert model.vision is not None
    width, hidden = model.hidden_size, model.vision.hidden_size
    return _same_names("vision.projector.", prefix, {**_linears(["0"], width, hidden), **_linears(["2"], width, width)})


def audio_projector_rows(model: ModelConfig, *, prefix: str = "audio_aligner.") -> list[Row]:
    """Learned queries and the linear projection."""
    assert model.audio is not None
    width, hidden = model.hidden_size, model.audio.hidden_size
    queries: dict[str, Shape] = {"query_tokens": (1, model.audio.num_query_tokens, hidden)}
    return [
        *_same_names("audio.qformer.", prefix, queries),
        *_same_names("audio.projector.", f"{prefix}projector.", {"weight": (width, hidden), "bias": (width,)}),
    ]


def projector_rows(model: ModelConfig) -> list[Row]:
    """Projectors of the encoders that the model has."""
    rows = vision_projector_rows(model) if model.vision is not None else []
    return rows + (audio_projector_rows(model) if model.audio is not None else [])


def _whisper_layer(audio: AudioConfig, attentions: Sequence[str]) -> dict[str, Shape]:
    width, ffn = audio.hidden_size, audio.ffn_hidden_size
    names: dict[str, Shape] = {}
    for attention in attentions:
        names[f"{attention}.k_proj.weight"] = (width, width)  # the one projection without a bias
        names |= _linears([f"{attention}.{name}_proj" for name in ("v", "q", "out")], width, width)
        names |= _norms([f"{attention}_layer_norm"], width)
    return {
        **names,
        **_linears(["fc1"], ffn, width),
        **_linears(["fc2"], width, ffn),
        **_norms(["final_layer_norm"], width),
    }


def _linears(names: Sequence[str], out: int, into: int) -> dict[str, Shape]:
    return {f"{name}.{kind}": shape for name in names for kind, shape in (("weight", (out, into)), ("bias", (out,)))}


def _norms(names: Sequence[str], width: int) -> dict[str, Shape]:
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def _same_names(ours: str, theirs: str, shapes: Mapping[str, Shape], layers: int | None = None) -> list[Row]:
    """Rows of tensors that have the same name below two prefixes."""
    return [
        Row(ours=ours + name, theirs=(theirs + name,), shapes=(shape,), layers=layers) for name, shape in shapes.items()
    ]
