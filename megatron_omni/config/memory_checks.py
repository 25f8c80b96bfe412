"""Checks of the settings that make what a rank holds smaller (docs/parallelism.md, "Less memory").

What each needs is Megatron-Core's: its precision-aware optimizer is the distributed one on 16-bit weights, and it moves state
to main memory only in that form.
"""

from collections.abc import Iterator

from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parallel import OFFLOAD_MODULES
from megatron_omni.config.parts import draws_alone
from megatron_omni.config.run import Recipe

LEAST_DECAY = 2**-8
"""Share of itself that a bf16 number, of 8 bits, must lose to become another one after rounding, whatever its value."""


def memory_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the settings of gradients, moments and offload, one sentence each."""
    optim = recipe.optim
    if not optim.grad_reduce_in_fp32 and optim.precision != "bf16":
        yield (
            f"optim.grad_reduce_in_fp32=False: no effect with optim.precision={optim.precision}, whose gradients are fp32; set "
            "precision=bf16, or grad_reduce_in_fp32=true"
        )
    yield from _moments(optim)
    if optim.use_precision_aware_optimizer:
        yield from _precision_aware(optim)
    yield from _offload(optim)
    yield from _activations(recipe)


def _moments(optim: OptimConfig) -> Iterator[str]:
    for moment, beta in (("exp_avg", "adam_beta1"), ("exp_avg_sq", "adam_beta2")):
        dtype, decay = getattr(optim, f"{moment}_dtype"), getattr(optim, beta)
        if dtype == "fp32":
            continue
        if not optim.use_precision_aware_optimizer:
            yield (
                f"optim.{moment}_dtype={dtype}: only Megatron's precision-aware optimizer keeps moments in it; set "
                f"optim.use_precision_aware_optimizer=true, or {moment}_dtype=fp32"
            )
        if 1 - decay < LEAST_DECAY:
            yield (
                f"optim.{beta}={decay}: a mean that loses less than 1/256 of itself a step stands still when it is rounded to "
                f"{dtype}; set optim.{moment}_dtype=fp32, or {beta} to at most {1 - LEAST_DECAY:g}"
            )


def _precision_aware(optim: OptimConfig) -> Iterator[str]:
    name, moments = "optim.use_precision_aware_optimizer=True", (optim.exp_avg_dtype, optim.exp_avg_sq_dtype)
    if not optim.use_distributed_optimizer:
        yield (
            f"{name}: Megatron has it with the distributed optimizer alone; set optim.use_distributed_optimizer=true, or it "
            "to false"
        )
    if optim.precision != "bf16":
        yield f"{name}: needs master weights, which optim.precision={optim.precision} does not have; set precision=bf16"
    elif optim.grad_reduce_in_fp32 and not (optim.optimizer_cpu_offload or "bf16" in moments):
        yield (
            f"{name}: no effect while gradients and both moments are fp32 and nothing is offloaded; set a moment's dtype "
            "to bf16, or leave it out"
        )


def _offload(optim: OptimConfig) -> Iterator[str]:
    if not optim.optimizer_cpu_offload:
        if optim.optimizer_offload_fraction != 1.0 or optim.overlap_cpu_optimizer_d2h_h2d:
            yield (
                f"optim.optimizer_offload_fraction={optim.optimizer_offload_fraction}, overlap_cpu_optimizer_d2h_h2d="
                f"{optim.overlap_cpu_optimizer_d2h_h2d}: no effect without optimizer_cpu_offload=true; set it, or leave them out"
            )
        return
    if not optim.use_precision_aware_optimizer:
        yield (
            "optim.optimizer_cpu_offload=True: Megatron moves the state of its precision-aware optimizer alone; set "
            "optim.use_precision_aware_optimizer=true"
        )
    if "bf16" in (optim.exp_avg_dtype, optim.exp_avg_sq_dtype):
        yield (
            f"optim.exp_avg_dtype={optim.exp_avg_dtype}, exp_avg_sq_dtype={optim.exp_avg_sq_dtype}: no effect with "
            "optimizer_cpu_offload=true, whose Adam keeps fp32 moments; set both to fp32"
        )


def _activations(recipe: Recipe) -> Iterator[str]:
    parallel, modules = recipe.parallel, recipe.parallel.offload_modules
    for module in modules:
        if module not in OFFLOAD_MODULES:
            yield f"parallel.offload_modules: no module {module!r} that can be offloaded; choose of {', '.join(OFFLOAD_MODULES)}"
    if not parallel.fine_grained_activation_offloading:
        if modules:
            yield (
                f"parallel.offload_modules={modules}: no effect without fine_grained_activation_offloading=true; set it, or "
                "leave them out"
            )
        return
    name = "parallel.fine_grained_activation_offloading=True"
    if not modules:
        yield f"{name}: of which modules? Set parallel.offload_modules, such as [core_attn, attn_proj]"
    if "attn_proj" in modules and "core_attn" not in modules:
        yield (
            f"parallel.offload_modules={modules}: the input of attn_proj is the output of core_attn, which keeps it; add core_attn"
        )
    if parallel.recompute == "full":
        yield (
            f"{name}: nothing to offload with parallel.recompute=full, which keeps the inputs of blocks alone; set recompute to "
            "moe or none, or it to false"
        )
    if recipe.model.is_codec or draws_alone(recipe):
        yield f"{name}: no effect on what is trained without a language model; set it to false"
