"""What draws (``model.image``), from its sizes alone: weights, FLOPs of a picture, bytes that autograd keeps of it.

Pictures count as large as they get, ``base_size`` squared. Counts follow models/generators/image.py, projectors.py and dit.py
(tests/unit/test_estimate_pictures.py holds them against the modules): weights in the order of registration, FLOPs of matrix
products and attention, and every tensor that is saved for a gradient once. H width, F inner width, T tokens of a picture, R
caption rows, N vision rows of its source, of which a block keeps k.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from megatron_omni.config.model import ModelConfig
from megatron_omni.config.parts import ADAPTERS, draws_alone, parts_of, trained_parts
from megatron_omni.config.pictures import IMAGE_PARTS, DiTConfig, ImageGeneratorConfig, ProjectorConfig
from megatron_omni.config.run import Recipe

FP32, INDEX = 4, 8
TIME_CHANNELS = 256
"""Of the embedding of t before its matrices (models/generators/dit.py)."""
MOST_TILES = 4
"""Tiles of a source picture: 2 x 2, 576 rows of the released model, as its visual projector expects."""
PROJECTORS, GENERATOR = "image_projectors", "image_generator"


class PictureForward(NamedTuple):
    """FLOPs of one picture's forward, one branch."""

    projectors: float
    generator: float


def has_projectors(recipe: Recipe) -> bool:
    """Whether ranks hold the projectors of ``model.image``: teachers' embeddings take their place."""
    return recipe.task != "generative" or recipe.generative.conditions != "teachers"


def trunk_learns(recipe: Recipe) -> bool:
    """Whether there is a backward below what draws: a language model of which nothing is trained keeps no graph."""
    return not draws_alone(recipe) and bool(trained_parts(recipe) & (parts_of(recipe.model) | {ADAPTERS}) - IMAGE_PARTS)


