"""Optimizer and learning-rate schedule on Megatron's pieces, and the update that a non-finite gradient cannot spoil.

Parameter groups: weight decay is left out for vectors (norms, biases) and for rows of new tokens that are trained alone
(models/token_rows.py); ``optim.lr_scale`` multiplies the learning rate of the named parts (models/parts.py). Expert
parameters always form an optimizer of their own (they carry ``allreduce=False`` whatever the expert-parallel size), so a
checkpoint has the same structure for every layout.
"""

import math
from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parts import NEW_TOKEN_ROWS
from megatron_omni.config.run import Recipe
from megatron_omni.models.parts import part_of, scaled_with
from megatron_omni.platform import adam

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(
    model: DistributedDataParallel, recipe: Recipe, pg: ProcessGroupCollection
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """The optimizer of the trainable parameters and its schedule, standing before the first step."""
    optim = recipe.optim
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=optim.precision == "bf16",
        params_dtype=torch.bfloat16 if optim.precision == "bf16" else torch.float32,
        use_distributed_optimizer=optim.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
    )
    if optim.use_precision_aware_optimizer:
        _make_precision_aware(config, optim)
    optimizer = get_megatron_optimizer(
        config, [model], config_overrides=_overrides(recipe), use_gloo_process_groups=False, pg_collection=pg
    )
    assert isinstance(optimizer, ChainedOptimizer)
    for member in optimizer.chained_optimizers:
        if not member.is_stub_optimizer:
            _begin_state(member)
    return optimizer, build_schedule(optimizer, recipe)


def _make_precision_aware(config: OptimizerConfig, optim: OptimConfig) -> None:
    """Master weights in Adam's own state, moments of the dtypes asked for, gradients read as the buffers have them; a share of
    it in main memory.

    Set on a config that is made already: making one, Megatron insists on Transformer Engine's Adam, where platform/adam.py
    has the same. Masters stay whole: of halves (``store_param_remainders``) a checkpoint could be read by such runs alone.
    """
    if not optim.optimizer_cpu_offload:
        adam.check_precision_aware()
    config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    config.store_param_remainders = False
    config.optimizer_cpu_offload = optim.optimizer_cpu_offload
    config.optimizer_offload_fraction = optim.optimizer_offload_fraction
    config.overlap_cpu_optimizer_d2h_h2d = optim.overlap_cpu_optimizer_d2h_h2d
    config.exp_avg_dtype, config.exp_avg_sq_dtype = DTYPES[optim.exp_avg_dtype], DTYPES[optim.exp_avg_sq_dtype]


def _begin_state(member: MegatronOptimizer) -> None:
    """Give a member its state, so that a checkpoint has the same tensors before the first update as after it."""
    if not member.config.use_precision_aware_optimizer:
        member.init_state_fn(member.optimizer, member.config)
        return
    if isinstance(member.optimizer, HybridDeviceOptimizer):
        return _begin_offloaded_state(member.optimizer)
    for group in member.optimizer.param_groups:
        for parameter in group["params"]:
            # Not by init_state_fn, which does not pass the second argument that Transformer Engine's Adam wants.
            member.optimizer.initialize_state(parameter, False)


def _begin_offloaded_state(optimizer: HybridDeviceOptimizer) -> None:
    """It makes its state in an update alone: one of no size with gradients of zero, whose step is taken back."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for name in ("cpu_optimizer_cls", "gpu_optimizer_cls"):  # no plain values: a checkpoint with them is not read
            group.pop(name, None)
        for parameter in group["params"]:
            parameter.decoupled_grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for member in optimizer.sub_optimizers:
        for group in member.param_groups:
            if "step" in group:  # Transformer Engine's
                group["step"] = 0
        for state in member.state.values():
            if "step" in state:  # torch's
                state["step"].zero_()


def build_schedule(optimizer: object, recipe: Recipe) -> OptimizerParamScheduler:
    """The learning rate of every step, for an optimizer with ``param_groups``."""
    optim = recipe.optim
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters,
        lr_decay_steps=optim.lr_decay_iters or recipe.train_iters,
        lr_decay_style=optim.lr_decay_style,
        wsd_decay_steps=optim.lr_wsd_decay_iters,
        lr_wsd_decay_style="linear",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=recipe.train_iters,
        wd_incr_style="constant",
    )


def _overrides(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """Megatron's per-parameter settings: no weight decay on vectors, learning rates of the scaled parts."""
    overrides = {_key("no weight decay", _undecayed): ParamGroupOverride(wd_mult=0.0)}
    for part, scale in recipe.optim.lr_scale.items():
        if scale == 1:
            continue  # its group would look like the plain one, and Megatron knows a checkpoint's groups by their looks
        key = _key(f"lr_scale {part}", lambda _, name, part=part: scaled_with(_bare(name)) == part)
        overrides[key] = ParamGroupOverride(max_lr=recipe.optim.lr * scale, min_lr=recipe.optim.min_lr * scale)
    return overrides


def _key(name: str, predicate: object) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=predicate))  # type: ignore[arg-type]


def _undecayed(param: torch.nn.Parameter, name: str) -> bool:
    return param.dim() <= 1 or name.endswith(".bias") or part_of(_bare(name)) == NEW_TOKEN_ROWS


def _bare(name: str) -> str:
    """Parameter name without the prefixes of the wrappers."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def update(optimizer: ChainedOptimizer, scheduler: OptimizerParamScheduler, *, clip_grad: float) -> tuple[bool, float]:
    """Clip, advance the schedule and update the weights; (whether they changed, gradient norm before clipping).

    A norm that is not finite leaves weights, optimizer state and schedule untouched. Megatron reduces the norm over
    all ranks that hold parts of the model, so every rank takes the same branch.
    """
    found_inf = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if found_inf or not math.isfinite(norm):
        return False, norm
    scheduler.step(1)
    if clip_grad > 0.0:
        for member, parameters in _with_parameters(optimizer):
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=clip_grad,
                total_norm=norm,
                use_decoupled_grad=member.config.use_precision_aware_optimizer,
            )
    changed = optimizer.step_with_ready_grads()
    assert changed, "the update failed with finite gradients"
    return True, norm


def _with_parameters(optimizer: ChainedOptimizer) -> Iterable[tuple[MegatronOptimizer, list[Tensor]]]:
    for member in optimizer.chained_optimizers:
        if not member.is_stub_optimizer and (parameters := member.get_parameters()):
            yield member, parameters


def learning_rate(optimizer: ChainedOptimizer) -> float:
    """Learning rate of the unscaled groups (the first group when every one is scaled)."""
    groups = optimizer.param_groups
    plain = [group["lr"] for group in groups if group.get("default_config")]
    return float((plain or [group["lr"] for group in groups] or [0.0])[0])
