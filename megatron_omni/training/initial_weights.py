"""Weights that a run starts from: another stage's checkpoint, of the same shape or one that can be made into it.

    same model              loaded as it is; what is missing or extra must be named by the recipe
    adapters -> none        adapters that this model has not are merged into the weights they stand beside
    none -> adapters        fresh ones, which change nothing (models/lora.py)
    dense -> experts        upcycled first (checkpoint/upcycle.py): every routed expert is the dense feed-forward part,
                            shared experts are slices of it, gates are drawn

Counters, optimizer state and data position start anew; ``load`` is what resumes.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.distributed import RUN_CONFIG, find_checkpoint, load_weights
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.config.load import load_recipe
from megatron_omni.config.model import UPCYCLED_SHAPE, MoEConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.lora import add_lora, merge_lora
from megatron_omni.models.omni import OmniModel

UPCYCLED = "upcycled"
"""Directory in the run directory, removed once its weights are loaded."""

logger = logging.getLogger(__name__)


def load_initial_weights(model: OmniModel, recipe: Recipe, directory: Path, *, pg: ProcessGroupCollection) -> None:
    """Fill this rank's ``model`` from the verified checkpoint ``directory``; all ranks call this together.

    ValueError for a tensor that does not fit, is missing or extra, naming it.
    """
    if recipe.optim.precision == "bf16":  # as the wrapper will: a checkpoint must have this run's dtype
        model.bfloat16()
    theirs, made = load_recipe(directory / RUN_CONFIG), None
    if theirs.model.moe is None and recipe.model.moe is not None:
        directory = made = upcycled_copies(directory, recipe, recipe.model.moe)
    merging = theirs.model.lora is not None and recipe.model.lora is None and made is None
    if merging:
        add_lora(model.language, replace(recipe.model, lora=theirs.model.lora), seed=recipe.seed, pg=pg)
    fresh = recipe.model.lora is not None and (theirs.model.lora is None or made is not None)
    load_weights(
        directory,
        model=model,
        pg=pg,
        allow_missing=[*recipe.init_allow_missing, *["*.lora_*"] * fresh],
        allow_extra=recipe.init_allow_extra,
    )
    if merging:
        merge_lora(model.language)
    if made is not None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(Path(recipe.run_dir) / UPCYCLED)


def upcycled_copies(dense: Path, recipe: Recipe, moe: MoEConfig) -> Path:
    """The dense checkpoint as a mixture of copies in the shape of ``moe``, written by rank 0 for everyone."""
    out = Path(recipe.run_dir) / UPCYCLED
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        names = [f"speech{i + 1}" for i in range(moe.num_routed_experts - 1)] + ["base"]
        try:
            upcycle(
                dict.fromkeys(names, dense),
                out,
                overrides=[f"model.moe.{name}={getattr(moe, name)}" for name in UPCYCLED_SHAPE],
                dtype="bf16" if recipe.optim.precision == "bf16" else "fp32",
                seed=recipe.seed,
            )
        except (ValueError, CheckpointError, OSError) as error:
            problem = [f"init_from={str(dense)!r} is a dense model and cannot become this one: {error}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ValueError(problem[0])
    found = find_checkpoint(out)
    assert found is not None, out
    logger.info("init_from is dense: upcycled, %d equal routed experts", moe.num_routed_experts)
    return found
