"""Does a recipe fit on so many GPUs, how long does a step take, and what would fit better: what ``megatron-omni plan`` prints.

Memory of a rank of each pipeline stage, at its peak: weights, gradients and optimizer state (memory.py), what the
micro-batches in flight keep (activations.py; 1F1B holds ``stages - stage`` of them), and what the backward of one layer
or the loss needs besides while it runs. A reserve is left for the context, communication buffers and fragments.

A plan is made for the heaviest micro-batch that a recipe is expected to meet, see ``heaviest_batch``; its assumptions are
arguments, so that they can be doubted.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, lcm, log
from typing import Literal, NamedTuple

from megatron_omni.config.model import MoEConfig
from megatron_omni.config.parallel import LOGITS_CHUNK, ParallelConfig, sequence_multiple, stage_blocks
from megatron_omni.config.parts import draws_alone
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import num_micro_batches, validate
from megatron_omni.estimate.activations import FP32, Activations, MicroBatch
from megatron_omni.estimate.flops import flops_per_token
from megatron_omni.estimate.hardware import STATED, Efficiency, Gpu
from megatron_omni.estimate.memory import STAGING_BYTES, StaticBytes, static_bytes
from megatron_omni.estimate.parameters import padded_vocab_size
from megatron_omni.estimate.pictures import num_vision_rows, working_bytes
from megatron_omni.estimate.pipeline import balanced, bubble
from megatron_omni.estimate.step_time import StepTime, StepTimer

GIB = 2**30
RESERVE_GIB = 6.0
"""CUDA context, communicators, cuBLAS workspace, fragments of the allocator."""
IMBALANCE = 1.5
"""Rows of the fullest rank's experts over the mean. 4 experts of which a token takes 2.3 can reach 1.7."""
DEFAULT_CHUNKS = 8
"""Audio chunks beside the pictures of the heaviest sequence: four minutes."""
WORDS_OF_A_PICTURE = 128
"""Tokens of a sample that draws, beside its source picture and its block."""
SECONDS_PER_DAY = 86_400
Recompute = Literal["none", "full", "moe"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "moe", "full")
"""From the fastest, which keeps most, to the slowest."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage."""

    held: StaticBytes
    language: float
    """Kept by the blocks, all micro-batches in flight."""
    encoders: float
    loss: float
    drawing: float
    """Projectors and generator of pictures."""
    working: float
    """While a layer's backward, the loss or a save runs."""

    @property
    def total(self) -> float:
        """At the peak."""
        return self.held.total + self.language + self.encoders + self.loss + self.drawing + self.working


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe asks of its GPUs."""

    recipe: Recipe
    world_size: int
    gpu: Gpu
    batch: MicroBatch
    stages: list[StageMemory]
    step: StepTime
    stage_seconds: list[float]
    """Of a micro-batch on each pipeline stage."""
    tokens_per_step: float
    usable_bytes: float

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the usable memory."""
        return self.peak_bytes <= self.usable_bytes

    @property
    def peak_bytes(self) -> float:
        """Of the fullest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def blocks(self) -> list[int]:
        """Of each pipeline stage."""
        return stage_blocks(self.recipe.parallel, self.recipe.model.num_layers)

    @property
    def bubble(self) -> float:
        """Share of the time of forward and backward in which ranks wait for other stages."""
        return bubble(self.stage_seconds, num_micro_batches(self.recipe, self.world_size))

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        return self.tokens_per_step / self.step.total

    @property
    def mfu(self) -> float:
        """Model FLOPs (language model, as training/metrics.py counts them) over the sheet's rate."""
        batch = self.batch
        flops = flops_per_token(self.recipe.model, batch.mean_length, batch.mean_k, prefix_share=batch.prefix_share)
        return self.tokens_per_second * flops / (self.world_size * self.gpu.tflops * 1e12)

    @property
    def pictures_per_step(self) -> float:
        """Drawn ones, of all ranks."""
        return self.batch.pictures / self.batch.rows * self.recipe.data.global_batch_size

    def days(self, tokens: float) -> float:
        """For so many tokens."""
        return tokens / self.tokens_per_second / SECONDS_PER_DAY


