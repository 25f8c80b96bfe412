"""The task of a recipe."""

from megatron_omni.config.run import Recipe
from megatron_omni.tasks.reinforce import ReinforceTask
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.training.task import Task


def task_of(recipe: Recipe) -> Task:
    """What ``recipe.task`` names."""
    if recipe.task == "reinforce":
        return ReinforceTask(recipe)
    assert recipe.task == "supervised", f"task {recipe.task} has no code yet"
    return SupervisedTask(recipe.data.sources)
