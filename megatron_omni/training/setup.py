"""From a validated recipe to everything a run needs: groups, model, optimizer, schedule, data, where it stands.

The order matters: parts are frozen and weights loaded before the wrapper moves parameters into its buffers, and the
optimizer copies its fp32 master weights from them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_omni.checkpoint.commit import CHECKPOINTS, MANIFEST, nothing_at, sha256
from megatron_omni.checkpoint.distributed import RUN_CONFIG, find_checkpoint, load_checkpoint
from megatron_omni.checkpoint.image_weights import fill_image_weights, has_image_weights
from megatron_omni.checkpoint.meaning import check_tokenizers, differences
from megatron_omni.checkpoint.memory import SaveMemory
from megatron_omni.checkpoint.saving import PendingSave, plan_save, start_save
from megatron_omni.checkpoint.text_table import fill_text_table, has_text_table
from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.config.parts import frozen_matrices, never_trained, trains_new_rows_alone
from megatron_omni.config.run import Recipe
from megatron_omni.data.loader import Loader, StepLoader
from megatron_omni.data.loader_state import joined_state
from megatron_omni.data.picture_arrays import vae_fingerprint
from megatron_omni.data.pictures_known import known_of_pictures
from megatron_omni.data.plan import Cursor
from megatron_omni.data.prompts import loader_kind, step_loader_kind
from megatron_omni.data.speech_known import known_from_data
from megatron_omni.data.tokenizer import NEW_SPECIALS, load_tokenizer
from megatron_omni.models.build import build_trained_model
from megatron_omni.models.generators.codec_model import TrunklessModel
from megatron_omni.models.generators.generator_model import GeneratorModel
from megatron_omni.models.generators.vae import load_picture_codec
from megatron_omni.models.omni import OmniModel
from megatron_omni.models.parts import apply_freeze, train_adapters_only
from megatron_omni.parallel.groups import Place, initialize, place_in
from megatron_omni.parallel.sharing import from_rank_0, gathered, sum_over_ranks
from megatron_omni.parallel.wrap import gather_weights, unwrap_model, wrap_model
from megatron_omni.platform.determinism import make_deterministic
from megatron_omni.platform.device import device
from megatron_omni.platform.seeds import seed_everything
from megatron_omni.training.initial_weights import load_initial_weights
from megatron_omni.training.memory import check_memory, check_offload
from megatron_omni.training.optimizer import build_optimizer
from megatron_omni.training.profile import check_snapshot
from megatron_omni.training.state import TrainState
from megatron_omni.training.task import Task

FIXED_ON_RESUME = ("task", "model", "optim", "freeze", "seed", "generative")
"""Groups of the recipe that a resumed run may not change: the optimizer's state belongs to them."""
FREE_ON_RESUME = (
    "model.moe.moe_token_dispatcher_type", "model.moe.kernels", "model.speech.text_table", "model.speech.codec",
    "model.speech.voices", "model.image.weights", "model.image.vae", "optim.grad_reduce_in_fp32",
    "optim.use_precision_aware_optimizer", "optim.optimizer_cpu_offload", "optim.optimizer_offload_fraction",
    "optim.overlap_cpu_optimizer_d2h_h2d",
)  # fmt: skip
"""Except what belongs to the layout and to the machine, which may change, places of files, and what data says."""


@dataclass
class Run:
    """A run that is ready for its next step."""

    recipe: Recipe
    task: Task
    pg: ProcessGroupCollection
    place: Place
    device: torch.device
    model: DistributedDataParallel
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    loader: Loader[Any] | None
    """On data-reader ranks: of what the task trains on."""
    origin: str = "random"
    """Where its weights come from, for the log."""
    initial_weights: str | None = None
    """Digest of the checkpoint of ``init_from``; None where they were drawn, and in a run that goes on."""
    eval_loaders: dict[str, StepLoader | None] = field(default_factory=dict)
    score: "Callable[[Run, Callable[[], None]], dict[str, float]] | None" = None
    """Scores of the held-out sets, beside their losses (evaluation/held_out.py); all ranks together. It calls what it is
    given again and again."""
    state: TrainState = field(default_factory=TrainState)

    @property
    def step_loader(self) -> StepLoader | None:
        """The loader of a task that trains on samples as they are."""
        assert self.loader is None or isinstance(self.loader, StepLoader)
        return self.loader

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this replica in a step."""
        data = self.recipe.data
        return data.global_batch_size // (data.micro_batch_size * self.place.dp_size)

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints."""
        return Path(self.recipe.run_dir) / CHECKPOINTS


