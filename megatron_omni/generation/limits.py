"""What an engine may take, and what follows for its cache."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_omni.generation.extents import extent_size
from megatron_omni.generation.fixed_steps import Decoding
from megatron_omni.generation.replica import unwrapped
from megatron_omni.parallel.groups import replica
from megatron_omni.platform.device import device, memory_bytes

CACHE_SHARE = 0.3
"""Of the device's memory, for the cache where its size is not given."""


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine may take."""

    max_running: int = 32
    """Answers computed together."""
    max_batch_tokens: int = 512
    """Tokens of a step, at least two for each running answer."""
    cache_tokens: int | None = None
    """Positions of a replica's cache; None: for ``max_running`` answers of the model's longest sequence, at most
    :data:`CACHE_SHARE` of the device's memory."""
    longest: int | None = None
    """Tokens of the longest request with its answer, where known: the cache then is no larger than that needs."""
    prefix_cache: bool = False
    """Keep keys and values of finished answers for prompts that begin alike, while nobody needs the place."""
    deterministic: bool = False
    """The bits of an answer do not depend on what is computed beside it (one rank; slow)."""
    decoding: Decoding = "ragged"
    """Steps in which all answers decode: a ragged row as any other, ``fixed`` shapes, or ``captured`` in those as CUDA
    graphs (one rank a replica; fixed_steps.py)."""


def cache_tokens(model: nn.Module, limits: EngineLimits, pg: ProcessGroupCollection) -> int:
    """Positions of the cache of a replica."""
    if limits.cache_tokens is not None:
        return limits.cache_tokens
    language = unwrapped(model).language
    config = language.model_config
    whole = limits.max_running * extent_size(limits.longest or config.max_position_embeddings)
    heads = max(1, language.config.num_query_groups // pg.tp.size())
    layers = max(language.stage_blocks)
    bytes_each = 2 * layers * heads * config.kv_channels * next(language.parameters()).element_size()
    return min(whole, int(CACHE_SHARE * memory_bytes() / bytes_each))


def agreed(number: int, pg: ProcessGroupCollection) -> int:
    """The leader's number on all ranks of a replica."""
    if replica(pg).size() == 1:
        return number
    box = torch.tensor([number], dtype=torch.int64, device=device())
    dist.broadcast(box, group=replica(pg), group_src=0)
    return int(box)
