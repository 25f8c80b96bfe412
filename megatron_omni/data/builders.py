"""Which builder makes the samples of a recipe: of conversations, of preference pairs, of speech, or of pictures alone."""

from megatron_omni.config.run import Recipe
from megatron_omni.data.block_sample import BlockBuilder, BlockSizeRule
from megatron_omni.data.pairs import PairBuilder
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sizes import SizeRule
from megatron_omni.data.speech_sample import SpeechSampleBuilder, SpeechSizeRule
from megatron_omni.data.tokenizer import Tokenizer


def sample_builder(recipe: Recipe, tokenizer: Tokenizer | None = None) -> SampleBuilder:
    """What turns records into the samples of a recipe's model and task."""
    if recipe.task == "preference":
        return PairBuilder(recipe, tokenizer)
    return BlockBuilder(recipe, tokenizer) if _learns_blocks(recipe) else prompt_builder(recipe, tokenizer)


def prompt_builder(recipe: Recipe, tokenizer: Tokenizer | None = None) -> SampleBuilder:
    """What turns records into prompts and samples of a recipe's model, whatever its task."""
    return (SampleBuilder if recipe.model.speech is None else SpeechSampleBuilder)(recipe, tokenizer)


def size_rule(recipe: Recipe, tokenizer: Tokenizer) -> SizeRule:
    """Sizes of the samples of a recipe's model."""
    if _learns_blocks(recipe):
        return BlockSizeRule(recipe, tokenizer)
    return (SizeRule if recipe.model.speech is None else SpeechSizeRule)(recipe, tokenizer)


def _learns_blocks(recipe: Recipe) -> bool:
    return recipe.task == "generative" and recipe.generative.conditions != "model"