def setup(recipe: Recipe, task: Task, *, pg: ProcessGroupCollection | None = None) -> Run:
    """Build the run of ``recipe`` on this rank, resumed when ``load`` says so; ``pg`` when the groups exist already.

    What would end the run at its first save or evaluation is looked for here, so that it ends it before the first step.
    """
    if recipe.deterministic_mode:
        make_deterministic()
    check_snapshot(recipe.log)
    check_offload(recipe)
    pg = pg if pg is not None else initialize(recipe.parallel)
    _know_data(recipe)
    check_memory(recipe, world_size=dist.get_world_size())
    place = place_in(pg)
    seed_everything(recipe.seed, tp_rank=place.tp_rank, ep_rank=place.ep_rank, expert_tp_rank=place.expert_tp_rank)
    directory, origin = _resume_from(recipe), "random"
    model = build_trained_model(recipe, pg, drawn=directory is None and recipe.init_from is None)
    freeze(model, recipe)
    _check_parameters(model, recipe)
    compares = recipe.reinforce.kl_coeff > 0  # with its start, also when it goes on
    initial = initial_checkpoint(recipe) if directory is None or compares else None
    if initial is not None:
        assert not isinstance(model, TrunklessModel), "refused by config/objective_checks.py"
        origin = load_initial_weights(model, recipe, initial, pg=pg)
    elif directory is None and has_image_weights(recipe):
        origin = f"random, {fill_image_weights(model, recipe)[0]}"
    elif directory is None and has_text_table(model, recipe):
        origin = f"random, {fill_text_table(model, recipe)}"
    wrapped = wrap_model(model, recipe, pg)
    optimizer, scheduler = build_optimizer(wrapped, recipe, pg)
    run = Run(
        recipe=recipe,
        task=task,
        pg=pg,
        place=place,
        device=device(),
        model=wrapped,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=_loader(recipe, place, pg, kind=loader_kind(recipe)),
        origin=origin,
        initial_weights=weights_digest(initial) if initial is not None else None,
        eval_loaders={
            s.name: _loader(recipe, place, pg, [s], kind=step_loader_kind(recipe)) for s in recipe.data.eval_sources
        },
    )
    task.begin(run)
    if directory is not None:
        resume(run, directory)  # which asks for the same tensors as a save
    else:
        plan_save(unwrap_model(wrapped), optimizer, pg)
    for loader in run.eval_loaders.values():
        if loader is not None and recipe.log.eval_interval > 0:
            loader.plan(Cursor(0))  # ValueError for a set of which no record can be used
    return run


def _know_data(recipe: Recipe) -> None:
    """Fill in what a speech generator is to know of its data, and what draws of its codec of pictures and of the hidden states
    it learns from; ValueError for codes of another codec than the recipe says."""
    image, speech = recipe.model.image, recipe.model.speech
    if image is not None and image.vae is not None and image.vae_fingerprint is None and recipe.task == "generative":
        folder = image.vae
        image.vae_fingerprint = from_rank_0(lambda: vae_fingerprint(image) or load_picture_codec(folder).fingerprint)
    if image is not None and recipe.task == "generative" and None in (image.vae_fingerprint, image.hidden_fingerprint):
        image.vae_fingerprint, image.hidden_fingerprint = from_rank_0(lambda: known_of_pictures(recipe))
    if speech is None:
        return
    voices, fingerprint = from_rank_0(lambda: known_from_data(recipe))
    if None not in (speech.codec_fingerprint, fingerprint) and speech.codec_fingerprint != fingerprint:
        raise ValueError(
            f"model.speech.codec_fingerprint={speech.codec_fingerprint}: the codec of the data has {fingerprint}; set it to "
            "that or to null"
        )
    speech.voices, speech.codec_fingerprint = speech.voices or voices, fingerprint or speech.codec_fingerprint


def initial_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that ``init_from`` names, whole, found by all ranks together; ValueError where there is none."""
    return None if recipe.init_from is None else _checkpoint(recipe.init_from, field="init_from")


def weights_digest(directory: Path) -> str:
    """What names a checkpoint's contents: its manifest holds the hash of every file."""
    return sha256(directory / MANIFEST)


