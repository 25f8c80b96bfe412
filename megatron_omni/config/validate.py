"""Checks that a recipe can work, before a process group or a tensor exists.

Every violation is one ValueError: field, value, why, fix. All of them are collected, so that one run shows them all.
"""

import difflib
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_omni.config.generator_checks import generator_files, generator_problems
from megatron_omni.config.load import all_fields
from megatron_omni.config.megatron_fields import refusal
from megatron_omni.config.memory_checks import memory_problems
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.objective_checks import objective_problems
from megatron_omni.config.parallel import ParallelConfig, not_divided, pipeline_problem, sequence_multiple
from megatron_omni.config.parts import NEW_TOKEN_ROWS, PARTS, never_trained, parts_of_run
from megatron_omni.config.picture_checks import picture_files, picture_problems
from megatron_omni.config.ranges import out_of_range
from megatron_omni.config.run import LogConfig, Recipe
from megatron_omni.config.shards import shard_paths

LORA_TARGETS = ("attention", "experts")


def validate(recipe: Recipe, *, world_size: int = 1, check_files: bool = True) -> None:
    """Raise one ValueError that lists everything wrong with ``recipe`` on ``world_size`` ranks."""
    problems = list(out_of_range(recipe))
    if not problems:  # every other check calculates with these numbers
        problems = [
            *_model(recipe.model),
            *_megatron(recipe),
            *_layout(recipe, world_size),
            *filter(None, [pipeline_problem(recipe.parallel, recipe.model.num_layers)]),
            *_run(recipe),
            *_sources(recipe),
            *memory_problems(recipe),
            *objective_problems(recipe),
            *generator_problems(recipe),
            *picture_problems(recipe),
            *_profile(recipe.log, world_size),
        ]
        if check_files:
            problems += _files(recipe)
    if problems:
        raise ValueError("; ".join(problems) if len(problems) == 1 else "\n  - ".join(["", *problems]))


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Ranks that see different data; assumes a layout that fits."""
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    return world_size // (tp * cp * pp)


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks that a layout can be laid out over."""
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    sequence = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return parallel.pipeline_model_parallel_size * math.lcm(sequence, experts)


def num_micro_batches(recipe: Recipe, world_size: int) -> int:
    """Micro-batches per rank and optimizer step; assumes sizes that divide."""
    return recipe.data.global_batch_size // (
        recipe.data.micro_batch_size * data_parallel_size(recipe.parallel, world_size)
    )


def _divides(name: str, value: int, by_name: str, by: int) -> Iterator[str]:
    if by > 0 and value % by:
        yield f"{by_name}={by} does not divide {name}={value}; choose a divisor of {value}"


def _model(model: ModelConfig) -> Iterator[str]:
    yield from _divides(
        "model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", model.num_query_groups
    )
    if len(model.mrope_section) != 3 or 2 * sum(model.mrope_section) != model.kv_channels:
        yield (
            f"model.mrope_section={list(model.mrope_section)}: must be three numbers (time, height, width) whose sum is "
            f"kv_channels / 2 = {model.kv_channels / 2:g}"
        )
    if model.moe is not None:
        yield from _moe(model)
    if model.lora is not None:
        yield from _lora(model)
    if model.vision is not None:
        yield from _divides(
            "model.vision.hidden_size", model.vision.hidden_size, "model.vision.num_attention_heads",
            model.vision.num_attention_heads,
        )  # fmt: skip
        if model.vision.stem == "conv" and (model.vision.patch_size < 4 or model.vision.patch_size.bit_count() > 1):
            yield (
                f"model.vision.patch_size={model.vision.patch_size}: model.vision.stem=conv halves the picture until a "
                "patch is one position; choose a power of two from 4 on, or stem=patch"
            )
        if model.vision.pooled_side > model.vision.image_size // model.vision.patch_size:
            yield (
                f"model.vision.pooled_side={model.vision.pooled_side}: larger than the tower's grid of "
                f"{model.vision.image_size // model.vision.patch_size} patches a side; choose a smaller one"
            )
    if model.audio is not None:
        yield from _audio(model)


