"""The task of a recipe."""

from megatron_omni.config.run import Recipe
from megatron_omni.tasks.codec import CodecTask
from megatron_omni.tasks.generative import GenerativeTask
from megatron_omni.tasks.picture_codec import PictureCodecTask
from megatron_omni.tasks.preference import PreferenceTask
from megatron_omni.tasks.reinforce import ReinforceTask
from megatron_omni.tasks.speech import SpeechTask
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.training.task import Task


def task_of(recipe: Recipe) -> Task:
    """What ``recipe.task`` names."""
    if recipe.task == "reinforce":
        return ReinforceTask(recipe)
    if recipe.task == "preference":
        return PreferenceTask(recipe)
    if recipe.task == "codec":
        return CodecTask(recipe)
    if recipe.task == "generative":
        return GenerativeTask(recipe)
    if recipe.task == "picture_codec":
        return PictureCodecTask(recipe)
    if recipe.model.speech is not None:
        return SpeechTask(recipe.data.sources, recipe.model.speech.ids)
    return SupervisedTask(recipe.data.sources)
