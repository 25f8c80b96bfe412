"""Every parameter of the model, in the order in which the model registers them, as one rank of a layout holds them.

This one list gives the counts by part (the paper's Table 1), the bytes of a rank (memory.py) and, through both, what
``megatron-omni plan`` says. The order matters to the byte: the distributed optimizer lays parameters out from the last to
the first, each starting at a multiple of 64. Shapes follow models/ and docs/model.md; tests/distributed/test_plan.py
holds the list against the real model on every layout.

Under tensor parallelism (TP) the matrices of attention, dense FFN, embedding and output are cut; norms, gate, shared
experts and encoders are whole on every rank. Routed experts are cut over the expert group (EP) and, one by one, over
expert tensor parallelism (ETP). Encoders, and a speech generator's text table and projection, live on the first pipeline
stage, what draws (``model.image``) on the last, where a copy of the vision encoder reads its source pictures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.config.parallel import stage_blocks
from megatron_omni.config.parts import (
    NEW_TOKEN_ROWS,
    NUM_NEW_TOKENS,
    TEXT_TABLE,
    draws_alone,
    frozen_matrices,
    trains_new_rows_alone,
)
from megatron_omni.config.run import Recipe
from megatron_omni.estimate.pictures import has_projectors, image_weights

AUDIO_POSITIONS_PER_SECOND = 50
"""Frames of the audio encoder; its log-mel input has twice as many."""


class Weight(NamedTuple):
    """One parameter on one rank."""

    part: str
    """Named part (models/parts.py)."""
    numel: int
    expert: bool = False
    """A routed expert's: reduced over the expert data-parallel group, updated by the expert optimizer."""
    trainable: bool = True
    """False: never trained, whatever ``freeze`` says (Whisper's fixed sinusoids, the text table)."""
    own_bucket: bool = False
    """Tied under pipeline parallelism: Megatron gives each of the two copies a gradient bucket of its own."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by named part, over all ranks."""

    embeddings: int = 0
    output: int = 0
    attention: int = 0
    norms: int = 0
    ffn: int = 0
    experts: int = 0
    shared_experts: int = 0
    gate: int = 0
    vision: int = 0
    audio: int = 0
    projectors: int = 0
    text_table: int = 0
    text_projection: int = 0
    adapters: int = 0
    image_projectors: int = 0
    image_generator: int = 0

    @property
    def language(self) -> int:
        """Everything but perception, what a speech generator reads text by, and what draws."""
        others = self.text_table + self.text_projection + self.image_projectors + self.image_generator
        return self.total - self.vision - self.audio - self.projectors - others

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How a rank's share differs from the whole."""

    tp: int = 1
    ep: int = 1
    etp: int = 1
    stages: int = 1
    stage: int = 0
    num_blocks: int | None = None
    """Of the stage; None: all."""
    overlap: bool = False
    """Messages of data-parallel ranks overlap with computation: encoders are registered first (models/omni.py)."""
    rows_of: frozenset[str] = frozenset()
    """Vocabulary matrices of which only the rows of new tokens are trained."""
    trunk: bool = True
    """False: there is what draws alone."""
    image_projectors: bool = True

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1


_WHOLE = _Cut()


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding and output matrices; the same on every layout, so that checkpoints and losses are, too."""
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameter counts by part."""
    counts: dict[str, int] = {}
    for weight in _weights(model, _WHOLE):
        counts[weight.part] = counts.get(weight.part, 0) + weight.numel
    return ParameterCount(**counts)


def stage_weights(recipe: Recipe, *, stage: int) -> list[Weight]:
    """Parameters of one rank of pipeline ``stage`` (0 first), in registration order; all ranks of a stage agree.

    Rows of new tokens that are trained alone are counted for a tokenizer that has all of them.
    """
    parallel = recipe.parallel
    cut = _Cut(
        tp=parallel.tensor_model_parallel_size,
        ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size,
        stages=parallel.pipeline_model_parallel_size,
        stage=stage,
        num_blocks=stage_blocks(parallel, recipe.model.num_layers)[stage],
        overlap=parallel.overlap_grad_reduce,
        rows_of=frozen_matrices(recipe) if trains_new_rows_alone(recipe) else frozenset(),
        trunk=not draws_alone(recipe),
        image_projectors=has_projectors(recipe),
    )
    return list(_weights(recipe.model, cut))


def _weights(model: ModelConfig, cut: _Cut) -> Iterator[Weight]:
    if cut.trunk and cut.overlap:
        yield from _inputs(model, cut)
    if cut.trunk:
        yield from _language(model, cut)
    if cut.trunk and not cut.overlap:
        yield from _inputs(model, cut)
    if cut.last and model.image is not None:
        for part, numel, trainable in image_weights(model, projectors=cut.image_projectors):
            yield Weight(part, numel, trainable=trainable)


