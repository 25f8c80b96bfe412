"""The text table of a new speech generator, from another model: ``model.speech.text_table``.

It is the word embeddings of a language model (a run directory, one of its checkpoints, or a Hugging Face directory), or
the table of another speech generator. Row t stands for token t, so the tokenizers must give the same ids; rows that the
table has no place for (padding of the vocabulary, tokens behind it) are left out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from megatron_omni.checkpoint.commit import nothing_at
from megatron_omni.checkpoint.distributed import RUN_CONFIG, find_checkpoint
from megatron_omni.checkpoint.meaning import check_tokenizers
from megatron_omni.checkpoint.reading import together
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.checkpoint.tokenizer_files import find_tokenizer
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.uni_moe_speech import open_table
from megatron_omni.config.generators import SpeechConfig
from megatron_omni.config.load import load_recipe
from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.speech import SpeechModel
from megatron_omni.models.omni import OmniModel

TABLE = "text_table.weight"
FIELD = "model.speech.text_table"


class _Found(NamedTuple):
    """Word embeddings that lie somewhere."""

    place: Path
    num_rows: int
    """That stand for a token."""
    width: int
    read: Callable[[], Tensor]
    """[at least ``num_rows``, ``width``]."""


def has_text_table(model: OmniModel, recipe: Recipe) -> TypeGuard[SpeechModel]:
    """Whether ``recipe`` says where the table of ``model`` is."""
    return (
        isinstance(model, SpeechModel)
        and recipe.model.speech is not None
        and recipe.model.speech.text_table is not None
    )


def fill_text_table(model: SpeechModel, recipe: Recipe) -> str:
    """Fill the table of this rank, where its stage has one; all ranks call this together. Where from, for the log.

    ValueError on every rank for a place without such a table, one of another width, with too few rows or with values that
    are not finite, and for another tokenizer.
    """
    speech = recipe.model.speech
    assert speech is not None and speech.text_table is not None
    path = Path(speech.text_table)
    directory = find_checkpoint(path)
    if directory is None and not (path / "config.json").is_file():
        raise ValueError(f"{FIELD}={nothing_at(path)}, or a Hugging Face directory")
    place = directory or path

    def fill() -> None:
        found = _of_checkpoint(directory) if directory is not None else _of_hugging_face(path)
        _check_shape(found, speech)
        if model.pre_process:
            rows = found.read()[: speech.text_vocab_size]
            if not rows.isfinite().all():
                raise ConversionError(f"{FIELD}={str(place)!r}: holds NaN or infinite values; take another checkpoint")
            with torch.no_grad():
                model.text_table.weight.copy_(rows)

    together(place, lambda _: fill())
    check_tokenizers(
        Path(recipe.data.tokenizer), find_tokenizer(place), way_out=f"take a table of these tokens ({FIELD})"
    )
    return f"text table of {place}"


def _of_checkpoint(directory: Path) -> _Found:
    theirs = load_recipe(directory / RUN_CONFIG).model
    key, width, num_rows = "language.embedding.word_embeddings.weight", theirs.hidden_size, theirs.vocab_size
    if theirs.speech is not None:
        key, width, num_rows = TABLE, theirs.speech.text_hidden_size, theirs.speech.text_vocab_size
    reader = TorchDistReader(directory)
    if key not in reader.tensors:
        raise ConversionError(
            f"{FIELD}={str(directory)!r}: has no tensor {key!r}; give the checkpoint of a language model"
        )
    return _Found(directory, num_rows, width, lambda: reader.read(key))


def _of_hugging_face(path: Path) -> _Found:
    source, key = open_table(path)
    num_rows, width = source.infos()[key].shape
    return _Found(path, num_rows, width, lambda: source.read(key))


def _check_shape(found: _Found, speech: SpeechConfig) -> None:
    if found.width != speech.text_hidden_size:
        raise ConversionError(
            f"model.speech.text_hidden_size={speech.text_hidden_size}: the word embeddings of {found.place} are {found.width} "
            "wide; set it to that, or take another table"
        )
    if found.num_rows < speech.text_vocab_size:
        raise ConversionError(
            f"model.speech.text_vocab_size={speech.text_vocab_size}: {found.place} has {found.num_rows} word embeddings; "
            "set it to at most that (and at least the tokenizer's ids), or take another table"
        )
