"""Named parts of the model: what ``freeze`` and ``optim.lr_scale`` speak of.

models/parts.py says which parameters each part holds; docs/config.md describes them. Needs neither torch nor megatron.
"""

from megatron_omni.config.model import ModelConfig
from megatron_omni.config.pictures import IMAGE_PARTS
from megatron_omni.config.run import Recipe

NEW_TOKEN_ROWS = "new_token_rows"
"""Rows of the vocabulary matrices that belong to the special tokens which Uni-MoE-2.0 adds to Qwen2.5's."""
NUM_NEW_TOKENS = 42
"""Of a tokenizer that has all of them (``NEW_SPECIALS`` of data/tokenizer.py)."""
VOCABULARY = frozenset({"embeddings", "output"})
"""Parts that are a vocabulary matrix."""
TEXT_TABLE = "text_table"
"""Another model's word embeddings, by which a speech generator reads text: never trained, whatever ``freeze`` says."""
SPEECH = frozenset({TEXT_TABLE, "text_projection"})
"""Parts of a speech generator alone (``model.speech``)."""
PARTS = (
    "vision", "audio", "projectors", TEXT_TABLE, "text_projection", "attention", "norms", "experts", "shared_experts",
    "gate", "ffn", "embeddings", "output", NEW_TOKEN_ROWS, "codec_encoder",
    "codec_decoder", "discriminators", "image_projectors", "image_generator",
)  # fmt: skip
CODEC_PARTS = frozenset({"codec_encoder", "codec_decoder", "discriminators"})
"""Of a model that is a codec, of sound or of pictures, which has no others."""
ADAPTERS = "adapters"
"""Low-rank adapters (``model.lora``), which are trained alone: no name for ``freeze``."""


def draws_alone(recipe: Recipe) -> bool:
    """Whether what is trained is a picture generator (``model.image``) without the language model before it."""
    return recipe.task == "generative" and recipe.generative.conditions != "model"


def never_trained(recipe: Recipe) -> frozenset[str]:
    """Parts that the task of ``recipe`` does not train, whatever ``freeze`` says."""
    return frozenset({TEXT_TABLE}) if recipe.task == "generative" else frozenset({TEXT_TABLE}) | IMAGE_PARTS


def parts_of_run(recipe: Recipe) -> frozenset[str]:
    """Parts of what a run builds."""
    return IMAGE_PARTS if draws_alone(recipe) else parts_of(recipe.model)


def parts_of(model: ModelConfig) -> frozenset[str]:
    """Parts that ``model`` has."""
    if model.is_codec:
        return CODEC_PARTS
    absent = {"vision"} if model.vision is None else set()
    absent |= {"audio"} if model.audio is None else set()
    absent |= {"projectors"} if len(absent) == 2 else set()
    absent |= {"experts", "shared_experts", "gate"} if model.moe is None else {"ffn"}
    absent |= {"shared_experts"} if model.moe is not None and model.moe.num_shared_experts == 0 else set()
    absent |= set() if model.untie_embeddings_and_output_weights else {"output"}
    absent |= IMAGE_PARTS if model.image is None else set()
    absent |= SPEECH if model.speech is None else {NEW_TOKEN_ROWS}  # its vocabulary is codes
    return frozenset(PARTS) - CODEC_PARTS - absent


def frozen_matrices(recipe: Recipe) -> frozenset[str]:
    """Vocabulary matrices that are frozen. A tied one is both parts, since pipeline parallelism holds it twice."""
    if recipe.model.lora is not None:
        return VOCABULARY
    frozen = VOCABULARY & set(recipe.freeze)
    return VOCABULARY if frozen and not recipe.model.untie_embeddings_and_output_weights else frozen


def trains_new_rows_alone(recipe: Recipe) -> bool:
    """Whether rows of new tokens are trained in a matrix that is frozen (models/token_rows.py)."""
    if recipe.model.lora is not None or recipe.model.speech is not None or draws_alone(recipe):
        return False
    return NEW_TOKEN_ROWS not in recipe.freeze and bool(frozen_matrices(recipe))


def trained_parts(recipe: Recipe) -> frozenset[str]:
    """Parts that have gradients and optimizer state; new token rows count where they are a parameter of their own."""
    if recipe.model.lora is not None:
        return frozenset({ADAPTERS})
    rows = {NEW_TOKEN_ROWS} if trains_new_rows_alone(recipe) else frozenset()
    if draws_alone(recipe):
        return IMAGE_PARTS - set(recipe.freeze)
    return (
        frozenset(PARTS) - set(recipe.freeze) - frozen_matrices(recipe) - never_trained(recipe) - {NEW_TOKEN_ROWS}
    ) | rows