def _language(model: ModelConfig, cut: _Cut) -> Iterator[Weight]:
    tied_pipeline = cut.stages > 1 and not model.untie_embeddings_and_output_weights
    vocabulary = padded_vocab_size(model) // cut.tp * model.hidden_size
    new_rows = Weight(NEW_TOKEN_ROWS, NUM_NEW_TOKENS * model.hidden_size, own_bucket=tied_pipeline)
    if cut.first:
        yield Weight("embeddings", vocabulary, own_bucket=tied_pipeline)
        if "embeddings" in cut.rows_of:
            yield new_rows
    for _ in range(model.num_layers if cut.num_blocks is None else cut.num_blocks):
        yield from _attention(model, cut)
        yield from _feed_forward(model, cut)
    if cut.last:
        yield Weight("norms", model.hidden_size)
        if model.untie_embeddings_and_output_weights or not cut.first:
            yield Weight("output", vocabulary, own_bucket=tied_pipeline)
            if model.output_bias:
                yield Weight("output", padded_vocab_size(model) // cut.tp)
            if "output" in cut.rows_of:
                yield new_rows


def _inputs(model: ModelConfig, cut: _Cut) -> Iterator[Weight]:
    if cut.first and model.speech is not None:
        speech = model.speech
        yield Weight(TEXT_TABLE, speech.text_vocab_size * speech.text_hidden_size, trainable=False)
        yield from _linear("text_projection", speech.text_hidden_size, model.hidden_size)
    copied = cut.last and model.image is not None
    if (cut.first or copied) and model.vision is not None:
        yield from _vision(model.vision, model.hidden_size)
    if cut.first and model.audio is not None:
        yield from _audio(model.audio, model.hidden_size)


def _attention(model: ModelConfig, cut: _Cut) -> Iterator[Weight]:
    width = model.hidden_size
    query = model.num_attention_heads * model.kv_channels // cut.tp
    query_key_value = query + 2 * model.num_query_groups * model.kv_channels // cut.tp
    yield Weight("norms", width)
    yield Weight("attention", query * width)
    yield Weight("attention", query_key_value * width)
    if model.add_qkv_bias:
        yield Weight("attention", query_key_value)
    if model.lora is not None and "attention" in model.lora.targets:
        for numel in (width, query_key_value, query, width):  # A and B of queries, keys, values, then of the projection
            yield Weight("adapters", model.lora.rank * numel)


def _feed_forward(model: ModelConfig, cut: _Cut) -> Iterator[Weight]:
    width, moe = model.hidden_size, model.moe
    yield Weight("norms", width)
    if moe is None:
        yield Weight("ffn", 2 * model.ffn_hidden_size // cut.tp * width)
        yield Weight("ffn", model.ffn_hidden_size // cut.tp * width)
        return
    yield Weight("gate", (moe.num_routed_experts + moe.num_null_experts + moe.num_shared_experts) * width)
    experts = moe.num_routed_experts // cut.ep * (moe.moe_ffn_hidden_size // cut.etp) * width
    yield Weight("experts", 2 * experts, expert=True)
    yield Weight("experts", experts, expert=True)
    if model.lora is not None and "experts" in model.lora.targets:
        local, ffn = moe.num_routed_experts // cut.ep, moe.moe_ffn_hidden_size
        for size in (width, 2 * ffn, ffn, width):
            yield Weight("adapters", local * model.lora.rank * size, expert=True)
    if moe.num_shared_experts:
        shared = moe.num_shared_experts * moe.moe_shared_expert_intermediate_size * width
        yield Weight("shared_experts", 2 * shared)
        yield Weight("shared_experts", shared)


def _vision(config: VisionConfig, out: int) -> Iterator[Weight]:
    width, side = config.hidden_size, config.image_size // config.patch_size
    if config.stem == "patch":
        stem = [3 * config.patch_size**2 * width, width]
    else:
        widths = [3, width // 2, *[width] * (config.patch_size.bit_length() - 2)]
        stem = [numel for a, b in pairwise(widths) for numel in (9 * a * b, b)]
    for numel in (*stem, side * side * width):
        yield Weight("vision", numel)
    for _ in range(config.num_layers):
        yield from _norm("vision", width)
        for _ in "kvqo":
            yield from _linear("vision", width, width)
        yield from _norm("vision", width)
        yield from _mlp("vision", width, config.ffn_hidden_size)
    yield from _linear("projectors", width, out)
    yield from _linear("projectors", out, out)


def _audio(config: AudioConfig, out: int) -> Iterator[Weight]:
    width, ffn = config.hidden_size, config.ffn_hidden_size
    yield from _linear("audio", 3 * config.num_mel_bins, width)
    yield from _linear("audio", 3 * width, width)
    positions = int(config.chunk_seconds * AUDIO_POSITIONS_PER_SECOND)
    yield Weight("audio", positions * width, trainable=False)
    for _ in range(config.num_encoder_layers):
        yield from _whisper_attention("audio", width)
        yield from _mlp("audio", width, ffn)
        yield from _norm("audio", width)
    yield from _norm("audio", width)
    # The Q-former belongs to the projectors.
    yield Weight("projectors", config.num_query_tokens * width)
    yield Weight("projectors", config.max_target_positions * width)
    for _ in range(config.num_decoder_layers):
        yield from _whisper_attention("projectors", width)
        yield from _whisper_attention("projectors", width)
        yield from _mlp("projectors", width, ffn)
        yield from _norm("projectors", width)
    yield from _norm("projectors", width)
    yield from _linear("projectors", width, out)


def _linear(part: str, size_in: int, size_out: int) -> Iterator[Weight]:
    yield Weight(part, size_in * size_out)
    yield Weight(part, size_out)


def _norm(part: str, width: int) -> Iterator[Weight]:
    yield Weight(part, width)
    yield Weight(part, width)


def _mlp(part: str, width: int, ffn: int) -> Iterator[Weight]:
    yield from _linear(part, width, ffn)
    yield from _linear(part, ffn, width)


def _whisper_attention(part: str, width: int) -> Iterator[Weight]:
    yield Weight(part, width * width)  # keys carry no bias
    for _ in "vqo":
        yield from _linear(part, width, width)
    yield from _norm(part, width)
