"""Weights of transformers' modules into ours, by the table that converts checkpoints (checkpoint/names.py)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron_omni.checkpoint.names import Row, expand


@torch.no_grad()
def load_rows(module: nn.Module, rows: Iterable[Row], state: Mapping[str, Tensor], *, prefix: str) -> list[str]:
    """Fill ``module``, which our model calls ``prefix``, from ``state``; the keys of ``state`` that were used."""
    targets, used = {f"{prefix}{name}": parameter for name, parameter in module.named_parameters()}, []
    for entry in expand(rows):
        targets[entry.ours].copy_(entry.transform.to_ours([state[key] for key in entry.theirs]))
        used += entry.theirs
    return used
