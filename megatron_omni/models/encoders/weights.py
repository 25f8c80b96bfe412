"""How the weights of an encoder begin, where no checkpoint has them.

One generator per parameter, so that a weight depends on the seed and its name alone. Matrices are Xavier uniform,
convolutions normal with variance 1 / fan-in, biases 0, norms 1; the rest is in an encoder's ``draw_weights``.
"""

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

GeneratorFor = Callable[[str], torch.Generator]
"""From a parameter's name to the CPU generator of its first value."""
INPUTS_AT_ONCE = 32
"""Tiles or chunks of sound that an encoder computes together, where a sample has many."""


def draw_weights(module: nn.Module, generator_for: GeneratorFor, *, prefix: str = "") -> None:
    """Overwrite every parameter of ``module`` by its rule: norms, biases, convolutions, matrices, in that order."""
    norms = {id(p) for m in module.modules() if isinstance(m, nn.LayerNorm) for p in [m.weight]}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if id(parameter) in norms:
                parameter.fill_(1.0)
            elif parameter.ndim == 1:
                parameter.zero_()
            elif parameter.ndim == 2:
                value = torch.empty(parameter.shape)
                parameter.copy_(nn.init.xavier_uniform_(value, generator=generator_for(prefix + name)))
            else:
                draw_normal(parameter, parameter[0].numel() ** -0.5, generator_for(prefix + name))


def draw_parts(module: Any, generator_for: GeneratorFor, *, prefix: str, only: Collection[str] | None) -> None:
    """Overwrite every parameter of ``module``, which has a ``draw_weights``, or those called, behind ``prefix``, as in
    ``only``."""
    wanted = [name for name, _ in module.named_parameters() if only is None or prefix + name in only]
    if len(wanted) == len(list(module.parameters())):
        module.draw_weights(generator_for, prefix=prefix)
    elif wanted:  # some are drawn from others, which are not to change
        whole = deepcopy(module)
        whole.draw_weights(generator_for, prefix=prefix)
        module.load_state_dict({name: whole.get_parameter(name) for name in wanted}, strict=False)


def draw_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Overwrite with N(0, std), drawn in fp32 on the CPU: the same values on every device and in every precision."""
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` asks for a gradient."""
    return any(p.requires_grad for p in module.parameters())


def frozen_part(encoder: Any) -> Literal["rows", "features"] | None:
    """What an encoder makes of the same inputs however the model is trained: its rows, or its tower's features alone, where
    the projector is trained; None: neither."""
    if not is_trainable(encoder):
        return "rows"
    return None if is_trainable(encoder.tower) else "features"
