"""Which parameters the named parts of the model hold (config/parts.py), and how they are frozen.

Every parameter belongs to exactly one part, decided by its name alone, so that all ranks agree without talking to
each other.
"""

import re
from collections.abc import Iterable

from torch import nn

from megatron_omni.config.parts import ADAPTERS, NEW_TOKEN_ROWS, TEXT_TABLE

# First match wins. Names as in named_parameters() of OmniModel and SpeechModel.
_RULES: tuple[tuple[str, str], ...] = (
    (ADAPTERS, r"\.lora_\w+\."),
    (NEW_TOKEN_ROWS, rf"\.{NEW_TOKEN_ROWS}\."),
    ("codec_encoder", r"^(picture_)?codec\.encoder\."),
    ("codec_decoder", r"^(picture_)?codec\.decoder\."),
    ("discriminators", r"^discriminators\."),
    ("image_projectors", r"^image\.(caption|task|visual|null)"),
    ("image_generator", r"^image\.dit\."),
    ("projectors", r"^(vision|audio)\.(projector|qformer)\."),
    ("vision", r"^vision\."),
    ("audio", r"^audio\."),
    (TEXT_TABLE, r"^text_table\."),
    ("text_projection", r"^text_projection\."),
    ("embeddings", r"(^|\.)embedding\."),
    ("output", r"(^|\.)output_layer\."),
    ("norms", r"(layernorm|final_norm)\."),
    ("attention", r"\.self_attention\."),
    ("gate", r"\.mlp\.router\."),
    ("shared_experts", r"\.mlp\.shared_experts\."),
    ("experts", r"\.mlp\.experts\."),
    ("ffn", r"\.mlp\.linear_fc[12]\."),
)


def part_of(parameter_name: str) -> str:
    """The part that the parameter called ``parameter_name`` belongs to."""
    name = parameter_name.removeprefix("module.").removeprefix("module.")
    for part, pattern in _RULES:
        if re.search(pattern, name):
            return part
    raise AssertionError(f"parameter {parameter_name} belongs to no named part; add a rule to models/parts.py")


def scaled_with(parameter_name: str) -> str:
    """The part whose ``optim.lr_scale`` the parameter follows: rows of new tokens belong to their matrix."""
    return part_of(parameter_name.replace(f".{NEW_TOKEN_ROWS}.", "."))


def apply_freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Stop training the named parts. Call it before the model is wrapped."""
    for name, parameter in model.named_parameters():
        if part_of(name) in parts:
            parameter.requires_grad_(False)


def train_adapters_only(model: nn.Module) -> None:
    """Stop training everything but low-rank adapters (models/lora.py). Call it before the model is wrapped."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == ADAPTERS)


def parameter_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, of which trained), counted on this rank; parts that this rank does not hold are absent."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        total, trained = table.get(part_of(name), (0, 0))
        size = parameter.numel()
        table[part_of(name)] = (total + size, trained + (size if parameter.requires_grad else 0))
    return table
