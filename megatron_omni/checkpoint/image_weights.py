"""What draws, from another run than the rest of the model: ``model.image.weights``.

A generator is often trained apart from the language model (on teachers, on hidden rows from disk), and each has a checkpoint of
its own. Here the tensors ``image.*`` of the one fill those that ``init_from``, the other, lacks. Where it has running means
(means.py) they are taken, as in everything that is done with such a checkpoint.
"""

from collections.abc import Set
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_omni.checkpoint.commit import nothing_at
from megatron_omni.checkpoint.distributed import RUN_CONFIG, find_checkpoint
from megatron_omni.checkpoint.meaning import changes
from megatron_omni.checkpoint.means import MeansReader
from megatron_omni.checkpoint.reading import together
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.config.load import load_recipe
from megatron_omni.config.run import Recipe

PREFIX = "image."
FIELD = "model.image.weights"
OF_PROJECTORS = (
    "model.image.projectors.", "model.image.num_image_tokens", "model.image.image_token_repeat", "model.image.release",
    "model.image.hidden_fingerprint",
)  # fmt: skip
"""Fields that give meaning to projectors alone: a generator without any may come from a model that has others."""


def has_image_weights(recipe: Recipe) -> bool:
    """Whether ``recipe`` says where the weights of what draws are."""
    return recipe.model.image is not None and recipe.model.image.weights is not None


def fill_image_weights(model: MegatronModule, recipe: Recipe, keys: Set[str] | None = None) -> tuple[str, set[str]]:
    """Fill the tensors ``image.*`` of this rank, or those called as in ``keys``; all ranks call this together. Where from, for
    the log, and the names that the place lacks as well, which stay as they are.

    On every rank, ValueError for no checkpoint there and for tensors that it lacks and ``init_allow_missing`` does not name,
    CheckpointError for one without such weights, for another shape, and for another meaning of the same tensors.
    """
    image = recipe.model.image
    assert image is not None and image.weights is not None
    directory = find_checkpoint(Path(image.weights))
    if directory is None:
        raise ValueError(f"{FIELD}={nothing_at(Path(image.weights))}")
    own = {
        name: p for name, p in model.named_parameters() if name.startswith(PREFIX) and (keys is None or name in keys)
    }

    def fill() -> None:
        theirs = load_recipe(directory / RUN_CONFIG).model
        reader = MeansReader(directory)
        if theirs.image is None or not any(name.startswith(PREFIX) for name in reader.tensors):
            raise ConversionError(
                f"{FIELD}={str(directory)!r}: nothing there draws; give the checkpoint of a run that does"
            )
        projects = any(name.startswith(f"{PREFIX}caption.") for name in reader.tensors)
        for field, ours, then in changes(recipe.model, theirs):
            counts = field.startswith("model.image.") and (projects or not field.startswith(OF_PROJECTORS))
            if counts and field not in recipe.init_allow_changed:
                raise ConversionError(
                    f"{field}={ours}: the weights of {FIELD}={str(directory)!r} were made with {then}, which gives them their "
                    f"meaning; set it back, or name {field} in init_allow_changed"
                )
        for name, parameter in own.items():
            if name not in reader.tensors:
                continue
            stored = reader.tensors[name]
            if stored.shape != tuple(parameter.shape):
                raise ConversionError(
                    f"{FIELD}={str(directory)!r}: {name} has the shape {list(stored.shape)} there and {list(parameter.shape)} "
                    "here; set the widths of model.image to those of its run"
                )
            with torch.no_grad():
                parameter.copy_(reader.read(name))

        stored_names.update(reader.tensors)

    stored_names: set[str] = set()
    together(directory, lambda _: fill())
    left = (set(own) if keys is None else {key for key in keys if key.startswith(PREFIX)}) - stored_names
    unnamed = sorted(name for name in left if not any(fnmatchcase(name, p) for p in recipe.init_allow_missing))
    if unnamed:
        raise ValueError(
            f"{FIELD}={str(directory)!r}: lacks {len(unnamed)} tensors, {unnamed[0]} the first; name them in init_allow_missing "
            "(shell-style patterns) to keep their initial values, or give another checkpoint"
        )
    return f"what draws of {directory}", left
