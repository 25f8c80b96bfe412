"""Routing in one call, as tests write it: the rule's fields and the tokens' side by side."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_omni.ops.topp_route import Routing, RoutingRule, topp_route

OF_TOKENS = ("gumbel", "bernoulli", "padding", "keep")


def routed(z: Tensor, *, by: Callable[..., Routing] = topp_route, **arguments: Any) -> Routing:
    """``by(z, rule, ...)``; every argument that is not one of ``OF_TOKENS`` is the rule's."""
    of_tokens = {name: arguments.pop(name) for name in OF_TOKENS if name in arguments}
    return by(z, RoutingRule(**arguments), **of_tokens)
