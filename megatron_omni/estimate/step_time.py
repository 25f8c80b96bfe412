"""Seconds of a training step: matrix products at a share of the peak, the rest at a share of memory bandwidth, messages
at a share of the links. Nothing overlaps unless the recipe says so; the slowest rank (``imbalance``) sets the pace.

    micro-batch on a stage = sum over its layers of products / rate + traffic / bandwidth + messages / link
    step = sum over stages + (micro-batches - 1) x slowest stage + gradient and weight exchange + optimizer

A trained matrix costs two products in the backward, a frozen one below something trained costs one; recomputation adds
a forward. Traffic: each value that autograd would keep without recomputation moves five times (written, read twice
forward and backward, its gradient written and read).
"""

from dataclasses import dataclass, replace

from megatron_omni.config.parallel import stage_blocks
from megatron_omni.config.parts import draws_alone, trained_parts
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import num_micro_batches
from megatron_omni.estimate.activations import FP32, Activations, MicroBatch
from megatron_omni.estimate.flops import chunk_forward, tile_forward
from megatron_omni.estimate.hardware import Efficiency, Gpu
from megatron_omni.estimate.memory import StaticBytes, element_bytes, gradient_bytes, replicas, tensor_reduced_bytes
from megatron_omni.estimate.parameters import padded_vocab_size, stage_weights
from megatron_omni.estimate.pictures import draws, picture_bytes, picture_flops, picture_forward

