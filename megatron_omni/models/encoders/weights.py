"""How the weights of an encoder begin: drawn, or taken from a Hugging Face checkpoint with every key accounted for.

Drawn: one generator per parameter, so that a weight depends on the seed and its name alone. Matrices are Xavier
uniform, convolutions normal with variance 1 / fan-in, biases 0, norms 1; the rest is in an encoder's ``draw_weights``.
Taken: keys are matched by name. A missing key, another shape or a key that nobody expects is an error; weights that the
source has and this model does not use are returned, so that conversion can carry them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Every key of a checkpoint that was given, once."""

    used: tuple[str, ...]
    carried: dict[str, Tensor]
    """Weights of the same tower that this model does not compute with; a checkpoint written back needs them."""
    left_out: tuple[str, ...]
    """Keys of other models in the same file."""


def load_named(
    targets: dict[str, Tensor],
    state: dict[str, Tensor],
    *,
    rename: Callable[[str], str],
    is_carried: Callable[[str], bool],
    is_foreign: Callable[[str], bool],
) -> LoadReport:
    """Copy ``state`` into ``targets``. ``rename`` turns a key of the checkpoint into a name of ``targets``.

    ``is_carried`` and ``is_foreign`` judge renamed keys that are no target. ValueError names every key that is missing,
    unknown or of another shape, and then nothing has been copied.
    """
    sources = {rename(key): key for key in state}
    problems = [f"missing {name}" for name in targets if name not in sources]
    problems += [
        f"{sources[name]} has shape {tuple(state[sources[name]].shape)}, the model needs {tuple(target.shape)}"
        for name, target in targets.items()
        if name in sources and state[sources[name]].shape != target.shape
    ]
    rest = [name for name in sources if name not in targets]
    problems += [f"unknown key {sources[name]}" for name in rest if not is_carried(name) and not is_foreign(name)]
    if problems:
        raise ValueError(f"checkpoint does not fit the encoder: {_first(problems)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state[sources[name]])
    return LoadReport(
        used=tuple(sources[name] for name in targets),
        carried={sources[name]: state[sources[name]] for name in rest if is_carried(name)},
        left_out=tuple(sources[name] for name in rest if not is_carried(name)),
    )


def _first(problems: Iterable[str], count: int = 8) -> str:
    listed = list(problems)
    more = f"; and {len(listed) - count} more" if len(listed) > count else ""
    return "; ".join(listed[:count]) + more


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` asks for a gradient."""
    return any(p.requires_grad for p in module.parameters())
