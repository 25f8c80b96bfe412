"""Refuse a layout that the machine cannot hold, before anything is built, with the figures of ``megatron-omni plan``; and
settings that move memory of a device, where there is none.

What a rank holds between steps (weights, gradients, optimizer state) is counted exactly (estimate/memory.py): a run that
needs more than there is cannot begin. Activations are an estimate, for the heaviest micro-batch: a warning.
"""

import logging
import os

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_omni.config.run import Recipe
from megatron_omni.estimate.hardware import GPUS
from megatron_omni.estimate.plan import make_plan
from megatron_omni.platform.device import accelerator_present, memory_bytes

logger = logging.getLogger(__name__)

GIB = 2**30


def check_offload(recipe: Recipe) -> None:
    """ValueError for settings that move memory of a device to the main memory, where there is no device, or not what it needs."""
    activations = "parallel.fine_grained_activation_offloading"
    asked = {
        "optim.optimizer_cpu_offload": recipe.optim.optimizer_cpu_offload,
        activations: recipe.parallel.fine_grained_activation_offloading,
    }
    for name in (name for name, is_set in asked.items() if is_set and not accelerator_present()):
        raise ValueError(
            f"{name}=True: does nothing here: this machine has no CUDA device, and all lies in main memory; set it to false, "
            "or start the run on GPUs"
        )
    if asked[activations] and not HAVE_TE:
        raise ValueError(
            f"{activations}=True: needs Transformer Engine, which is not installed; install it, or set it to false"
        )


def check_memory(recipe: Recipe, *, world_size: int, available: float | None = None) -> None:
    """ValueError for a layout whose ranks hold more between steps than their device has; a warning for its peak.

    ``available``: bytes of one rank. By default a GPU's own memory, or on a CPU its share of the main memory, which the
    ranks of a node (``LOCAL_WORLD_SIZE``) have between them.
    """
    if recipe.model.is_codec:
        return  # megabytes; there is no trunk to plan for
    if available is None:
        available = memory_bytes()
    plan = make_plan(recipe, world_size=world_size, gpu=next(iter(GPUS.values())))
    held = max((stage.held for stage in plan.stages), key=lambda held: held.total)
    figures = (
        f"the fullest of {world_size} rank(s) holds {held.weights / GIB:.1f} GiB of weights, {held.gradients / GIB:.1f} of "
        f"gradients and {held.optimizer / GIB:.1f} of optimizer state"
    )
    way_out = f"`megatron-omni plan RECIPE --gpus {world_size}` lists layouts that fit"
    if held.total > available:
        raise ValueError(
            f"parallel: {figures}, {held.total / GIB:.1f} GiB between steps, and has {available / GIB:.1f} GiB: this layout "
            f"cannot run here. {way_out}; more ranks, a longer `freeze` list or model.lora need less"
        )
    if plan.peak_bytes > available and int(os.environ.get("RANK", "0")) == 0:
        logger.warning(
            f"memory: {figures}; with the activations of the heaviest micro-batch {plan.peak_bytes / GIB:.1f} GiB (estimated) "
            f"of {available / GIB:.1f} GiB: it may run out. {way_out}"
        )