def expected_mean_k(moe: MoEConfig, *, draws: int = 4000, most_logits: int = 500_000) -> float:
    """Real experts per token before training has shaped the gate: independent N(0, 1) logits, drawn by the rule.

    ``draws`` tokens, fewer where there are so many slots that these were more than ``most_logits``.

    The paper's shape gives 2.34 (2.92 slots with the null, of 5). A trained gate will differ: a log has ``moe/mean_k``.
    """
    slots = moe.num_routed_experts + moe.num_null_experts
    if moe.top_k is not None:
        return moe.top_k * moe.num_routed_experts / slots
    draws = max(1, min(draws, most_logits // slots))
    rng, real = random.Random(0), 0
    for _ in range(draws):
        logits = [rng.gauss(0.0, 1.0) for _ in range(slots)]
        total = sum(map(exp, logits))
        noise = [-log(-log(rng.random())) if moe.sample_experts else 0.0 for _ in range(slots)]
        reached = chosen = 0.0
        for slot in sorted(range(slots), key=lambda i: -(logits[i] + noise[i])):
            if reached >= moe.top_p:
                break
            reached += exp(logits[slot]) / total
            chosen += slot < moe.num_routed_experts
        real += min(int(chosen), moe.max_routed or slots)
    return real / draws


def heaviest_batch(
    recipe: Recipe,
    *,
    mean_k: float | None = None,
    imbalance: float = IMBALANCE,
    label_share: float = 0.5,
    tiles: float | None = None,
    chunks: float | None = None,
    pictures: float | None = None,
    sample_length: int | None = None,
) -> MicroBatch:
    """A full micro-batch: sequences of ``seq_length`` tokens, of which ``label_share`` carry labels; a speech generator's
    others all see each other.

    Each sequence holds ``tiles`` (a video of ``max_frames``) and ``chunks`` of sound, or what fits beside each other.
    Packed sequences hold samples of ``sample_length`` tokens and what is left over; one sample by default, for which
    attention takes longest. In task ``generative`` each sequence draws ``pictures``: by default one, or packed as many as samples
    of a block, a source picture and 128 tokens of words have room (739 tokens of the full model; the paper's have 750 to 930).
    """
    model, data = recipe.model, recipe.data
    if model.image is None or recipe.task != "generative":
        pictures = 0.0
    elif pictures is None:
        each = sample_length or len(model.image.block) + num_vision_rows(model) + WORDS_OF_A_PICTURE
        pictures = float(max(1, data.seq_length // each)) if data.packing else 1.0
    room = float(data.seq_length)
    if model.vision is None:
        tiles = 0.0
    else:
        per_tile = model.vision.pooled_side**2
        tiles = min(float(data.max_frames), room // per_tile) if tiles is None else tiles
        room -= tiles * per_tile
    if model.audio is None:
        chunks = 0.0
    elif chunks is None:
        chunks = max(0.0, min(DEFAULT_CHUNKS, room // model.audio.num_query_tokens))
    multiple = lcm(data.pad_to_multiple_of, sequence_multiple(recipe.parallel))
    lengths: tuple[int, ...] = ()
    if sample_length is not None and data.packing:
        whole, rest = divmod(data.seq_length, sample_length)
        lengths = (whole * (sample_length,) + (rest > 0) * (rest,)) * data.micro_batch_size
    return MicroBatch(
        rows=data.micro_batch_size,
        length=-(-data.seq_length // multiple) * multiple,
        label_tokens=data.micro_batch_size * data.seq_length * label_share,
        tiles=data.micro_batch_size * tiles,
        chunks=data.micro_batch_size * chunks,
        lengths=lengths,
        mean_k=0.0 if model.moe is None else expected_mean_k(model.moe) if mean_k is None else mean_k,
        imbalance=imbalance if recipe.parallel.expert_model_parallel_size > 1 else 1.0,
        prefix_share=0.0 if model.speech is None else 1.0 - label_share,
        pictures=data.micro_batch_size * pictures,
    )


def make_plan(
    recipe: Recipe,
    *,
    world_size: int,
    gpu: Gpu,
    batch: MicroBatch | None = None,
    efficiency: Efficiency = STATED,
    fill: float = 1.0,
    reserve_gib: float = RESERVE_GIB,
) -> Plan:
    """The plan of ``recipe``, which must be valid on ``world_size`` ranks; ``fill``: tokens in a sequence over its length."""
    batch = heaviest_batch(recipe) if batch is None else batch
    stages = [
        _stage_memory(recipe, world_size, batch, stage=stage)
        for stage in range(recipe.parallel.pipeline_model_parallel_size)
    ]
    timer = StepTimer(recipe, batch, world_size=world_size, gpu=gpu, efficiency=efficiency)
    return Plan(
        recipe=recipe,
        world_size=world_size,
        gpu=gpu,
        batch=batch,
        stages=stages,
        step=timer.step([stage.held for stage in stages]),
        stage_seconds=timer.stage_seconds(),
        tokens_per_step=recipe.data.global_batch_size * recipe.data.seq_length * fill,
        usable_bytes=(gpu.memory_gib - reserve_gib) * GIB,
    )


def alternatives(plan: Plan, *, efficiency: Efficiency = STATED, reserve_gib: float = RESERVE_GIB) -> list[Plan]:
    """Layouts of the same recipe that fit, the fastest first."""
    found = []
    for parallel in layouts(plan.recipe, plan.world_size):
        recipe = replace(plan.recipe, parallel=parallel)
        imbalance = max(plan.batch.imbalance, IMBALANCE) if parallel.expert_model_parallel_size > 1 else 1.0
        other = make_plan(
            recipe,
            world_size=plan.world_size,
            gpu=plan.gpu,
            batch=replace(plan.batch, imbalance=imbalance),
            efficiency=efficiency,
            fill=fill_of(plan),
            reserve_gib=reserve_gib,
        )
        if other.fits:
            found.append(other)
    return sorted(found, key=lambda other: -other.tokens_per_second)


def splits(plan: Plan, *, efficiency: Efficiency = STATED, reserve_gib: float = RESERVE_GIB) -> dict[str, Plan]:
    """Ways to cut the blocks over the stages: the recipe's own, the even one where there is one, and that whose slowest
    stage is fastest. Those that are alike stand once; nothing where there is one stage."""
    parallel, model = plan.recipe.parallel, plan.recipe.model
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        return {}
    timer = StepTimer(plan.recipe, plan.batch, world_size=plan.world_size, gpu=plan.gpu, efficiency=efficiency)
    block = timer.block_seconds()
    others = [seconds - count * block for seconds, count in zip(plan.stage_seconds, plan.blocks, strict=True)]
    even = [model.num_layers // stages] * stages
    wanted = {"even": even} if sum(even) == model.num_layers else {}
    wanted["proposed"] = balanced(model.num_layers, block=block, others=others)
    found = {"even" if plan.blocks == even else "as it is": plan}
    for name, blocks in wanted.items():
        if blocks not in [other.blocks for other in found.values()]:
            recipe = replace(plan.recipe, parallel=replace(parallel, pipeline_layout=blocks))
            found[name] = make_plan(
                recipe,
                world_size=plan.world_size,
                gpu=plan.gpu,
                batch=plan.batch,
                efficiency=efficiency,
                fill=fill_of(plan),
                reserve_gib=reserve_gib,
            )
    return found


def fill_of(plan: Plan) -> float:
    """Tokens in a sequence over its length, as the plan was made."""
    return plan.tokens_per_step / (plan.recipe.data.global_batch_size * plan.recipe.data.seq_length)


def layouts(recipe: Recipe, world_size: int) -> Iterator[ParallelConfig]:
    """Every layout on which ``recipe`` is valid, fitting or not."""
    for sizes in model_parallel_sizes(recipe, world_size, contexts=[recipe.parallel.context_parallel_size]):
        for recompute in RECOMPUTE:
            yield laid_out(recipe, sizes, recompute=recompute)


class Sizes(NamedTuple):
    """What a replica and its experts are cut into."""

    tp: int
    cp: int
    pp: int
    ep: int

    @property
    def ranks(self) -> int:
        """Of a replica."""
        return self.tp * self.cp * self.pp


def model_parallel_sizes(recipe: Recipe, world_size: int, *, contexts: Sequence[int]) -> Iterator[Sizes]:
    """Of every layout on which ``recipe`` is valid; ``contexts``: context-parallel sizes to look at."""
    model, data = recipe.model, recipe.data
    experts = 1 if model.moe is None else model.moe.num_routed_experts
    tensors = _divisors(model.num_query_groups)
    stages = sorted({*_divisors(model.num_layers), recipe.parallel.pipeline_model_parallel_size})
    for sizes in itertools.starmap(Sizes, itertools.product(tensors, contexts, stages, _divisors(experts))):
        if world_size % sizes.ranks:
            continue
        if data.global_batch_size % (data.micro_batch_size * (world_size // sizes.ranks)):
            continue  # here, for to validate takes milliseconds
        parallel = laid_out(recipe, sizes, recompute=recipe.parallel.recompute)
        try:
            validate(replace(recipe, parallel=parallel), world_size=world_size, check_files=False)
        except ValueError:
            continue
        yield sizes


def laid_out(recipe: Recipe, sizes: Sizes, *, recompute: Recompute) -> ParallelConfig:
    """The recipe's parallel settings with other sizes; as many stages as it has are cut as it says, others evenly."""
    own = recipe.parallel
    return replace(
        own,
        tensor_model_parallel_size=sizes.tp,
        context_parallel_size=sizes.cp,
        pipeline_model_parallel_size=sizes.pp,
        pipeline_layout=own.pipeline_layout if sizes.pp == own.pipeline_model_parallel_size else [],
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=1,
        recompute=recompute,
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _stage_memory(recipe: Recipe, world_size: int, batch: MicroBatch, *, stage: int) -> StageMemory:
    stages = recipe.parallel.pipeline_model_parallel_size
    in_flight = min(stages - stage, num_micro_batches(recipe, world_size))
    kept = Activations(recipe, batch)
    first, last = stage == 0, stage == stages - 1
    trunk, learns = not draws_alone(recipe), kept.learns
    encoders = kept.embedding() + kept.vision() + kept.audio() if first and learns else 0.0
    loss = kept.norm() + kept.head() if last and learns else 0.0
    drawing = kept.drawing() if last else 0.0
    return StageMemory(
        held=static_bytes(recipe, world_size, stage=stage),
        language=in_flight * (kept.stage(stage) - encoders - loss - drawing),
        encoders=in_flight * encoders + (kept.media() if first and trunk else 0.0),
        loss=loss,
        drawing=drawing,
        working=max(
            _attention_working(kept) if trunk else 0.0,
            _layer_working(recipe, kept) if trunk else 0.0,
            _loss_working(kept) if last and trunk else 0.0,
            working_bytes(recipe, kept.trained, element=kept.w, pictures=batch.pictures) if last else 0.0,
            STAGING_BYTES,  # a save
        ),
    )


def _attention_working(kept: Activations) -> float:
    """An attention layer's backward: what recomputation makes again, gradients of query, key, value and output."""
    replayed = kept.attention() if kept.layer(moe=False) < kept.attention() else 0.0
    model = kept.model
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups
    return replayed + kept.tokens * heads * model.kv_channels / kept.tp * kept.w


def _layer_working(recipe: Recipe, kept: Activations) -> float:
    """A feed-forward layer's backward: what recomputation makes again, gradients of its rows, weight gradients."""
    model, parallel, size = recipe.model, recipe.parallel, kept.w
    replayed = kept.feed_forward() if kept.layer(moe=True) < kept.feed_forward() else 0.0
    replayed += kept.attention() if kept.replays else 0.0  # of the same block, which its backward needs next
    if model.moe is None:
        width = model.ffn_hidden_size // kept.tp
        return replayed + (4 * kept.tokens * width + 3 * width * model.hidden_size) * size
    width = model.moe.moe_ffn_hidden_size // parallel.expert_tensor_parallel_size
    local = model.moe.num_routed_experts // parallel.expert_model_parallel_size
    rows = kept.received_rows * (3 * width + 2 * model.hidden_size) * size
    weights = local * 3 * width * model.hidden_size * size if "experts" in kept.trained else 0
    return replayed + rows + weights + 2 * kept.shard * model.hidden_size * FP32


def _loss_working(kept: Activations) -> float:
    """Three copies of a chunk of logits (masked, log-probabilities, gradient), and the gradient of a trained matrix, which
    chunks add up in fp32."""
    vocabulary = padded_vocab_size(kept.model) // kept.tp
    chunk = min(kept.labels * vocabulary, LOGITS_CHUNK)
    matrix = vocabulary * kept.model.hidden_size * (FP32 + kept.w if kept.chunked_logits else kept.w)
    return 3 * chunk * FP32 + ("output" in kept.trained) * matrix
