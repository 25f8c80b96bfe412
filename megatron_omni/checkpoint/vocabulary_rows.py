"""Rows of new tokens that a run trains alone (models/token_rows.py), as checkpoints have them.

Weights are in the vocabulary matrices of a checkpoint, where every reader expects them, and nowhere else. Their optimizer
state is tensors [R, H] of their own, ``optimizer.state.*.language.{embedding,output_layer}.new_token_rows.weight``.

Versions before these rows became a parameter trained the whole matrix with its gradient masked to them. Their checkpoints
have the optimizer's state of whole matrices [V, H], in which all other rows' moments are zero and master weights are the
frozen ones: what is read of it are these rows.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron_omni.checkpoint.torch_dist import StoredTensor, TorchDistReader
from megatron_omni.config.parts import NEW_TOKEN_ROWS
from megatron_omni.models.language import LanguageModel
from megatron_omni.models.token_rows import NewTokenRows

_MATRIX_OF = {"embedding": "embedding.word_embeddings.weight", "output_layer": "output_layer.weight"}
_ROWS = re.compile(rf"({'|'.join(_MATRIX_OF)})\.{NEW_TOKEN_ROWS}\.weight$")


def stored_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """What of a model's sharded state dict is stored as weights: all but the rows, which are in their matrices."""
    return {name: value for name, value in weights.items() if f".{NEW_TOKEN_ROWS}." not in name}


def take_rows(model: nn.Module) -> None:
    """Give the trained rows of ``model`` the values of its matrices, which were just read; all ranks call this together."""
    for module in model.modules():
        if isinstance(module, LanguageModel):
            module.take_new_token_rows()


def trained_alone(model: nn.Module) -> list[int]:
    """Ids of the tokens whose rows ``model`` trains alone; none where this rank holds no such matrix."""
    return next((module.ids.tolist() for module in model.modules() if isinstance(module, NewTokenRows)), [])


def in_whole_matrices(stored: Mapping[str, StoredTensor], wanted: str) -> str | None:
    """The state of a whole matrix in whose rows ``stored`` has the state ``wanted`` of new tokens' rows; None where it
    has ``wanted`` itself or neither.
    """
    matrix = _ROWS.sub(lambda rows: _MATRIX_OF[rows[1]], wanted)
    return matrix if wanted not in stored and matrix in stored else None


def with_rows_alone(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[Sequence[int], Any]]
) -> dict[str, StoredTensor]:
    """``stored`` as :class:`RowsReader` reads it: where ``wanted`` {name: (shape, ...)} asks for the state of rows that is
    part of a whole matrix's, the rows in its place.
    """
    result = dict(stored)
    for name, (shape, *_) in wanted.items():
        if (matrix := in_whole_matrices(stored, name)) is not None:
            whole = result.pop(matrix)
            result[name] = replace(whole, shape=(shape[0], *whole.shape[1:]), blocks=())
    return result


class RowsReader(TorchDistReader):
    """As :class:`TorchDistReader`, and the state of new tokens' rows is read from whole matrices where it is part of them."""

    def __init__(self, directory: Path, ids: Sequence[int]) -> None:
        """``ids`` of the new tokens, in the order of their rows."""
        super().__init__(directory)
        self._ids = ids

    def fill(self, key: str, start: Sequence[int], target: Tensor) -> None:
        """Fill ``target`` from the region of ``key`` at ``start``: bytes of these rows alone are read."""
        matrix = in_whole_matrices(self.tensors, key)
        if matrix is None:
            return super().fill(key, start, target)
        ids = self._ids[start[0] : start[0] + len(target)]
        for _, run in itertools.groupby(enumerate(ids), key=lambda row: row[1] - row[0]):  # ids that follow each other
            (first, token), *more = run
            super().fill(matrix, (token, *start[1:]), target[first : first + 1 + len(more)])
