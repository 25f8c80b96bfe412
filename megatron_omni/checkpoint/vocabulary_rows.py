"""Rows of new tokens that a run trains alone (models/token_rows.py), as checkpoints have them.

Weights are in the vocabulary matrices of a checkpoint, where every reader expects them, and nowhere else. Their optimizer
state is tensors [R, H] of their own, ``optimizer.state.*.language.{embedding,output_layer}.new_token_rows.weight``.
"""

from typing import Any

from torch import nn

from megatron_omni.config.parts import NEW_TOKEN_ROWS
from megatron_omni.models.language import LanguageModel


def stored_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """What of a model's sharded state dict is stored as weights: all but the rows, which are in their matrices."""
    return {name: value for name, value in weights.items() if f".{NEW_TOKEN_ROWS}." not in name}


def take_rows(model: nn.Module) -> None:
    """Give the trained rows of ``model`` the values of its matrices, which were just read; all ranks call this together."""
    for module in model.modules():
        if isinstance(module, LanguageModel):
            module.take_new_token_rows()