MOVES_PER_VALUE = 5
OPTIMIZER_MOVES = 2
"""Optimizer state is read and written."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what they go to. ``experts`` to ``messages`` are the slowest stage's, over its
    micro-batches; ``bubble`` is the time it waits for the others."""

    attention: float
    experts: float
    """Feed-forward layers: routed and shared experts, or the dense FFN."""
    encoders: float
    head: float
    drawing: float
    """Projectors and generator of pictures."""
    messages: float
    """Tensor-, expert- and pipeline-parallel."""
    bubble: float
    gradients: float
    """Reduction of gradients, over data- and tensor-parallel ranks, and gathering of weights that nothing hides."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class _StageTime:
    attention: float
    experts: float
    encoders: float
    head: float
    drawing: float
    messages: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


class StepTimer:
    """Times of ``recipe`` on ``world_size`` GPUs of one kind, for micro-batches like ``batch``."""

    def __init__(self, recipe: Recipe, batch: MicroBatch, *, world_size: int, gpu: Gpu, efficiency: Efficiency) -> None:
        self.recipe, self.batch, self.world_size, self.gpu = recipe, batch, world_size, gpu
        self.rates = efficiency
        self.model, self.parallel = recipe.model, recipe.parallel
        self.tp, self.pp = self.parallel.tensor_model_parallel_size, self.parallel.pipeline_model_parallel_size
        self.trained, self.has_trunk = trained_parts(recipe), not draws_alone(recipe)
        self.kept = Activations(recipe, batch)
        # What a forward writes, had nothing been recomputed.
        self.written = Activations(replace(recipe, parallel=replace(recipe.parallel, recompute="none")), batch)

    def step(self, held: list[StaticBytes]) -> StepTime:
        """Seconds of a step; ``held``: bytes of each stage."""
        stages = [self._stage(stage) for stage in range(self.pp)]
        slowest = max(stages, key=lambda stage: stage.total)
        rounds = num_micro_batches(self.recipe, self.world_size)
        busy = {name: seconds * rounds for name, seconds in vars(slowest).items()}
        bubble = sum(stage.total for stage in stages) - slowest.total
        return StepTime(
            **busy,
            bubble=bubble,
            gradients=max(self._exchange(stage, one=stages[stage].total) for stage in range(self.pp)),
            optimizer=max(self._optimizer(stage) for stage in held),
        )

    def stage_seconds(self) -> list[float]:
        """A micro-batch on each pipeline stage, forward and backward."""
        return [self._stage(stage).total for stage in range(self.pp)]

    def block_seconds(self) -> float:
        """A micro-batch in one block, forward and backward."""
        return self._attention() + self._feed_forward() + self._layer_messages() if self.has_trunk else 0.0

    def _stage(self, stage: int) -> _StageTime:
        last = stage == self.pp - 1
        if not self.has_trunk:
            return _StageTime(attention=0.0, experts=0.0, encoders=0.0, head=0.0, drawing=self._drawing(), messages=0.0)
        blocks = stage_blocks(self.parallel, self.model.num_layers)[stage]
        return _StageTime(
            attention=blocks * self._attention(),
            experts=blocks * self._feed_forward(),
            encoders=self._encoders() if stage == 0 else 0.0,
            head=self._head() if last else 0.0,
            drawing=self._drawing() if last else 0.0,
            messages=blocks * self._layer_messages() + self._stage_messages(first=stage == 0, last=last),
        )

    def _products(self, flops: float, share: float, *, trained: bool = True, replayed: bool = False) -> float:
        """Seconds of products whose forward takes ``flops``, all there is below which nothing is trained."""
        times = 2 + trained + replayed if self.kept.learns else 1
        return flops * times / (self.gpu.tflops * 1e12 * share)

    def _traffic(self, written: float) -> float:
        return written * MOVES_PER_VALUE / (self.gpu.memory_gb_s * 1e9 * self.rates.memory)

    def _attention(self) -> float:
        model, tokens, replayed = self.model, self.kept.tokens, self.parallel.recompute == "full"
        query = model.num_attention_heads * model.kv_channels
        matrices = model.hidden_size * (2 * query + 2 * model.num_query_groups * model.kv_channels)
        projections = self._products(
            2 * tokens * matrices / self.tp,
            self.rates.dense,
            trained="attention" in self.trained,
            replayed=replayed,
        )
        scores = 4 * self.batch.pairs / self.kept.cp * query / self.tp
        return (
            projections
            + self._products(scores, self.rates.attention, replayed=replayed)
            + self._traffic(self.written.attention())
        )

    def _feed_forward(self) -> float:
        model, moe = self.model, self.model.moe
        replayed = self.parallel.recompute == "full" or (self.parallel.recompute == "moe" and moe is not None)
        traffic = self._traffic(self.written.feed_forward())
        if moe is None:
            flops = 6 * self.kept.tokens * model.hidden_size * model.ffn_hidden_size / self.tp
            return traffic + self._products(flops, self.rates.dense, trained="ffn" in self.trained, replayed=replayed)
        width = moe.moe_ffn_hidden_size // self.parallel.expert_tensor_parallel_size
        routed = 6 * self.kept.received_rows * model.hidden_size * width
        shared = 6 * self.kept.shard * model.hidden_size * moe.num_shared_experts
        shared *= moe.moe_shared_expert_intermediate_size
        return (
            traffic
            + self._products(routed, self.rates.experts, trained="experts" in self.trained, replayed=replayed)
            + self._products(shared, self.rates.dense, trained="shared_experts" in self.trained, replayed=replayed)
        )

    def _head(self) -> float:
        labels = self.kept.labels
        flops = 2 * labels * self.model.hidden_size * padded_vocab_size(self.model) / self.tp
        chunked = self.kept.chunked_logits
        products = self._products(flops, self.rates.dense, trained="output" in self.trained, replayed=chunked)
        written = chunked * labels * padded_vocab_size(self.model) / self.tp * FP32 + self.written.head()
        return products + self._traffic(written)

    def _drawing(self) -> float:
        """Every tensor-parallel rank draws the same pictures."""
        replayed = draws(self.recipe) and self.parallel.recompute == "full"
        flops = picture_flops(self.recipe) + replayed * picture_forward(self.model).generator
        written = picture_bytes(self.written.recipe, self.trained, element=element_bytes(self.recipe))
        seconds = flops / (self.gpu.tflops * 1e12 * self.rates.dense) + self._traffic(written)
        return self.batch.pictures * seconds

    def _encoders(self) -> float:
        """A rank's share of the tiles and chunks of its micro-batch."""
        seconds = self._traffic(self.written.vision() + self.written.audio())
        for name, number, forward in (
            ("vision", self.kept.tiles, tile_forward(self.model)),
            ("audio", self.kept.chunks, chunk_forward(self.model)),
        ):
            seconds += self._encoder(number * forward.tower, trained=name in self.trained)
            seconds += self._encoder(number * forward.projector, trained="projectors" in self.trained)
        return seconds

    def _encoder(self, flops: float, *, trained: bool) -> float:
        if not trained:
            return flops / (self.gpu.tflops * 1e12 * self.rates.encoders)
        return self._products(flops, self.rates.encoders, replayed=self.parallel.recompute == "full")

    def _bandwidth(self, ranks_apart: int) -> float:
        """Bytes a second between ranks of a group that spans ``ranks_apart`` neighbouring ranks."""
        inside = ranks_apart <= self.gpu.gpus_per_node
        return (self.gpu.link_gb_s if inside else self.gpu.network_gb_s) * 1e9 * self.rates.links

    def _layer_messages(self) -> float:
        """Gathers and reduce-scatters of a block's sequence shards; keys and values of context-parallel ranks; rows to experts
        and back."""
        model, size = self.model, element_bytes(self.recipe)
        whole = self.kept.tokens * model.hidden_size * size * (self.tp - 1) / self.tp
        # Forward and backward 2 each, and the input once more for a weight gradient; 2 more where it is replayed.
        replay = 2 * (self.parallel.recompute == "full")
        count = 4 + ("attention" in self.trained) + replay
        if model.moe is None:
            count += 4 + ("ffn" in self.trained) + replay
        seconds = count * whole / self._bandwidth(self.tp)
        cp = self.kept.cp
        keys = self.kept.tokens * (cp - 1) * 2 * model.num_query_groups * model.kv_channels / self.tp * size
        seconds += (2 + (self.parallel.recompute == "full")) * keys / self._bandwidth(self.tp * cp)
        if model.moe is not None:
            ep, etp = self.parallel.expert_model_parallel_size, self.parallel.expert_tensor_parallel_size
            rows = self.kept.received_rows / etp * model.hidden_size * size
            trips = 6 if self.parallel.recompute != "none" else 4
            crossing = rows * (ep - 1) / ep + self.kept.received_rows * model.hidden_size * size * (etp - 1) / etp
            seconds += trips * crossing / self._bandwidth(ep * etp)
        return seconds

    def _stage_messages(self, *, first: bool, last: bool) -> float:
        """Rows of the encoders; hidden states to the next stage and their gradient back; rows of the head."""
        size = element_bytes(self.recipe)
        hidden = self.kept.tokens * self.model.hidden_size * size
        seconds = 0.0
        if self.pp > 1:
            seconds += 2 * hidden / self.tp / self._bandwidth(self.world_size)
        if first and (sharing := self.tp * self.kept.cp) > 1:
            vision, audio = self.model.vision, self.model.audio
            rows = 0.0 if vision is None else self.batch.tiles * vision.pooled_side**2
            rows += 0.0 if audio is None else self.batch.chunks * audio.num_query_tokens
            seconds += rows * self.model.hidden_size * size * (sharing - 1) / sharing / self._bandwidth(sharing)
        if last and self.tp > 1:
            seconds += 3 * hidden * (self.tp - 1) / self.tp / self._bandwidth(self.tp)
        return seconds

    def _exchange(self, stage: int, *, one: float) -> float:
        """Reduction of gradients and gathering of weights; ``one``: seconds of a micro-batch, which may hide it."""
        parts = self.trained
        weights = [w for w in stage_weights(self.recipe, stage=stage) if w.part in parts and w.trainable]
        reduce = gather = 0.0
        bandwidth, gradient = self._bandwidth(self.world_size // self.pp), gradient_bytes(self.recipe)
        for expert, ranks in zip((False, True), replicas(self.recipe, self.world_size), strict=True):
            elements = sum(w.numel for w in weights if w.expert == expert) * (ranks - 1) / ranks
            if self.recipe.optim.use_distributed_optimizer:
                reduce += elements * gradient / bandwidth
                gather += elements * element_bytes(self.recipe) / bandwidth
            else:
                reduce += 2 * elements * gradient / bandwidth
        if self.parallel.overlap_grad_reduce:
            reduce = max(0.0, reduce - one * 2 / 3)
        if self.parallel.overlap_param_gather:
            gather = max(0.0, gather - one / 3)
        # Not hidden by anything: gradients of what is whole on every tensor-parallel rank, after the others.
        summed = tensor_reduced_bytes(self.recipe, self.world_size, stage=stage)
        across = 2 * summed * (self.tp - 1) / self.tp / self._bandwidth(self.tp)
        return reduce + gather + across

    def _optimizer(self, held: StaticBytes) -> float:
        return held.optimizer * OPTIMIZER_MOVES / (self.gpu.memory_gb_s * 1e9 * self.rates.memory)
