"""Checks of a recipe's objective (``task``, ``reinforce``, ``preference``), for validate.py; one sentence a problem."""

from collections.abc import Iterator
from pathlib import PurePath

from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.config.generative_checks import generative_problems
from megatron_omni.config.objectives import (
    CodecTrainingConfig,
    PictureCodecTrainingConfig,
    PreferenceConfig,
    ReinforceConfig,
)
from megatron_omni.config.parallel import MODEL_PARALLEL
from megatron_omni.config.run import Recipe


def objective_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the task of ``recipe`` and with the settings of the tasks that it has not."""
    for name, unused in (
        ("reinforce", ReinforceConfig()),
        ("preference", PreferenceConfig()),
        ("codec", CodecTrainingConfig()),
        ("generative", GenerativeConfig()),
        ("picture_codec", PictureCodecTrainingConfig()),
    ):
        if recipe.task != name and getattr(recipe, name) != unused:
            yield f"{name}: no effect with task={recipe.task}; take these settings out, or set task={name}"
    for name in ("codec", "picture_codec"):
        if (recipe.task == name) != ((model := getattr(recipe.model, name)) is not None):
            has = "null" if model is None else "set"
            yield f"task={recipe.task}, model.{name} {has}: task={name} trains a codec and nothing else does; set both or neither"
            return
    if recipe.task == "codec":
        yield from _codec(recipe)
    elif recipe.task == "generative":
        yield from generative_problems(recipe)
    elif recipe.task == "picture_codec":
        yield from _picture_codec(recipe)
    if recipe.task in ("supervised", "codec", "picture_codec", "generative"):
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


def _alone(recipe: Recipe) -> Iterator[str]:
    """What a model that is a codec cannot have."""
    model, parallel, data = recipe.model, recipe.parallel, recipe.data
    for name in ("moe", "vision", "audio", "speech", "lora"):
        if getattr(model, name) is not None:
            yield f"model.{name}: no effect in a codec (model.{recipe.task}), which has no trunk; set it to null"
    for name in MODEL_PARALLEL:
        if (size := getattr(parallel, name)) > 1:
            yield f"parallel.{name}={size}: a codec is whole on every rank and is trained on more data alone; set it to 1"
    if recipe.optim.precision != "fp32":
        yield f"optim.precision={recipe.optim.precision}: running means and phases need more digits; set it to fp32"
    if recipe.init_from is not None:
        yield f"init_from={recipe.init_from!r}: a codec starts from nothing, or goes on with load; set it to null"
    for name, plain in (("packing", False), ("weight_by", "samples"), ("balance", "none"), ("decoder", "cpu")):
        if getattr(data, name) != plain:
            yield (
                f"data.{name}={getattr(data, name)}: no effect with task={recipe.task}, whose samples are crops; set it to {plain}"
            )


def _picture_codec(recipe: Recipe) -> Iterator[str]:
    yield from _alone(recipe)
    model, crop = recipe.model.picture_codec, recipe.picture_codec.crop_size
    assert model is not None
    levels = len(model.channels)
    for name in ("encoder_blocks", "decoder_blocks"):
        if len(blocks := getattr(model, name)) != levels:
            yield f"model.picture_codec.{name}={blocks}: give one number for each of the {levels} levels of channels"
    if not levels or crop % model.downsampling:
        yield (
            f"picture_codec.crop_size={crop}: a place of the latent stands for {model.downsampling} pixels a side "
            "(model.picture_codec.channels); choose a multiple"
        )
    if not (recipe.picture_codec.square_weight or recipe.picture_codec.absolute_weight):
        yield "picture_codec.square_weight=0, absolute_weight=0: nothing would hold the colours; set one of them above 0"


def _codec(recipe: Recipe) -> Iterator[str]:
    yield from _alone(recipe)
    model, data, config = recipe.model, recipe.data, recipe.codec
    assert model.codec is not None
    if data.seq_length < config.crop_codes:
        yield f"codec.crop_codes={config.crop_codes}: above data.seq_length={data.seq_length}; raise the latter"
    if len(config.mel_fft_sizes) != len(config.mel_bins) or not config.mel_bins:
        yield f"codec.mel_fft_sizes={config.mel_fft_sizes}, mel_bins={config.mel_bins}: give as many of the one as of the other"
    elif max(config.mel_fft_sizes) > 2 * config.crop_codes * model.codec.hop_size:
        yield f"codec.mel_fft_sizes={config.mel_fft_sizes}: longer than twice a crop; raise codec.crop_codes"
    longest = 2 * config.crop_codes * model.codec.hop_size
    sizes = config.adversarial_fft_sizes
    if config.adversarial_weight > 0 and not (sizes and max(sizes) <= longest and not any(size % 4 for size in sizes)):
        yield (
            f"codec.adversarial_fft_sizes={sizes}: give one or more multiples of 4, none longer than twice a crop "
            f"({longest} samples)"
        )
    if any(size % 4 for size in config.mel_fft_sizes):
        yield f"codec.mel_fft_sizes={config.mel_fft_sizes}: frames are a quarter apart; choose multiples of 4"
    if len(config.gain_db) != 2 or config.gain_db[0] > config.gain_db[1]:
        yield f"codec.gain_db={config.gain_db}: give the lowest and the highest gain"


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