def num_tokens(image: ImageGeneratorConfig) -> int:
    """T of the largest picture."""
    return max(1, image.base_size**2 // image.latent_step**2)


def num_vision_rows(model: ModelConfig) -> int:
    """N of a source picture; 0 without a vision encoder."""
    if (vision := model.vision) is None:
        return 0
    return vision.pooled_side**2 * min(MOST_TILES, vision.max_tiles_per_side**2)


# ------------------------------------------------------------------------------------------------------------- weights


def image_weights(model: ModelConfig, *, projectors: bool = True) -> Iterator[tuple[str, int, bool]]:
    """(part, elements, can be trained) of every parameter of ``model.image``, in the order of registration."""
    image = model.image
    assert image is not None
    dit = image.dit
    if projectors:
        block = image.num_image_tokens * image.image_token_repeat
        rows = image.projectors.num_caption_rows
        yield from _projector(image.projectors, model.hidden_size, block, rows, dit.caption_size)
        tasks = image.projectors.num_task_rows
        yield from _projector(image.projectors, model.hidden_size, tasks, tasks, dit.task_size)
        if model.vision is not None:
            yield from ((PROJECTORS, n, True) for n in _linear(model.hidden_size, dit.vision_size))
    yield PROJECTORS, dit.caption_size, True
    if not image.release:
        yield PROJECTORS, 2 * dit.task_size, True
    yield GENERATOR, dit.hidden_size, False  # pad_token
    yield from ((GENERATOR, n, True) for n in _dit(dit))


def _projector(
    config: ProjectorConfig, size_in: int, num_inputs: int, num_rows: int, size_out: int
) -> Iterator[tuple[str, int, bool]]:
    width, ffn = config.hidden_size, config.ffn_hidden_size
    attention = [3 * width * width, 3 * width, *_linear(width, width)]
    mlp = [*_linear(width, ffn), *_linear(ffn, width)]
    sizes = [num_inputs * width] if config.input_positions else []
    sizes += [num_rows * width, *_linear(size_in, width)]
    sizes += config.num_layers * [*attention, *mlp, *(4 * [width])] + 2 * [width]
    sizes += config.num_layers * [*attention, *attention, *mlp, *(6 * [width])] + 2 * [width]
    sizes += _linear(width, size_out)
    return ((PROJECTORS, n, True) for n in sizes)


def _dit(config: DiTConfig) -> Iterator[int]:
    width, condition, patch = config.hidden_size, config.condition_size, config.patch_size**2
    yield from _linear(2 * patch * config.latent_channels, width)
    yield from _linear(TIME_CHANNELS, condition)
    yield from _linear(condition, condition)
    for size in (config.task_size, config.vision_size):
        yield from (size, size, *_linear(size, condition))
    for _ in range(config.num_layers):
        yield from _block(config)
    yield from _linear(width, patch * config.latent_channels * (2 if config.learn_sigma else 1))
    yield from _linear(condition, width)


def _block(config: DiTConfig) -> Iterator[int]:
    width, heads, narrow = config.hidden_size, config.num_attention_heads, _narrow(config)
    yield from (heads, heads)  # gates
    yield from (width * width, width * width, *(4 * [width * narrow]), *(2 * [config.caption_size * narrow]))
    yield from (width, width, *(6 * [narrow]))
    yield from 3 * [width * config.ffn_hidden_size]
    yield from 4 * [width]
    yield from _linear(config.condition_size, 4 * width)
    yield from (config.caption_size, width, config.vision_size * width)
    if config.kept_vision_tokens:
        yield config.condition_size * width
        yield from (width, width, *_linear(width, width))
        for a, b in ((width, width // 2), (width // 2, width // 4), (width // 4, 1)):
            yield from _linear(a, b)


def _linear(size_in: int, size_out: int) -> list[int]:
    return [size_in * size_out, size_out]


def _narrow(config: DiTConfig) -> int:
    return config.hidden_size // config.num_attention_heads * config.num_query_groups


# --------------------------------------------------------------------------------------------------------------- FLOPs


def picture_forward(model: ModelConfig) -> PictureForward:
    """Of the largest picture with a source; zeros without ``model.image``."""
    if (image := model.image) is None:
        return PictureForward(0.0, 0.0)
    inside, rows, vision = image.projectors, image.projectors.num_caption_rows, num_vision_rows(model)
    block = image.num_image_tokens * image.image_token_repeat
    projectors = _projector_flops(inside, model.hidden_size, block, rows, image.dit.caption_size)
    tasks = inside.num_task_rows
    projectors += _projector_flops(inside, model.hidden_size, tasks, tasks, image.dit.task_size)
    projectors += 2.0 * vision * model.hidden_size * image.dit.vision_size
    return PictureForward(projectors, dit_flops(image.dit, num_tokens(image), caption_rows=rows, vision_rows=vision))


def picture_flops(recipe: Recipe) -> float:
    """Training FLOPs of one picture, as :func:`flops.media_flops` counts: three forwards of what is trained, two of a frozen
    generator above trained projectors; no recomputation."""
    forward = picture_forward(recipe.model)
    trained = trained_parts(recipe)
    above = PROJECTORS in trained
    projectors = forward.projectors * (3 if above else 1) if has_projectors(recipe) else 0.0
    return projectors + draws(recipe) * forward.generator * (3 if GENERATOR in trained else 2 if above else 1)


def draws(recipe: Recipe) -> bool:
    """Whether the generator runs in training: alignment of projectors needs it not."""
    return recipe.task == "generative" and recipe.generative.losses.flow > 0


def dit_flops(config: DiTConfig, tokens: int, *, caption_rows: int, vision_rows: int) -> float:
    """Of one forward of one picture."""
    width, condition, narrow = config.hidden_size, config.condition_size, _narrow(config)
    patch, channels = config.patch_size**2, config.latent_channels
    kept = min(config.kept_vision_tokens or vision_rows, vision_rows)
    block = tokens * (2 * width * width + 2 * width * narrow + 3 * width * config.ffn_hidden_size)
    block += condition * 4 * width + caption_rows * 2 * config.caption_size * narrow + kept * 2 * width * narrow
    block += vision_rows * config.vision_size * width
    if config.kept_vision_tokens and vision_rows:
        block += condition * width + vision_rows * (
            width * width + width * width // 2 + width * width // 8 + width // 4
        )
    block += 2 * tokens * (tokens + caption_rows + kept) * width  # scores and their sums
    ends = tokens * width * patch * channels * (2 + (2 if config.learn_sigma else 1))
    ends += condition * (TIME_CHANNELS + condition + config.task_size + config.vision_size + width)
    return 2.0 * (config.num_layers * block + ends)


def _projector_flops(config: ProjectorConfig, size_in: int, num_inputs: int, num_rows: int, size_out: int) -> float:
    width, mlp = config.hidden_size, 2 * config.hidden_size * config.ffn_hidden_size
    encoder = num_inputs * (4 * width * width + mlp) + 2 * num_inputs**2 * width
    decoder = num_rows * (6 * width * width + mlp) + num_inputs * 2 * width * width
    decoder += 2 * num_rows * (num_rows + num_inputs) * width
    ends = num_inputs * size_in * width + num_rows * width * size_out
    return 2.0 * (config.num_layers * (encoder + decoder) + ends)


# --------------------------------------------------------------------------------------------------------------- bytes


def picture_bytes(recipe: Recipe, trained: Collection[str], *, element: int) -> float:
    """Kept of one picture until its backward; ``element``: bytes of an activation."""
    image = recipe.model.image
    if image is None or recipe.task != "generative":
        return 0.0
    projects = has_projectors(recipe) and PROJECTORS in trained
    kept = projector_bytes(recipe.model, element=element) if projects else 0.0
    if draws(recipe) and (GENERATOR in trained or PROJECTORS in trained):
        whole = dit_bytes(recipe.model, trained=GENERATOR in trained, element=element)
        if recipe.parallel.recompute == "full":
            dit = image.dit
            whole = dit.num_layers * num_tokens(image) * dit.hidden_size * element
        kept += whole
    return kept


def working_bytes(recipe: Recipe, trained: Collection[str], *, element: int, pictures: float) -> float:
    """Besides, while a block's backward runs: what recomputation makes again of a block of ``pictures``."""
    if not draws(recipe) or recipe.parallel.recompute != "full":
        return 0.0
    image = recipe.model.image
    assert image is not None
    whole = dit_bytes(recipe.model, trained=GENERATOR in trained, element=element)
    return pictures * whole / image.dit.num_layers


def dit_bytes(model: ModelConfig, *, trained: bool, element: int) -> float:
    """Of the generator on one picture with a source, whose conditions have a gradient.

    Norms without a kernel of their own keep an fp32 copy of their input and, trained, of what they made of it.
    """
    image = model.image
    assert image is not None
    dit, tokens, rows, vision = image.dit, num_tokens(image), image.projectors.num_caption_rows, num_vision_rows(model)
    width, narrow, heads = dit.hidden_size, _narrow(dit), dit.num_attention_heads
    normed = FP32 * (1 + trained)
    # Query, key, value, three results, gated and modulated values, inputs of LayerNorms and, trained, of matrices; four norms.
    of_token = (11 + 3 * trained) * width + narrow + (3 + trained) * dit.ffn_hidden_size + 4
    total = tokens * (of_token * element + 4 * width * normed + (4 + 3 * heads) * FP32)
    total += rows * ((2 * width + narrow) * element + trained * dit.caption_size * (FP32 + element))
    total += rows * (element < FP32) * dit.caption_size * FP32
    kept = min(dit.kept_vision_tokens or vision, vision)
    total += kept * ((2 + trained) * width * element + narrow * element + width * normed)
    if dit.kept_vision_tokens and vision:
        total += kept * width * (element + INDEX)
        total += vision * ((3 + 2 * trained) * width + (1 + trained) * (width // 2 + width // 4)) * element
    ends = tokens * ((2 + trained) * width + trained * 2 * dit.patch_size**2 * dit.latent_channels) * element
    return dit.num_layers * total + ends


def projector_bytes(model: ModelConfig, *, element: int) -> float:
    """Of the trained projectors on one picture with a source."""
    image = model.image
    assert image is not None
    inside, tasks = image.projectors, image.projectors.num_task_rows
    block = image.num_image_tokens * image.image_token_repeat
    total = _projector_bytes(inside, model.hidden_size, block, inside.num_caption_rows, element)
    total += _projector_bytes(inside, model.hidden_size, tasks, tasks, element)
    return total + num_vision_rows(model) * model.hidden_size * element


def _projector_bytes(config: ProjectorConfig, size_in: int, num_inputs: int, num_rows: int, element: int) -> float:
    """Of each layer of the encoder and the decoder together: query, key, value, results, inputs of matrices and norms."""
    width, ffn = config.hidden_size, config.ffn_hidden_size
    layer = (num_inputs * (10 * width + ffn + 4) + num_rows * (12 * width + ffn + 6)) * element
    layer += (num_inputs + 2 * num_rows) * config.num_attention_heads * FP32
    ends = num_inputs * (size_in + 2 * width) + num_rows * 2 * width
    return config.num_layers * layer + ends * element
