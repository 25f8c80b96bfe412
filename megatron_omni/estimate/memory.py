"""Bytes that a rank holds from the first step to the last: weights, gradients, optimizer state. Exact, padding included.

Weights: bf16 (or fp32) parameters, frozen ones too. Gradients: one buffer for what is trained, fp32 or, without
``grad_reduce_in_fp32``, of the weights' dtype. Optimizer: two Adam moments of what is trained, fp32 or bf16, and for bf16
weights an fp32 master copy, less what is offloaded; running means of what draws (``generative.ema``), an even share of them.

With the distributed optimizer trained parameters live in buffers: one for routed experts, cut over the expert
data-parallel ranks, one for the rest, cut over the data-parallel ranks. A buffer lays parameters out from the last to
the first, each at a multiple of 64 elements; buckets (``bucket_size`` of config/parallel.py)
end at a multiple of 128 and of the ranks. Rank r updates the r-th part of every bucket, whatever parameters lie there.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_omni.config.parallel import bucket_size
from megatron_omni.config.parts import NEW_TOKEN_ROWS, trained_parts
from megatron_omni.config.run import Recipe
from megatron_omni.estimate.parameters import Weight, stage_weights
from megatron_omni.estimate.pictures import GENERATOR, PROJECTORS

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
STAGING_BYTES = 64 * 2**20
"""On their way between a device, main memory and the disk at a time, while a checkpoint is saved or loaded."""


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """What a rank holds between steps."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def element_bytes(recipe: Recipe) -> int:
    """Bytes of a weight and of an activation."""
    return DTYPE_BYTES[recipe.optim.precision]


def gradient_bytes(recipe: Recipe) -> int:
    """Of a trained parameter."""
    return DTYPE_BYTES["fp32"] if recipe.optim.grad_reduce_in_fp32 else element_bytes(recipe)


def state_bytes(recipe: Recipe) -> int:
    """The optimizer's, of a trained parameter, wherever they lie: two moments and a master weight."""
    optim = recipe.optim
    moments = DTYPE_BYTES[optim.exp_avg_dtype] + DTYPE_BYTES[optim.exp_avg_sq_dtype]
    return moments + (DTYPE_BYTES["fp32"] if optim.precision == "bf16" else 0)


def replicas(recipe: Recipe, world_size: int) -> tuple[int, int]:
    """Data-parallel ranks that hold the same dense parameters, and those that hold the same routed experts."""
    parallel = recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return world_size // (tp * pp), world_size // (experts * pp)


def static_bytes(
    recipe: Recipe, world_size: int, *, stage: int, dp_rank: int = 0, expert_dp_rank: int = 0
) -> StaticBytes:
    """Bytes on the rank of pipeline ``stage`` with these places in its data-parallel groups.

    Rank 0 of a group holds at least as much as any other: padding lies at the end of a bucket.
    """
    weights = stage_weights(recipe, stage=stage)
    parts = trained_parts(recipe)
    trained = [w for w in weights if w.trainable and w.part in parts]
    dense, experts = [w for w in trained if not w.expert], [w for w in trained if w.expert]
    size, gradient, optim = element_bytes(recipe), gradient_bytes(recipe), recipe.optim
    # Offloaded are whole parameters until their share is reached, so this is the most that stays.
    state = state_bytes(recipe) * (1 - optim.optimizer_offload_fraction * optim.optimizer_cpu_offload)
    frozen = sum(w.numel for w in weights) - sum(w.numel for w in trained)
    means = _means(recipe, trained, world_size)
    if not optim.use_distributed_optimizer:
        held = sum(w.numel for w in trained)
        optimizer = round(held * state) + means
        return StaticBytes(weights=(frozen + held) * size, gradients=held * gradient, optimizer=optimizer)
    buffered = updated = 0
    dp_sizes = replicas(recipe, world_size)
    size_of_bucket = bucket_size(recipe.parallel, stage=stage, dp_size=dp_sizes[0])
    for group, ranks, rank in zip((dense, experts), dp_sizes, (dp_rank, expert_dp_rank), strict=True):
        for bucket in _buckets(group, ranks, size_of_bucket):
            buffered += bucket.size
            updated += bucket.elements_of(rank, ranks)
    return StaticBytes(
        weights=(frozen + buffered) * size, gradients=buffered * gradient, optimizer=round(updated * state) + means
    )


