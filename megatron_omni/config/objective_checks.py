"""Checks of a recipe's objective (``task``, ``reinforce``, ``preference``), for validate.py; one sentence a problem."""

from collections.abc import Iterator
from pathlib import PurePath

from megatron_omni.config.objectives import PreferenceConfig, ReinforceConfig
from megatron_omni.config.run import Recipe


def objective_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the task of ``recipe`` and with the settings of the tasks that it has not."""
    for name, unused in (("reinforce", ReinforceConfig()), ("preference", PreferenceConfig())):
        if recipe.task != name and getattr(recipe, name) != unused:
            yield f"{name}: no effect with task={recipe.task}; take these settings out, or set task={name}"
    if recipe.task == "supervised":
        return
    yield from _same_forward(recipe)
    if recipe.data.packing:
        yield f"data.packing=True: with task={recipe.task} a sequence is one prompt with its responses; set it to false"
    weighted = [source.name for source in recipe.data.sources if source.loss_weight != 1]
    if weighted:
        yield f"data.sources: loss_weight of {', '.join(weighted)}: no effect with task={recipe.task}; take it out"
    if recipe.task == "reinforce":
        yield from _reinforce(recipe)
    elif recipe.init_from is None:
        yield "init_from is null: with task=preference its weights are the reference; name the checkpoint"


def _same_forward(recipe: Recipe) -> Iterator[str]:
    """Log-probabilities are compared with those of another pass, so nothing in it may be drawn."""
    model = recipe.model
    dropouts = {"model.attention_dropout": model.attention_dropout, "model.hidden_dropout": model.hidden_dropout}
    if model.lora is not None:
        dropouts["model.lora.dropout"] = model.lora.dropout
    for name, value in dropouts.items():
        if value:
            yield f"{name}={value}: with task={recipe.task} log-probabilities of two passes are compared; set it to 0"


def _reinforce(recipe: Recipe) -> Iterator[str]:
    config, moe = recipe.reinforce, recipe.model.moe
    if config.top_p < 1:
        yield (
            f"reinforce.top_p={config.top_p}: a nucleus samples from another distribution than the one that is trained; "
            "set it to 1"
        )
    if not config.rewards:
        yield "reinforce.rewards is empty: name at least one, such as [{function: accuracy}]"
    for reward in config.rewards:
        file, colon, function = reward.function.partition(":")
        if not reward.function.strip() or (colon and (PurePath(file).suffix != ".py" or not function.isidentifier())):
            yield f"reinforce.rewards: function={reward.function!r}: give the name of a reward, or FILE.py:NAME"
    if (config.overlong == "penalize") != (config.overlong_tokens is not None):
        yield (
            f"reinforce.overlong={config.overlong}, overlong_tokens={config.overlong_tokens}: the one says what becomes of "
            "long responses, the other over how many tokens a penalty grows; set overlong=penalize and a number, or neither"
        )
    elif config.overlong_tokens is not None and config.overlong_tokens > config.max_new_tokens:
        yield f"reinforce.overlong_tokens={config.overlong_tokens}: above max_new_tokens={config.max_new_tokens}"
    if config.max_new_tokens >= recipe.data.seq_length:
        yield (
            f"reinforce.max_new_tokens={config.max_new_tokens}: data.seq_length={recipe.data.seq_length} has to hold a "
            "prompt and the longest response; lower the one or raise the other"
        )
    if config.resample and recipe.data.batch_by == "source":
        yield (
            f"reinforce.resample={config.resample}: data.batch_by=source deals whole steps to a source, so single prompts "
            "cannot be replaced; set data.batch_by=mixed or resample=0"
        )
    if config.kl_coeff and recipe.init_from is None:
        yield f"reinforce.kl_coeff={config.kl_coeff}: the divergence is from the weights of init_from, which is not set"
    if config.routes != "live":
        if moe is None:
            yield f"reinforce.routes={config.routes}: no effect in a dense model (model.moe is null); set it to live"
        elif moe.routing_weight_mode == "release":
            yield (
                f"reinforce.routes={config.routes}: model.moe.routing_weight_mode=release weighs experts by the order of "
                "their choice, which a route does not hold; set routes=live or masked_softmax"
            )
