"""Initial weights that do not depend on the layout.

Every parameter is drawn as the full tensor of the unpartitioned model, on the CPU in fp32, by a generator that is
seeded by the run's seed and the parameter's global name (global layer index, global expert index), then cut to this
rank's share. So every tensor, pipeline and expert layout, on any device, starts from the same weights.

Rules: norms 1, biases 0, everything else N(0, init_method_std); matrices that write to the residual stream (attention
output, second FFN matrix) N(0, init_method_std / sqrt(2 * blocks)). Encoders draw theirs by rules of their own.

Where weights are loaded next nothing is drawn (``models/nothing_drawn.py``), but for those that the checkpoint lacks.
"""

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_omni.models.moe.experts import RoutedExperts
from megatron_omni.platform.seeds import named_generator

_RESIDUAL_OUTPUT = re.compile(r"(linear_proj|linear_fc2)\.weight$|experts\.weight2$")


@torch.no_grad()
def initialize_weights(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    num_blocks: int,
    pg: ProcessGroupCollection,
    only: Collection[str] | None = None,
) -> None:
    """Overwrite every parameter of the language model ``model``, or those called as in ``only``."""
    done: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            if only is not None and not any(name.startswith(f"{prefix}.weight") for name in only):
                done.update(id(p) for p in module.parameters())
                continue
            _draw_experts(module, _global_name(model, prefix), seed=seed, std=std, num_blocks=num_blocks)
            done.update(id(p) for p in module.parameters())
    shared_output = getattr(model, "share_embeddings_and_output_weights", False)
    parameter: Any  # Megatron hangs its partition on parameters as attributes
    for name, parameter in model.named_parameters():
        if id(parameter) in done or (only is not None and name not in only):
            continue
        name = _global_name(model, name)
        if shared_output:
            # The last stage's copy of a tied matrix.
            name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        full_shape = list(parameter.shape)
        partitioned = getattr(parameter, "tensor_model_parallel", False) and pg.tp.size() > 1
        if partitioned:
            full_shape[parameter.partition_dim] *= pg.tp.size()
        generator = named_generator(seed, "weights", name)
        full = torch.empty(full_shape).normal_(std=_std_of(name, std, num_blocks), generator=generator)
        if partitioned:
            full = partition(
                full, parameter.partition_dim, parts=pg.tp.size(), index=pg.tp.rank(), stride=parameter.partition_stride
            )
        parameter.copy_(full)


def partition(full: Tensor, dim: int, *, parts: int, index: int, stride: int) -> Tensor:
    """Share ``index`` of ``full`` cut into ``parts`` along ``dim``; ``stride`` blocks (gate, up) are each cut so and
    joined.
    """
    return torch.cat([block.chunk(parts, dim)[index] for block in full.chunk(stride, dim)], dim)


def _std_of(name: str, std: float, num_blocks: int) -> float:
    return std / math.sqrt(2 * num_blocks) if _RESIDUAL_OUTPUT.search(name) else std


def _draw_experts(experts: RoutedExperts, name: str, *, seed: int, std: float, num_blocks: int) -> None:
    """Routed experts, one generator each: [E_local, H, 2 F / etp] (gate | up) and [E_local, F / etp, H]."""
    for kind, dim, stride in (("weight1", 1, 2), ("weight2", 0, 1)):
        weight: Tensor = getattr(experts, kind)
        full_shape = list(weight.shape[1:])
        full_shape[dim] *= experts.etp_size
        for i, share in enumerate(weight):
            expert = experts.global_expert_offset + i
            generator = named_generator(seed, "weights", f"{name}.{kind}", expert)
            full = torch.empty(full_shape).normal_(std=_std_of(f"{name}.{kind}", std, num_blocks), generator=generator)
            share.copy_(partition(full, dim, parts=experts.etp_size, index=experts.etp_rank, stride=stride))


def _global_name(model: nn.Module, name: str) -> str:
    """``name`` with the layer's index in the whole model instead of its index on this stage."""
    found = re.match(r"(.*\blayers\.\d+)(\..*|$)", name)
    if found is None or not isinstance(layer := model.get_submodule(found[1]), TransformerLayer):
        return name
    return f"{found[1].rpartition('.')[0]}.{layer.layer_number - 1}{found[2]}"