def _moe(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    assert moe is not None
    slots = moe.num_routed_experts + moe.num_null_experts
    if moe.top_k is not None and moe.top_k > slots:
        yield f"model.moe.top_k={moe.top_k}: must lie in 1..{slots} (routed + null), or be null for Top-P"
    if moe.max_routed is not None and moe.max_routed > moe.num_routed_experts:
        yield f"model.moe.max_routed={moe.max_routed}: must lie in 1..{moe.num_routed_experts}, or be null"
    if moe.routing_weight_mode == "release" and moe.gradient_estimator == "paper":
        yield (
            "model.moe.gradient_estimator='paper' does not exist in routing_weight_mode='release', which normalises the "
            "multipliers after the estimator; choose grin (the published code) or none"
        )


def _lora(model: ModelConfig) -> Iterator[str]:
    lora = model.lora
    assert lora is not None
    if not lora.targets or set(lora.targets) - set(LORA_TARGETS):
        yield f"model.lora.targets={list(lora.targets)}: name one or both of {', '.join(LORA_TARGETS)}"
    if "experts" in lora.targets and model.moe is None:
        yield "model.lora.targets names experts, which a dense model (model.moe null) has not; set it to [attention]"
    if "experts" in lora.targets and model.moe is not None and model.moe.kernels not in ("omni", "torch"):
        yield (
            f"model.moe.kernels={model.moe.kernels!r}: experts with adapters (model.lora.targets) run on omni or torch; "
            "set one of them, or leave experts out of the targets"
        )


def _audio(model: ModelConfig) -> Iterator[str]:
    audio = model.audio
    assert audio is not None
    yield from _divides(
        "model.audio.hidden_size", audio.hidden_size, "model.audio.num_attention_heads", audio.num_attention_heads
    )
    if audio.hidden_size % 2:
        yield f"model.audio.hidden_size={audio.hidden_size}: must be even (sines and cosines of positions)"
    if audio.num_query_tokens > audio.max_target_positions:
        yield (
            f"model.audio.num_query_tokens={audio.num_query_tokens}: more than max_target_positions="
            f"{audio.max_target_positions}; raise the latter"
        )
    if abs(audio.num_query_tokens * 3.0 - audio.chunk_seconds * 20.0) > 1e-9:
        yield (
            f"model.audio.num_query_tokens={audio.num_query_tokens}: a chunk of {audio.chunk_seconds} s needs "
            f"{audio.chunk_seconds * 20 / 3:g} (20 tokens stand for 3 seconds)"
        )


def _layout(recipe: Recipe, world_size: int) -> Iterator[str]:
    model, parallel, data = recipe.model, recipe.parallel, recipe.data
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if not_divided(parallel, world_size):
        yield not_divided(parallel, world_size)
        return
    multiple = sequence_multiple(parallel)
    if parallel.context_parallel_size > 1 and data.seq_length % multiple:
        yield (
            f"data.seq_length={data.seq_length}: parallel.context_parallel_size={parallel.context_parallel_size} cuts a row into "
            f"2 x context_parallel_size parts, each over the tensor-parallel ranks; choose a multiple of {multiple}, such as "
            f"{-(-data.seq_length // multiple) * multiple}"
        )
    if world_size % (ep * etp * pp):
        yield (
            f"parallel.expert_model_parallel_size={ep} x expert_tensor_parallel_size={etp} x "
            f"pipeline_model_parallel_size={pp} = {ep * etp * pp} does not divide the {world_size} rank(s) of this run"
        )
    yield from _divides(
        "model.num_attention_heads", model.num_attention_heads, "parallel.tensor_model_parallel_size", tp
    )
    if model.num_query_groups % tp:
        yield (
            f"parallel.tensor_model_parallel_size={tp} does not divide model.num_query_groups={model.num_query_groups}: key "
            f"and value heads are cut, never copied; choose a divisor of {model.num_query_groups} and use the other ranks "
            "for experts (parallel.expert_model_parallel_size), stages (pipeline_model_parallel_size) or data"
        )
    yield from _messages(recipe)
    if model.moe is None:
        yield from _divides("model.ffn_hidden_size", model.ffn_hidden_size, "parallel.tensor_model_parallel_size", tp)
        if ep * etp > 1:
            yield (
                f"parallel.expert_model_parallel_size={ep}, expert_tensor_parallel_size={etp}: no effect in a dense model "
                "(model.moe is null); set both to 1"
            )
    else:
        moe = model.moe
        yield from _divides(
            "model.moe.num_routed_experts", moe.num_routed_experts, "parallel.expert_model_parallel_size", ep
        )
        yield from _divides(
            "model.moe.moe_ffn_hidden_size", moe.moe_ffn_hidden_size, "parallel.expert_tensor_parallel_size", etp
        )
        if model.lora is not None and "experts" in model.lora.targets and etp > 1:
            yield f"parallel.expert_tensor_parallel_size={etp}: adapters of experts are whole on a rank; set it to 1"
        if parallel.expert_model_parallel_size > 1 and pp > 1 and world_size // pp % ep:
            yield f"parallel.expert_model_parallel_size={ep} does not divide the {world_size // pp} rank(s) of a stage"
    dp = data_parallel_size(parallel, world_size)
    per_round = data.micro_batch_size * dp
    if per_round > data.global_batch_size:
        yield (
            f"more ranks than work: data.micro_batch_size={data.micro_batch_size} x {dp} data-parallel rank(s) = {per_round} "
            f"exceeds data.global_batch_size={data.global_batch_size}; raise it or start fewer ranks"
        )
    elif data.global_batch_size % per_round:
        yield (
            f"data.global_batch_size={data.global_batch_size} is no multiple of micro_batch_size x data-parallel ranks = "
            f"{data.micro_batch_size} x {dp} = {per_round}"
        )


def _messages(recipe: Recipe) -> Iterator[str]:
    """How gradients and weights travel between data-parallel ranks."""
    parallel, distributed = recipe.parallel, recipe.optim.use_distributed_optimizer
    if parallel.overlap_param_gather and not distributed:
        yield (
            "parallel.overlap_param_gather=True: only with optim.use_distributed_optimizer=true does a rank update a share "
            "of the weights, which the others gather; set that, or overlap_param_gather=false"
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=True: no effect without overlap_grad_reduce=true, which cuts gradients and "
            "weights into the buckets that are gathered one by one; set both or neither"
        )
    if parallel.bucket_size is not None and not (distributed or parallel.overlap_grad_reduce):
        yield (
            f"parallel.bucket_size={parallel.bucket_size}: no effect without overlap_grad_reduce or "
            "optim.use_distributed_optimizer; set one of them, or bucket_size=null"
        )


def _run(recipe: Recipe) -> Iterator[str]:
    optim, data = recipe.optim, recipe.data
    if data.packing and data.batch_by == "source":
        yield "data.packing=True: packed sequences mix sources; set data.batch_by=mixed"
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr}: above optim.lr={optim.lr}"
    if optim.lr_warmup_iters >= (optim.lr_decay_iters or recipe.train_iters):
        yield (
            f"optim.lr_warmup_iters={optim.lr_warmup_iters}: must be below the length of the schedule, "
            f"{optim.lr_decay_iters or recipe.train_iters} steps"
        )
    yield from _wsd(recipe)
    for group, names in (("freeze", recipe.freeze), ("optim.lr_scale", list(optim.lr_scale))):
        for name in names:
            if name not in PARTS:
                near = difflib.get_close_matches(name, PARTS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ";"
                yield f"{group}: unknown part {name!r}{hint} parts are {', '.join(PARTS)}"
    if NEW_TOKEN_ROWS in optim.lr_scale:
        yield "optim.lr_scale.new_token_rows: no effect; scale embeddings and output, which hold these rows"
    for name in ("max_frames", "max_frames_with_audio"):
        if data.min_frames > getattr(data, name):
            yield f"data.min_frames={data.min_frames}: above data.{name}={getattr(data, name)}"
    if recipe.model.lora is None and set(recipe.freeze) >= parts_of_run(recipe) - never_trained(recipe):
        yield f"freeze={recipe.freeze}: nothing is left to train; take a part out"
    yield from _best(recipe)
    if recipe.log.wandb_project is not None and not recipe.log.wandb_project.strip():
        yield f"log.wandb_project={recipe.log.wandb_project!r}: name a project, or set it to null"
    if (recipe.init_allow_missing or recipe.init_allow_extra or recipe.init_allow_changed) and not recipe.init_from:
        yield (
            "init_allow_missing, init_allow_extra, init_allow_changed: no effect without init_from; set it or take them out"
        )
    for name in recipe.init_allow_changed:
        if name not in all_fields():
            yield f"init_allow_changed: {name!r} is no field of a recipe; write model.rotary_base or the like"
    if recipe.model.lora is not None and recipe.freeze:
        yield f"freeze={recipe.freeze}: no effect with model.lora, which trains the adapters alone; set freeze=[]"
    if recipe.overwrite and recipe.load == "auto":
        yield "overwrite=true, load=auto: one deletes what is in run_dir, the other continues it; keep one"
    if recipe.load and recipe.init_from and recipe.load != "auto":
        yield "load and init_from are both set: load resumes everything, init_from takes weights only; keep one"


def _sources(recipe: Recipe) -> Iterator[str]:
    for field in ("sources", "eval_sources"):
        names = [source.name for source in getattr(recipe.data, field)]
        if len(set(names)) != len(names):
            yield f"data.{field}: names must differ, found {names}"
        for name in names:
            if not name.strip() or name != name.strip() or "/" in name or not name.isprintable():
                yield f"data.{field}: name={name!r}: names are words without '/' (metrics and files are called by them)"
    sources = recipe.data.sources
    if sources and not any(s.weight > 0 and s.from_sample == 0 for s in sources):
        yield "data.sources: no source with weight > 0 starts at sample 0; give one from_sample=0"


def _megatron(recipe: Recipe) -> Iterator[str]:
    for name, value in recipe.model.megatron.items():
        if (why := refusal(name, recipe)) is not None:
            yield f"model.megatron.{name}={value!r}: {why}"


def _wsd(recipe: Recipe) -> Iterator[str]:
    optim, steps = recipe.optim, recipe.optim.lr_wsd_decay_iters
    if optim.lr_decay_style != "WSD":
        if steps is not None:
            yield f"optim.lr_wsd_decay_iters={steps}: no effect with lr_decay_style={optim.lr_decay_style}; set it to WSD"
        return
    longest = (optim.lr_decay_iters or recipe.train_iters) - optim.lr_warmup_iters
    if steps is None or not 1 <= steps <= longest:
        yield (
            f"optim.lr_wsd_decay_iters={steps}: WSD needs the steps of its decay, 1 to {longest} (the schedule without "
            "its warm-up)"
        )


def _profile(log: LogConfig, world_size: int) -> Iterator[str]:
    steps, ranks = log.profile_steps, log.profile_ranks
    if steps and not (len(steps) == 2 and 0 < steps[0] <= steps[1]):
        yield f"log.profile_steps={steps}: give the first and the last step to trace, such as [10, 12], or nothing"
    if not ranks or len(set(ranks)) < len(ranks) or max(ranks) >= world_size:
        yield f"log.profile_ranks={ranks}: name ranks of 0..{world_size - 1}, each once"
    for name, is_set in (
        ("profile_ranks", ranks != LogConfig().profile_ranks),
        ("memory_snapshot", log.memory_snapshot),
    ):
        if is_set and not steps:
            yield f"log.{name}={getattr(log, name)}: no effect without log.profile_steps; set them, such as [10, 12]"


def _best(recipe: Recipe) -> Iterator[str]:
    metric, interval, save = recipe.checkpoint.keep_best, recipe.log.eval_interval, recipe.checkpoint.save_interval
    if metric is None:
        return
    names = ["eval/loss", *(f"eval/loss/{source.name}" for source in recipe.data.eval_sources)]
    if interval <= 0 or not recipe.data.eval_sources:
        yield f"checkpoint.keep_best={metric}: nothing is evaluated; set log.eval_interval and data.eval_sources"
    elif metric not in names:
        yield f"checkpoint.keep_best={metric}: no such metric; choose one of {', '.join(names)}"
    elif save % interval:
        yield (
            f"checkpoint.keep_best={metric}: checkpoint.save_interval={save} must be a multiple of log.eval_interval="
            f"{interval}, so that every checkpoint has a value"
        )


def _files(recipe: Recipe) -> Iterator[str]:
    yield from _run_dir(Path(recipe.run_dir))
    if recipe.log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield (
            f"log.wandb_project={recipe.log.wandb_project!r}: the package wandb is not installed; run pip install "
            "'megatron-omni[wandb]', or set it to null"
        )
    if recipe.model.speech is not None:
        yield from generator_files(recipe.model.speech)
    if recipe.model.image is not None:
        yield from picture_files(recipe.model.image)
    if not recipe.data.sources:
        yield "data.sources is empty: name at least one JSONL file of records"
    for source in [*recipe.data.sources, *recipe.data.eval_sources]:
        if source.root and not Path(source.root).is_dir():
            yield f"data source {source.name!r}: root={source.root!r}: no such folder; name the one that its media lie under"
        try:
            files = shard_paths(source.path)
        except ValueError as error:
            yield f"data source {source.name!r}: {error}; run the data preparation or fix the path"
            continue
        bare = [file for file in files if file.suffix == ".tar" and not file.with_name(file.name + ".index").is_file()]
        if bare:
            yield f"data source {source.name!r}: {str(bare[0])!r} has no index; run megatron-omni prepare"
    if not recipe.model.is_codec and (not recipe.data.tokenizer or not Path(recipe.data.tokenizer).exists()):
        yield (
            f"data.tokenizer={recipe.data.tokenizer!r}: no such file or directory; give a SentencePiece .model or a directory "
            "with tokenizer.json"
        )


def _run_dir(path: Path) -> Iterator[str]:
    """A directory that is there or can be made."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        yield f"run_dir={str(path)!r}: {str(there)!r} is no directory; give another path"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"run_dir={str(path)!r}: nothing may be written in {str(there)!r}; give another path"