def offloaded_bytes(recipe: Recipe, world_size: int) -> int:
    """Main memory that the optimizer of the fullest rank takes, at most: its share of the state and an fp32 gradient."""
    optim, stages = recipe.optim, range(recipe.parallel.pipeline_model_parallel_size)
    if not optim.optimizer_cpu_offload:
        return 0
    whole = replace(recipe, optim=replace(optim, optimizer_cpu_offload=False))
    state = max(
        static_bytes(whole, world_size, stage=stage).optimizer - static_bytes(recipe, world_size, stage=stage).optimizer
        for stage in stages
    )
    return state * (state_bytes(recipe) + DTYPE_BYTES["fp32"]) // state_bytes(recipe)


def _means(recipe: Recipe, trained: Sequence[Weight], world_size: int) -> int:
    """fp32 bytes of a rank's share of the running means."""
    if recipe.task != "generative" or not recipe.generative.ema:
        return 0
    return 4 * sum(w.numel for w in trained if w.part in (PROJECTORS, GENERATOR)) // replicas(recipe, world_size)[0]


def tensor_reduced_bytes(recipe: Recipe, world_size: int, *, stage: int) -> float:
    """Gradients that tensor-parallel ranks add up after the backward: of what is whole on each of them, but meets a
    part of the tokens or inputs there (parallel/gradients.py). With the distributed optimizer a rank's share of them."""
    if recipe.parallel.tensor_model_parallel_size == 1:
        return 0.0
    whole = trained_parts(recipe) & {"norms", "gate", "shared_experts", "vision", "audio", "projectors", NEW_TOKEN_ROWS}
    weights = stage_weights(recipe, stage=stage)
    held = sum(w.numel for w in weights if w.trainable and w.part in whole) * gradient_bytes(recipe)
    return held / replicas(recipe, world_size)[0] if recipe.optim.use_distributed_optimizer else held


def weight_bytes_per_rank(recipe: Recipe, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on the fullest rank, without activations."""
    stages = range(recipe.parallel.pipeline_model_parallel_size)
    return vars(max((static_bytes(recipe, world_size, stage=stage) for stage in stages), key=lambda held: held.total))


@dataclass(frozen=True)
class _Bucket:
    size: int
    """Elements, padding included."""
    spans: tuple[tuple[int, int], ...]
    """First element and last + 1 of each parameter, counted from the start of the bucket."""

    def elements_of(self, rank: int, ranks: int) -> int:
        """Elements of parameters, padding not counted, in the ``rank``-th part."""
        part = self.size // ranks
        return sum(max(0, min(end, (rank + 1) * part) - max(start, rank * part)) for start, end in self.spans)


def _buckets(weights: Sequence[Weight], ranks: int, size_of_bucket: int | None) -> Iterator[_Bucket]:
    divisor = math.lcm(ranks, BUCKET_ALIGNMENT)
    spans: list[tuple[int, int]] = []
    at = 0

    def finish() -> _Bucket:
        return _Bucket(-(-at // divisor) * divisor, tuple(spans))

    for weight in reversed(weights):
        at = -(-at // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT
        if weight.own_bucket and spans:
            yield finish()
            spans, at = [], 0
        spans.append((at, at + weight.numel))
        at += weight.numel
        if weight.own_bucket or (size_of_bucket is not None and at >= size_of_bucket):
            yield finish()
            spans, at = [], 0
    if spans:
        yield finish()
