"""How the weights of an encoder begin, where no checkpoint has them.

One generator per parameter, so that a weight depends on the seed and its name alone. Matrices are Xavier uniform,
convolutions normal with variance 1 / fan-in, biases 0, norms 1; the rest is in an encoder's ``draw_weights``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

GeneratorFor = Callable[[str], torch.Generator]
"""From a parameter's name to the CPU generator of its first value."""


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


def draw_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Overwrite with N(0, std), drawn in fp32 on the CPU: the same values on every device and in every precision."""
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).normal_(std=std, generator=generator))


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` asks for a gradient."""
    return any(p.requires_grad for p in module.parameters())
