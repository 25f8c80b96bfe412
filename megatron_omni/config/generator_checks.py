"""Checks of a speech generator (``model.speech``), for validate.py; one sentence a problem."""

from collections.abc import Iterator
from pathlib import Path

from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.parts import TEXT_TABLE
from megatron_omni.config.run import Recipe


def generator_problems(recipe: Recipe) -> Iterator[str]:
    """What does not go together with or in ``model.speech``, and with ``model.output_bias``."""
    model = recipe.model
    if model.output_bias and not model.untie_embeddings_and_output_weights:
        yield (
            "model.output_bias=True: an output layer that is the embedding has none; set "
            "model.untie_embeddings_and_output_weights=true, or output_bias=false"
        )
    if TEXT_TABLE in recipe.optim.lr_scale:
        yield f"optim.lr_scale.{TEXT_TABLE}: no effect, the table is never trained; take it out"
    if model.speech is None:
        return
    yield from _shape(model, model.speech)
    yield from _numbers(model.speech)
    if recipe.task != "supervised":
        yield f"task={recipe.task}: a speech generator (model.speech) learns codes by task=supervised; set that"
    for source in recipe.data.eval_sources:
        if source.metric is not None:
            yield (
                f"data.eval_sources.{source.name}.metric={source.metric}: a speech generator (model.speech) writes codes, "
                "not text to compare; take it out (its accuracy of codes is measured without, docs/speech.md)"
            )


def _shape(model: ModelConfig, speech: SpeechConfig) -> Iterator[str]:
    for name in ("vision", "audio", "codec"):
        if getattr(model, name) is not None:
            yield f"model.{name}: a speech generator (model.speech) reads text alone; set model.{name}=null"
    if model.vocab_size != speech.ids.num_outputs:
        yield (
            f"model.vocab_size={model.vocab_size}: a speech generator (model.speech) has {speech.num_codes} codes and 9 marks; "
            f"set it to {speech.ids.num_outputs}, or model.speech.num_codes to the codec's"
        )


def _numbers(speech: SpeechConfig) -> Iterator[str]:
    for low, high in (
        ("least_prefix_codes", "prefix_codes"),
        ("min_split_tokens", "max_split_tokens"),
        ("least_codes_per_token", "most_codes_per_token"),
    ):
        least, most = getattr(speech, low), getattr(speech, high)
        if least > most and most > 0:  # no prefix at all is a choice
            yield f"model.speech.{low}={least}: above model.speech.{high}={most}; lower the one or raise the other"


def generator_files(speech: SpeechConfig) -> Iterator[str]:
    """What the files that ``model.speech`` names lack."""
    for name in ("text_table", "codec"):
        path = getattr(speech, name)
        if path is not None and not Path(path).exists():
            yield f"model.speech.{name}={path!r}: no such file or directory; fix the path, or set it to null"
