"""Checks of task ``generative``, for validate.py; one sentence a problem."""

from collections.abc import Iterator

from megatron_omni.config.parallel import MODEL_PARALLEL
from megatron_omni.config.parts import parts_of, trained_parts
from megatron_omni.config.pictures import IMAGE_PARTS
from megatron_omni.config.run import Recipe

ALIGNED = ("align_task", "align_caption", "align_visual")
_ROUTED = frozenset({"gate", "experts", "shared_experts"})


def generative_problems(recipe: Recipe) -> Iterator[str]:
    """What does not go together with or in ``generative`` in a recipe of that task."""
    config, losses, frozen = recipe.generative, recipe.generative.losses, frozenset(recipe.freeze)
    if recipe.model.image is None:
        yield "task=generative, model.image null: it trains what draws; set model.image, or another task"
        return
    if not any(vars(losses).values()):
        yield "generative.losses: all are 0; give what is to be learned a factor"
    if not losses.flow and "image_generator" not in frozen:
        yield "generative.losses.flow=0: nothing trains the generator; add image_generator to freeze, or set it above 0"
    aligned = [name for name in ALIGNED if getattr(losses, name)]
    if aligned and "image_projectors" in frozen:
        yield f"generative.losses.{aligned[0]}: the projectors are frozen; take image_projectors out of freeze, or set it to 0"
    if config.ema and frozen >= IMAGE_PARTS:
        yield f"generative.ema={config.ema}: nothing of what draws is trained, and only that has a mean; set it to 0"
    if config.conditions == "model":
        yield from _with_language_model(recipe)
    else:
        yield from _alone(recipe)


def trains_mixture(recipe: Recipe) -> bool:
    """Whether something of a mixture of experts learns: tokens are then routed as in the stages that train it."""
    if recipe.model.lora is not None:
        return True
    return bool(trained_parts(recipe) & parts_of(recipe.model) & _ROUTED)


def _with_language_model(recipe: Recipe) -> Iterator[str]:
    moe = recipe.model.moe
    if moe is not None and "gate" in recipe.freeze and moe.moe_aux_loss_coeff:
        yield (
            f"model.moe.moe_aux_loss_coeff={moe.moe_aux_loss_coeff}: the gate is frozen, and the loss would pull at what is "
            "trained instead; set it to 0"
        )


def _alone(recipe: Recipe) -> Iterator[str]:
    config, parallel = recipe.generative, recipe.parallel
    which = f"generative.conditions={config.conditions}"
    if config.losses.lm:
        yield f"generative.losses.lm={config.losses.lm}: with {which} there is no language model; set it to 0"
    if config.conditions == "teachers":
        for name in ALIGNED:
            if getattr(config.losses, name):
                yield f"generative.losses.{name}: with {which} there are no projectors; set it to 0"
    for name in MODEL_PARALLEL:
        if (size := getattr(parallel, name)) > 1:
            yield f"parallel.{name}={size}: with {which} every rank has the whole generator and nothing else; set it to 1"
    if recipe.model.lora is not None:
        yield f"model.lora: with {which} there is no language model; set it to null"
    for source in recipe.data.eval_sources:
        if source.metric is not None:
            yield f"data.eval_sources.{source.name}.metric={source.metric}: with {which} nothing answers; take it out"
