"""Whose files a run directory holds, and who may write there.

A run directory belongs to one run: its checkpoints, metrics and records tell of the same weights. A start either goes on
(``load``), or takes a directory without checkpoints, or says ``overwrite``; then what the earlier run left is deleted, and
not before the new one is ready for its first step. Files that no run writes (a corpus, notes) are never touched.

Needs neither torch nor megatron.
"""

import shutil
from pathlib import Path

from megatron_omni.checkpoint import commit
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.outcome import ENDED_MARKER, STOP_MARKER
from megatron_omni.config.run import Recipe
from megatron_omni.rewards.judge_cache import CACHES
from megatron_omni.rewards.rollouts import FOLDER as ROLLOUTS

METRICS, TENSORBOARD, INCIDENTS, GOODPUT, PROFILE, WANDB, WANDB_ID = (
    "metrics.jsonl", "tensorboard", "incidents.jsonl", "goodput.jsonl", "profile", "wandb", "wandb_id",
)  # fmt: skip
RESOLVED = "resolved.yaml"
REFERENCE = "reference.npz"
"""What preferences are learned against (tasks/reference.py)."""
NCCL_TRACES = "nccl_trace_rank_*"
"""What a rank exchanged before a collective timed out (examples/slurm/launch.sh)."""
UPCYCLED = "upcycled"
"""A mixture made of dense weights, there while they are loaded."""
UNANSWERED = "unanswered"
"""How many starts ended because a reward's service did not answer (tasks/unanswered.py)."""
WRITTEN = (
    commit.CHECKPOINTS, METRICS, TENSORBOARD, INCIDENTS, GOODPUT, PROFILE, WANDB, WANDB_ID, RESOLVED, STOP_MARKER,
    ENDED_MARKER, NCCL_TRACES, UPCYCLED, ROLLOUTS, CACHES, REFERENCE, UNANSWERED,
)  # fmt: skip
"""Everything that a run writes into its directory, as patterns of names."""


def check_start(recipe: Recipe) -> None:
    """Make the directory where there is none; ValueError for a start that would write over another run, or train beside
    weights that nobody has trained.
    """
    run_dir = Path(recipe.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir={recipe.run_dir!r}: cannot be made ({error.strerror}); give another") from error
    used = _holds_checkpoints(run_dir / commit.CHECKPOINTS)
    goes_on = recipe.load is not None and (recipe.load == "auto" or _lies_in(Path(recipe.load), run_dir))
    if used and goes_on and recipe.overwrite:
        raise ValueError(f"load={recipe.load!r}: overwrite=true would delete it; keep one of them")
    if used and not goes_on and not recipe.overwrite:
        raise ValueError(
            f"run_dir={recipe.run_dir!r}: holds the checkpoints of a run; load=auto goes on with it, overwrite=true deletes "
            "it and starts anew, or give another run_dir"
        )
    if recipe.init_from is None and (recipe.load is None or (recipe.load == "auto" and not used)):
        _check_random(recipe)


def _check_random(recipe: Recipe) -> None:
    for what, is_set in (("model.lora", recipe.model.lora is not None), (f"freeze={recipe.freeze}", recipe.freeze)):
        if is_set:
            raise ValueError(
                f"{what}: the weights that are not trained would stay random; name the checkpoint that they come from in "
                "init_from (load for a run that goes on), or train the whole model"
            )


def _holds_checkpoints(root: Path) -> bool:
    return bool(commit.steps(root)) or commit.tracked_step(root) is not None


def _lies_in(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def take(recipe: Recipe) -> None:
    """Make the directory this run's, once it is ready to begin: delete what it overwrites, write the resolved recipe."""
    run_dir = Path(recipe.run_dir)
    if recipe.overwrite:
        for path in [path for name in WRITTEN for path in run_dir.glob(name)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    commit.write_text(run_dir / RESOLVED, recipe_to_yaml(recipe))
