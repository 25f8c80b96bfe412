"""A trained checkpoint, ready to answer: its recipe, tokenizer and weights on the layout of this launch.

The layout that the model was trained on does not matter: the parallel sizes are 1 unless ``overrides`` say otherwise,
and the ranks that are left over are data parallel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.checkpoint.commit import CheckpointError, nothing_at
from megatron_omni.checkpoint.distributed import RUN_CONFIG, find_checkpoint, load_weights, tokenizer_path
from megatron_omni.config.generative import GenerativeConfig
from megatron_omni.config.load import load_recipe, recipe_from_overrides
from megatron_omni.config.objectives import (
    CodecTrainingConfig,
    PictureCodecTrainingConfig,
    PreferenceConfig,
    ReinforceConfig,
)
from megatron_omni.config.parts import draws_alone
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import data_parallel_size, validate
from megatron_omni.data.builders import prompt_builder
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.models.build import build_model
from megatron_omni.models.omni import OmniModel
from megatron_omni.parallel.groups import initialize, place_in
from megatron_omni.platform.device import device
from megatron_omni.platform.seeds import seed_everything

if TYPE_CHECKING:
    from megatron_omni.models.generators.generator_model import GeneratorModel


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory that was found whole, and what it says; no weights are in memory yet."""

    directory: Path
    recipe: Recipe
    """As trained, with the layout of this launch and the checkpoint's own tokenizer."""
    builder: SampleBuilder
    """Makes prompts as training made samples."""
    pg: ProcessGroupCollection

    def load_model(self) -> OmniModel:
        """This rank's part of the model with the trained weights; all ranks call this together."""
        place = place_in(self.pg)
        seed_everything(
            self.recipe.seed, tp_rank=place.tp_rank, ep_rank=place.ep_rank, expert_tp_rank=place.expert_tp_rank
        )
        model = build_model(self.recipe, self.pg, drawn=False)
        load_weights(self.directory, model=model, pg=self.pg)
        return model

    def load_generator(self) -> "GeneratorModel":
        """What draws alone, of a model that does (``model.image``), on this rank; all ranks call this together."""
        from megatron_omni.models.generators.generator_model import GeneratorModel
        from megatron_omni.models.nothing_drawn import NothingDrawn

        with NothingDrawn():
            model = GeneratorModel(self.recipe, projectors=True, drawn=False)
        model = model.to(device(), model.config.pipeline_dtype)
        others = ("language.*", "vision.*", "audio.*")
        load_weights(self.directory, model=model, pg=self.pg, allow_extra=others)
        return model


def open_checkpoint(
    path: Path, *, overrides: Sequence[str] = (), pg: ProcessGroupCollection | None = None
) -> Checkpoint:
    """Start the process groups and read what is at ``path``, a run directory or one checkpoint; all ranks together.

    ``overrides`` are ``key=value`` changes of the recipe; ``pg`` are the groups where they exist already. ValueError
    for a path without a whole checkpoint of a model that answers, and for sizes that do not fit the model or the number of ranks.
    """
    parallel = recipe_from_overrides(list(overrides)).parallel
    if pg is None and parallel.context_parallel_size > 1:
        raise ValueError(
            f"parallel.context_parallel_size={parallel.context_parallel_size}: answers grow token by token, so rows are not cut "
            "and its ranks would all compute the same; set it to 1 and use them as data-parallel ranks"
        )
    pg = pg if pg is not None else initialize(parallel)
    try:
        directory = find_checkpoint(path)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if directory is None:
        raise ValueError(nothing_at(path))
    recipe = load_recipe(directory / RUN_CONFIG, list(overrides))
    if draws_alone(recipe):
        raise ValueError(
            f"{directory}: what draws without a language model (generative.conditions={recipe.generative.conditions}); give the "
            "checkpoint of a run with both, such as one that begins with model.image.weights of this"
        )
    recipe.parallel = parallel
    recipe.load = recipe.init_from = None
    recipe.task, recipe.reinforce, recipe.preference = "supervised", ReinforceConfig(), PreferenceConfig()
    recipe.generative, recipe.codec = GenerativeConfig(), CodecTrainingConfig()
    recipe.picture_codec = PictureCodecTrainingConfig()
    recipe.init_allow_missing, recipe.init_allow_extra, recipe.init_allow_changed, recipe.freeze = [], [], [], []
    # Batches are the caller's here; these two only have to pass the checks of the layout.
    recipe.data.micro_batch_size, recipe.data.global_batch_size = 1, data_parallel_size(parallel, dist.get_world_size())
    recipe.data.tokenizer = str(tokenizer_path(directory))
    validate(recipe, world_size=dist.get_world_size(), check_files=False)
    return Checkpoint(directory=directory, recipe=recipe, builder=prompt_builder(recipe), pg=pg)
