"""Decoding steps of fixed shapes: what a GPU can record once and replay.

A step in which every answer only decodes has one token of each. It is computed for a number of rows and a number of keys
that are rounded up (:data:`LEAST_KEYS`, :func:`rows_of`), from one tensor of integers on the device, in which the host
writes what the step is about:

    [7, B]   id, three positions, place in the cache, first place of the answer's extent, keys that the token sees

Everything else follows on the device: keys and values are gathered by place, a mask leaves out what the token does not
see, and every expert computes every token (models/moe/layer.py). Nothing waits for the device, and two steps of the same
sizes are the same sequence of operations. Rows that are left over repeat the first one: they write the same keys to the
same place, and nobody reads what they say. Routes, where they are wanted, are one more output: such a step is another.

``captured`` records a step as a CUDA graph (platform/graphs.py); ``fixed`` calls the same function. One rank a replica.

Shapes: B rows, K keys, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_omni.generation.cache import KVCache
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.models.attention import kv_cache
from megatron_omni.models.language import LanguageModel
from megatron_omni.models.moe.context import TokenContext
from megatron_omni.models.moe.routes import RouteRecord
from megatron_omni.parallel.groups import replica
from megatron_omni.platform.device import accelerator_present, device
from megatron_omni.platform.graphs import recorded
from megatron_omni.segments import AttentionSegments

LEAST_KEYS = 256
"""Numbers of keys are a power of two, at least this: a graph for each that is met."""


Decoding = Literal["ragged", "fixed", "captured"]


def check_decoding(decoding: Decoding, *, deterministic: bool, pg: ProcessGroupCollection) -> None:
    """ValueError where the steps of an engine cannot be computed so."""
    if deterministic and replica(pg).size() * pg.ep.size() > 1:
        raise ValueError(
            f"deterministic is True on tensor x context x pipeline = {replica(pg).size()} and expert = {pg.ep.size()} parallel "
            "ranks; it needs replicas of one rank: set these sizes to 1, or deterministic to False"
        )
    if decoding == "ragged":
        return
    if deterministic or replica(pg).size() * pg.ep.size() > 1:
        raise ValueError(
            f"decoding is {decoding!r} with deterministic = {deterministic}, tensor x context x pipeline = {replica(pg).size()} "
            f"and expert = {pg.ep.size()} parallel ranks; it needs replicas of one rank, not deterministic: set it to 'ragged'"
        )
    if decoding == "captured" and not accelerator_present():
        raise ValueError("decoding is 'captured', which needs a CUDA device; set it to 'fixed' or 'ragged'")


def rows_of(count: int) -> int:
    """1, 4, 8, 16 and so on: rows of a step that has ``count`` tokens. Why not 2: see ``replica.ROWS``."""
    return 1 if count == 1 else max(4, 1 << (count - 1).bit_length())


def keys_of(longest: int) -> int:
    """Keys of a step whose tokens see at most ``longest``."""
    return max(LEAST_KEYS, 1 << (longest - 1).bit_length())


class FixedSteps:
    """The decoding steps of a replica of one rank."""

    def __init__(
        self, language: LanguageModel, cache: KVCache, *, facts: Callable[[int, int], TokenContext], captured: bool
    ) -> None:
        """``facts`` of (tokens, rows) for routers, as replica.py makes them."""
        self._language, self._cache, self._facts, self._captured = language, cache, facts, captured
        self._steps: dict[tuple[int, int, bool], _Step] = {}

    def step(self, numbers: np.ndarray, chunks: Sequence[Chunk], *, routes: bool) -> tuple[Tensor, Tensor | None]:
        """[n, V] float32 after the tokens of ``chunks``, one each, and the tokens' ``routes`` [n, L n] if they are wanted;
        ``numbers`` [5, >= n] of replica.py. What was returned before is overwritten."""
        sizes = rows_of(len(chunks)), keys_of(max(chunk.start for chunk in chunks) + 1)
        self._cache.reach(max(chunk.extent.offset + chunk.extent.size for chunk in chunks))
        where = [[chunk.extent.offset for chunk in chunks], [chunk.start + 1 for chunk in chunks]]
        columns = np.concatenate([numbers[:, : len(chunks)], np.array(where)])
        repeated = np.concatenate([columns, np.repeat(columns[:, :1], sizes[0] - len(chunks), axis=1)], axis=1)
        step = self._steps.get((*sizes, routes))
        if step is None:
            ctx = replace(self._facts(sizes[0], sizes[0]), fixed_shapes=True, record=RouteRecord() if routes else None)
            step = self._steps[(*sizes, routes)] = _Step(self._language, self._cache, ctx, *sizes)
        logits, taken = step(torch.from_numpy(repeated), captured=self._captured)
        return logits[: len(chunks)], None if taken is None else taken[: len(chunks)]


class _Step:
    """The step of one size."""

    def __init__(self, language: LanguageModel, cache: KVCache, ctx: TokenContext, rows: int, keys: int) -> None:
        self._language, self._cache, self._ctx, self._keys = language, cache, ctx, keys
        self.inputs = torch.zeros(7, rows, dtype=torch.int64, device=device())
        self._replay: tuple[tuple[Tensor, Tensor | None], Callable[[], None]] | None = None

    def __call__(self, numbers: Tensor, *, captured: bool) -> tuple[Tensor, Tensor | None]:
        """:meth:`compute` of ``numbers`` [7, B], in host memory."""
        self.inputs.copy_(numbers.pin_memory() if self.inputs.is_cuda else numbers, non_blocking=True)
        if not captured:
            return self.compute()
        if self._replay is None:
            self._replay = recorded(self.compute)
        output, replay = self._replay
        replay()
        return output

    def compute(self) -> tuple[Tensor, Tensor | None]:
        """What is recorded: [B, V] float32 from ``inputs``, and routes [B, L n]."""
        inputs, language = self.inputs, self._language
        self._cache.begin_fixed(inputs[4], inputs[5], inputs[6], self._keys)
        with kv_cache(self._cache):
            output = language(
                input_ids=inputs[:1],
                position_ids=inputs[1:4].unsqueeze(1),
                attention=AttentionSegments((), inputs.shape[1]),  # the cache knows who sees whom
                ctx=self._ctx,
                decoder_input=language.embed(inputs[:1]),
            )
        record = self._ctx.record
        return output[0].float(), None if record is None else record.whole(
            language.model_config, language.pg_collection
        )
