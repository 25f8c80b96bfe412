"""What ``--dry-run`` says of a run without starting it: its parameters and memory, and whether its files would do.

``describe`` needs the recipe alone. ``missing`` opens what the run would open at its start, as the run would: tokenizer, every
source with its index, the first step of the mixture and of each held-out set (planned, nothing decoded), the checkpoint
that the weights come from, and reward functions. One process stands for all ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.meaning import check_handover
from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
from megatron_omni.config.data import SourceConfig
from megatron_omni.config.load import load_recipe, recipe_to_yaml
from megatron_omni.config.parts import NEW_TOKEN_ROWS, NUM_NEW_TOKENS, frozen_matrices, trained_parts
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import data_parallel_size
from megatron_omni.estimate import count_parameters, weight_bytes_per_rank
from megatron_omni.estimate.hardware import GPUS
from megatron_omni.estimate.memory import offloaded_bytes
from megatron_omni.estimate.plan import make_plan
from megatron_omni.platform.environment import main_memory_bytes
from megatron_omni.rewards import Rewards

GIB = 2**30
RUN_CONFIG = "run_config.yaml"


def describe(recipe: Recipe, *, world_size: int) -> str:
    """The resolved recipe, its parameters by part and the memory of a rank, without building a model."""
    return "\n".join([recipe_to_yaml(recipe).rstrip(), "", *_parameters(recipe), "", *_memory(recipe, world_size)])


def _parameters(recipe: Recipe) -> Iterator[str]:
    counts, trained = count_parameters(recipe.model), trained_parts(recipe)
    rows = frozen_matrices(recipe) if NEW_TOKEN_ROWS in trained else frozenset()
    yield f"{'part':<16}{'parameters':>18}  trained"
    total = 0
    for part, number in vars(counts).items():
        share = (
            number if part in trained else NUM_NEW_TOKENS * recipe.model.hidden_size if part in rows and number else 0
        )
        total += share
        says = "yes" if part in trained else f"rows of {NUM_NEW_TOKENS} new tokens" if share else "no"
        yield f"{part:<16}{number:>18,}  {says}"
    yield f"{'total':<16}{counts.total:>18,}  {total:,} trained"


def _memory(recipe: Recipe, world_size: int) -> Iterator[str]:
    sizes = weight_bytes_per_rank(recipe, world_size)
    peak = make_plan(recipe, world_size=world_size, gpu=next(iter(GPUS.values()))).peak_bytes
    held = sum(sizes.values())
    yield f"fullest of {world_size} rank(s):"
    for name, size in {**sizes, "held": held, "activations": peak - held, "peak": peak}.items():
        yield f"{name:<16}{size / GIB:>15.2f} GiB"
    if offloaded := offloaded_bytes(recipe, world_size):
        yield f"{'offloaded':<16}{offloaded / GIB:>15.2f} GiB of main memory"
    here = main_memory_bytes() / GIB
    yield f"(activations of the heaviest micro-batch, estimated; this machine has {here:.1f} GiB of main memory)"


def missing(recipe: Recipe, *, world_size: int) -> list[str]:
    """Why the run would end at its start, one sentence a fault; nothing when its files are as it needs them."""
    found: list[str] = []

    def attempt(look: Callable[[], object]) -> None:
        try:
            look()
        except (ValueError, OSError) as error:
            if str(error) not in found:
                found.append(str(error))

    attempt(lambda: _first_step(recipe, world_size, None))
    if recipe.log.eval_interval > 0:
        for source in recipe.data.eval_sources:
            attempt(lambda source=source: _first_step(recipe, world_size, [source]))  # type: ignore[misc]
    if recipe.task == "reinforce":
        attempt(lambda: Rewards.of(recipe.reinforce, run_dir=recipe.run_dir).close())
    if recipe.init_from is not None:
        attempt(lambda: _check_weights(recipe, _checkpoint(str(recipe.init_from), field="init_from")))
    if recipe.load not in (None, "auto"):
        attempt(lambda: _checkpoint(str(recipe.load), field="load"))
    return found


def _first_step(recipe: Recipe, world_size: int, sources: list[SourceConfig] | None) -> None:
    """Open the mixture, or held-out ``sources``, and plan one step of it."""
    from megatron_omni.data.mixture import DataEnded
    from megatron_omni.data.plan import Cursor
    from megatron_omni.data.prompts import loader_kind, step_loader_kind

    without_threads = replace(recipe, data=replace(recipe.data, num_workers=0))
    size = data_parallel_size(recipe.parallel, world_size)
    kind = loader_kind(recipe) if sources is None else step_loader_kind(recipe)
    loader = kind(without_threads, data_rank=0, data_size=size, sources=sources)
    try:
        loader.plan(Cursor(0))
    except DataEnded as ended:
        raise ValueError(f"{'data.sources' if sources is None else sources[0].name}: not one step: {ended}") from ended


def _check_weights(recipe: Recipe, directory: Path) -> None:
    """Refuse weights that would mean something else in this model."""
    check_handover(
        recipe.model,
        load_recipe(directory / RUN_CONFIG).model,
        tokenizers=(Path(recipe.data.tokenizer), find_tokenizer(directory)),
        origin=directory,
        allowed=recipe.init_allow_changed,
    )


def _checkpoint(path: str, *, field: str) -> Path:
    """Refuse what is no checkpoint; its files are checked against their sums when the run reads them."""
    place = Path(path)
    root = place / commit.CHECKPOINTS if (place / commit.CHECKPOINTS).is_dir() else place
    step = commit.tracked_step(root)
    steps = [number for number in commit.steps(root) if step is None or number <= step]
    directory = place if (place / commit.MANIFEST).is_file() else commit.iteration_dir(root, max(steps, default=0))
    if not (directory / commit.MANIFEST).is_file():
        raise ValueError(f"{field}={path!r}: no checkpoint there; give a run directory or an iter_* directory")
    load_recipe(directory / RUN_CONFIG)
    return directory