def _check_parameters(model: torch.nn.Module, recipe: Recipe) -> None:
    """ValueError for a part of no size, and where nothing is trained on any rank."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ValueError(
                f"{name} has the shape {list(parameter.shape)}: a width of the model is 0; to leave a part out set "
                "model.moe.num_shared_experts=0, or model.moe, model.vision or model.audio to null"
            )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not sum_over_ranks([trained], device=device())[0]:
        raise ValueError(f"freeze={recipe.freeze}: every part of this model is frozen; leave out what is to be trained")


def freeze(model: OmniModel | TrunklessModel | GeneratorModel, recipe: Recipe) -> None:
    """Mark what is not trained; rows of new tokens that are trained in a frozen matrix become parameters."""
    if isinstance(model, TrunklessModel | GeneratorModel):
        return apply_freeze(model, recipe.freeze)
    if recipe.model.lora is not None:
        return train_adapters_only(model)
    apply_freeze(model, {*recipe.freeze, *frozen_matrices(recipe), *never_trained(recipe)})
    if trains_new_rows_alone(recipe) and (ids := new_token_ids(recipe)):
        model.language.train_new_token_rows(ids)


def new_token_ids(recipe: Recipe) -> list[int]:
    """Ids of the special tokens that Uni-MoE-2.0 adds to Qwen2.5's, as far as the tokenizer has them."""
    specials = load_tokenizer(recipe.data.tokenizer).specials
    return sorted(specials[name] for name in NEW_SPECIALS if name in specials)


def save(run: Run, evaluated: Mapping[str, float] | None = None) -> Path:
    """Write a checkpoint of the run as it stands after its last step, whose held-out evaluation is ``evaluated``."""
    return begin_save(run, evaluated).finish()


def begin_save(
    run: Run,
    evaluated: Mapping[str, float] | None = None,
    *,
    background: bool = False,
    memory: SaveMemory | None = None,
) -> PendingSave:
    """The same up to the point where training may go on; see checkpoint/saving.py."""
    gather_weights(run.model)
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, run.loader.state_dict() if run.loader is not None else None)
    data = joined_state([state for state in states if state is not None])
    common = {"train_state": run.state.state_dict(), "data": data, "task": run.task.state_dict(run)}
    value = (evaluated or {}).get(metric) if (metric := run.recipe.checkpoint.keep_best) is not None else None
    if value is not None and not math.isfinite(value):
        value = None  # no comparison would ever call another checkpoint better
    return start_save(
        run.checkpoints,
        run.state.step,
        model=unwrap_model(run.model),
        optimizer=run.optimizer,
        common=common,
        own=run.task.own_tensors(run),
        recipe=run.recipe,
        pg=run.pg,
        score=None if metric is None or value is None else (metric, value),
        background=background,
        memory=memory,
    )


def resume(run: Run, directory: Path) -> None:
    """Continue from a checkpoint: weights, optimizer, schedule, counters, data cursor, random state."""
    _check_same_run(run.recipe, load_recipe(directory / RUN_CONFIG), directory)
    own = run.task.own_tensors(run)
    common = load_checkpoint(directory, model=unwrap_model(run.model), optimizer=run.optimizer, own=own, pg=run.pg)
    run.state.load_state_dict(common["train_state"])
    run.scheduler.num_steps = 0
    run.scheduler.step(run.state.updates)
    run.task.load_state_dict(run, common.get("task", {}))
    if run.loader is not None:
        run.loader.load_state_dict(common["data"])
    run.origin = f"{directory}, continued after step {run.state.step}"


def _resume_from(recipe: Recipe) -> Path | None:
    if recipe.load is None:
        return None
    if recipe.load == "auto":
        return find_checkpoint(Path(recipe.run_dir))
    return _checkpoint(recipe.load, field="load")


def _checkpoint(path: str, *, field: str) -> Path:
    """The newest whole checkpoint at ``path``; ValueError when there is none."""
    directory = find_checkpoint(Path(path))
    if directory is None:
        raise ValueError(f"{field}={nothing_at(Path(path))}")
    return directory


def _check_same_run(now: Recipe, then: Recipe, directory: Path) -> None:
    for group in FIXED_ON_RESUME:
        for name, new, old in differences(getattr(now, group), getattr(then, group), name=group):
            if name not in FREE_ON_RESUME:
                raise ValueError(
                    f"{name}={new!r}: the checkpoint {directory} was made with {old!r}, to which its optimizer state "
                    "belongs; set it back, or start a new run with init_from"
                )
    check_tokenizers(Path(now.data.tokenizer), find_tokenizer(directory), way_out="start a new run with init_from")


def _loader[L: Loader[Any]](
    recipe: Recipe,
    place: Place,
    pg: ProcessGroupCollection,
    sources: list[SourceConfig] | None = None,
    *,
    kind: type[L],
) -> L | None:
    if not place.is_data_reader:
        return None
    agree = partial(gathered, group=pg.dp, device=device())
    return kind(recipe, data_rank=place.dp_rank, data_size=place.dp_size, sources=sources, agree=agree)
