"""Checks of what draws (``model.image``), for validate.py; one sentence a problem."""

from collections.abc import Iterator
from pathlib import Path

from megatron_omni.config.parts import draws_alone
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.run import Recipe


def picture_problems(recipe: Recipe) -> Iterator[str]:
    """What does not go together with or in ``model.image``."""
    image = recipe.model.image
    if image is None:
        return
    for name in ("speech", "codec"):
        if getattr(recipe.model, name) is not None:
            yield f"model.image: the model is a speech generator or a codec (model.{name}), which draws nothing; set one to null"
    yield from _shape(image)
    if recipe.task == "generative":
        yield from _training(recipe)


def _shape(image: ImageGeneratorConfig) -> Iterator[str]:
    dit, projectors = image.dit, image.projectors
    heads = f"model.image.dit.num_attention_heads={dit.num_attention_heads}"
    if dit.hidden_size % (4 * dit.num_attention_heads):
        yield (
            f"{heads}: model.image.dit.hidden_size={dit.hidden_size} must be a multiple of four times as much, the channels "
            "that row and column turn; choose another"
        )
    if dit.num_attention_heads % dit.num_query_groups:
        yield f"{heads}: no multiple of model.image.dit.num_query_groups={dit.num_query_groups}; choose a divisor of it"
    if projectors.hidden_size % projectors.num_attention_heads:
        yield (
            f"model.image.projectors.num_attention_heads={projectors.num_attention_heads} does not divide "
            f"model.image.projectors.hidden_size={projectors.hidden_size}; choose a divisor"
        )
    if image.size_step % image.latent_step:
        yield (
            f"model.image.size_step={image.size_step}: no multiple of downsampling x dit.patch_size = {image.latent_step}, the "
            "pixels of a token; choose one"
        )
    if image.base_size < image.size_step:
        yield f"model.image.base_size={image.base_size}: below model.image.size_step={image.size_step}; raise it"
    if image.sampling.guided_channels > dit.latent_channels:
        yield (
            f"model.image.sampling.guided_channels={image.sampling.guided_channels}: there are "
            f"model.image.dit.latent_channels={dit.latent_channels}; lower it, or 0 for all"
        )


def _training(recipe: Recipe) -> Iterator[str]:
    model, missing = recipe.model, sorted({"vision", "projectors"} - set(recipe.freeze))
    if model.lora is not None:
        yield "model.lora: adapters are trained alone, and task=generative trains what draws; set model.lora=null"
    stages = recipe.parallel.pipeline_model_parallel_size
    if stages > 1 and model.vision is not None and missing and not draws_alone(recipe):
        yield (
            f"parallel.pipeline_model_parallel_size={stages}: the last stage computes the rows of source pictures with a frozen "
            f"copy of the encoder (model.image); add {', '.join(missing)} to freeze, or set it to 1"
        )


def picture_files(image: ImageGeneratorConfig) -> Iterator[str]:
    """What the files that ``model.image`` names lack."""
    for name in ("weights", "vae"):
        path = getattr(image, name)
        if path is not None and not Path(path).exists():
            yield f"model.image.{name}={path!r}: no such file or directory; fix the path, or set it to null"
