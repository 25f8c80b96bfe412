"""Weights that a run starts from: another stage's checkpoint, of the same shape or one that can be made into it.

    same model              loaded as it is; what is missing or extra must be named by the recipe
    adapters -> same        taken as they are, where rank, alpha and targets are equal
    adapters -> others      merged into the weights they stand beside; where this model has some, fresh ones follow
    none -> adapters        fresh ones, which change nothing (models/lora.py)
    dense -> experts        upcycled first (checkpoint/upcycle.py): every routed expert is the dense feed-forward part,
                            shared experts are slices of it, gates are drawn

    whole model -> what draws alone, or the reverse     tensors ``image.*``; the language model's are left out, or must be named
    some of ``image.*`` missing                         those of ``model.image.weights``, where it is set

What gives the weights their meaning (checkpoint/meaning.py) must be the same, or be named by ``init_allow_changed``.
Counters, optimizer state and data position start anew; ``load`` is what resumes.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.distributed import RUN_CONFIG, find_checkpoint, load_weights, parameter_names
from megatron_omni.checkpoint.image_weights import PREFIX, fill_image_weights, has_image_weights
from megatron_omni.checkpoint.meaning import check_handover
from megatron_omni.checkpoint.run_dir import UPCYCLED
from megatron_omni.checkpoint.text_table import TABLE, fill_text_table, has_text_table
from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.config.load import load_recipe
from megatron_omni.config.model import UPCYCLED_SHAPE, MoEConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import draw_weights
from megatron_omni.models.generators.generator_model import GeneratorModel
from megatron_omni.models.lora import add_lora, merge_lora
from megatron_omni.models.omni import OmniModel
from megatron_omni.parallel.long_work import long_work


def load_initial_weights(
    model: OmniModel | GeneratorModel, recipe: Recipe, directory: Path, *, pg: ProcessGroupCollection
) -> str:
    """Fill this rank's ``model``, which was built without drawing its weights, from the verified checkpoint ``directory``;
    all ranks call this together. What was done to the weights on their way, for the log.

    ValueError for a tensor that does not fit, is missing or extra, and for a field or tokenizer that makes the weights mean
    something else, naming it.
    """
    theirs, made, told = load_recipe(directory / RUN_CONFIG), None, [str(directory)]
    check_handover(
        recipe.model,
        theirs.model,
        tokenizers=(Path(recipe.data.tokenizer), find_tokenizer(directory)),
        origin=directory,
        allowed=recipe.init_allow_changed,
    )
    if recipe.init_allow_changed:
        told.append(f"{', '.join(recipe.init_allow_changed)} may differ")
    if isinstance(model, GeneratorModel):
        left = load_weights(
            directory, model=model, pg=pg, **_allowed(recipe, extra=["language.*", "vision.*", "audio.*"])
        )
        return "; ".join([*told, *_make_up_for(left, model, recipe, pg=pg)])
    if theirs.model.moe is None and recipe.model.moe is not None:
        directory = made = upcycled_copies(directory, recipe, recipe.model.moe)
        told.append(f"upcycled from a dense model to {recipe.model.moe.num_routed_experts} equal routed experts")
    old, new = None if made is not None else theirs.model.lora, recipe.model.lora
    merging = old is not None and not (new is not None and old.computes_as(new))
    if merging:
        merge_lora(model.language)  # fresh ones, which add nothing, make room
        add_lora(model.language, replace(recipe.model, lora=old), seed=recipe.seed, pg=pg)
        told.append("its low-rank adapters merged")
    fresh = ["*.lora_*"] * (old is None and new is not None)
    left = load_weights(directory, model=model, pg=pg, **_allowed(recipe, missing=fresh))
    initial = _make_up_for(left, model, recipe, pg=pg)
    model.language.take_new_token_rows()
    if merging:
        merge_lora(model.language)
        if new is not None:
            add_lora(model.language, recipe.model, seed=recipe.seed, pg=pg)
    told += initial
    if new is not None and (old is None or merging):
        told.append("low-rank adapters start anew")
    if made is not None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(Path(recipe.run_dir) / UPCYCLED)
    return "; ".join(told)


def _allowed(recipe: Recipe, *, missing: Sequence[str] = (), extra: Sequence[str] = ()) -> dict[str, list[str]]:
    """Patterns of tensors that ``init_from`` may lack, and may have unused."""
    drawing = [f"{PREFIX}*"] * has_image_weights(recipe)  # what is missing there as well is found by fill_image_weights
    return {
        "allow_missing": [*recipe.init_allow_missing, *missing, *drawing],
        "allow_extra": [*recipe.init_allow_extra, *extra],
    }


def _make_up_for(
    left: set[str], model: OmniModel | GeneratorModel, recipe: Recipe, *, pg: ProcessGroupCollection
) -> list[str]:
    """Values for the tensors ``left``, which ``init_from`` lacks: from elsewhere or drawn. What was done, for the log."""
    told = []
    if has_image_weights(recipe) and any(key.startswith(PREFIX) for key in left):
        text, still = fill_image_weights(model, recipe, left)
        told.append(text)
        left = {key for key in left if not key.startswith(PREFIX)} | still
    draw_weights(model, recipe, pg, only=parameter_names(model, left, pg=pg))
    if isinstance(model, OmniModel) and TABLE in left and has_text_table(model, recipe):
        told.append(fill_text_table(model, recipe))
        left = left - {TABLE}
    if initial := sorted(key for key in left if ".lora_" not in key):
        told.append(f"{len(initial)} tensors that it lacks keep their initial values, {initial[0]} the first")
    return told


def upcycled_copies(dense: Path, recipe: Recipe, moe: MoEConfig) -> Path:
    """The dense checkpoint as a mixture of copies in the shape of ``moe``, written by rank 0 for everyone."""
    out = Path(recipe.run_dir) / UPCYCLED
    problem: str | None = None
    with long_work(f"upcycling {dense}", measured=False) as work:
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
                problem = f"init_from={str(dense)!r} is a dense model and cannot become this one: {error}"
        problem = work.exchange(problem)[0]
    if problem is not None:
        raise ValueError(problem)
    found = find_checkpoint(out)
    assert found is not None, out
    return found
