"""Named parts of the model: what ``freeze`` and ``optim.lr_scale`` speak of.

Every parameter belongs to exactly one part, decided by its name alone, so that all ranks agree without talking to
each other.
"""

import re
from difflib import get_close_matches

from torch import nn

# First match wins. Names as in OmniModel.named_parameters().
_RULES: tuple[tuple[str, str], ...] = (
    ("adapters", r"\.lora_\w+\."),
    ("projectors", r"^(vision|audio)\.(projector|qformer)\."),
    ("vision", r"^vision\."),
    ("audio", r"^audio\."),
    ("embeddings", r"(^|\.)embedding\."),
    ("output", r"(^|\.)output_layer\."),
    ("norms", r"(layernorm|final_norm)\."),
    ("attention", r"\.self_attention\."),
    ("gate", r"\.mlp\.router\."),
    ("shared_experts", r"\.mlp\.shared_experts\."),
    ("experts", r"\.mlp\.experts\."),
    ("ffn", r"\.mlp\.linear_fc[12]\."),
)

PART_NAMES: tuple[str, ...] = tuple(part for part, _ in _RULES)


def part_of(parameter_name: str) -> str:
    """The part that the parameter called ``parameter_name`` belongs to."""
    name = parameter_name.removeprefix("module.").removeprefix("module.")
    for part, pattern in _RULES:
        if re.search(pattern, name):
            return part
    raise AssertionError(f"parameter {parameter_name} belongs to no named part; add a rule to models/parts.py")


def parameter_parts(model: nn.Module) -> dict[str, str]:
    """Parameter name -> part, for the parameters of this rank."""
    return {name: part_of(name) for name, _ in model.named_parameters()}


def check_part_names(names: list[str], *, field: str) -> None:
    """Raise ValueError for a name that is no part; ``field`` is where the user wrote it."""
    for name in names:
        if name == "new_token_rows":
            raise ValueError(f"{field} names new_token_rows, which is not supported yet; freeze embeddings as a whole")
        if name not in PART_NAMES:
            near = get_close_matches(name, PART_NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{field} names the part {name!r}, which does not exist{hint} Parts: {', '.join(PART_NAMES)}"
            )


def apply_freeze(model: nn.Module, names: list[str]) -> None:
    """Stop training the named parts. Call it before the model is wrapped."""
    check_part_names(names, field="freeze")
    for name, parameter in model.named_parameters():
        if part_of(name) in names:
            parameter.requires_grad_(False)


def train_adapters_only(model: nn.Module) -> None:
    """Stop training everything but low-rank adapters (models/lora.py). Call it before the model is wrapped."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == "adapters")


def parameter_table(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, of which trained), counted on this rank; parts that this rank does not hold are absent."""
    table: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        total, trained = table.get(part_of(name), (0, 0))
        size = parameter.numel()
        table[part_of(name)] = (total + size, trained + (size if parameter.requires_grad else 0))
    return table
