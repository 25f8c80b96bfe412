"""Keys and values of all answers of a model replica: one row of positions a layer, and attention over it.

    keys, values [N, groups, D] a layer, N positions in all; an answer's lie in its extent, in order (extents.py)

The tokens of a step are one row [T] (engine.py): first those of short chunks, a token each of the answers that decode
among them, then longer chunks, then padding. On a CPU each of the first sees its keys by itself, in one pass over all of
them (ops/cached_attention.py). Longer chunks are segments (segments.py), causal at their end; on a CUDA device all are:
its variable-length kernel takes them in one call. Where a prompt begins with tokens that all see each other, so does its
first chunk: their keys are stored before any of them looks.

A decoding step of fixed shapes (fixed_steps.py) gathers its keys by place and masks what a token does not see.

``alike``: the bits of a token depend on the keys that it sees and on nothing else: not on what is computed beside it, on
how a prompt was cut or on where it lies. So all tokens are computed by themselves; it is slow.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_omni.batch import NO_RECORD
from megatron_omni.generation.extents import Extent
from megatron_omni.generation.scheduler import NOTHING, Chunk, Copy
from megatron_omni.ops import cached_attention
from megatron_omni.ops.segment_attention import segment_attention
from megatron_omni.segments import AttentionSegments, Segment

SHORT = 32
"""Tokens of the longest chunk whose tokens are computed each by itself: longer ones gain by sharing their keys."""


class KVCache:
    """The row of positions, and the places of one step's tokens in it."""

    def __init__(self, num_positions: int, *, alike: bool = False) -> None:
        self.num_positions, self.alike = num_positions, alike
        self.rotation: tuple[Tensor, Tensor] | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._routes: Tensor | None = None
        """[N, L n] uint8 beside the keys, where routes are wanted (models/moe/routes.py)."""
        self._reached = 0
        self._places: Tensor | None = None
        self._counts: Tensor | None = None
        """[n] int64 of the first tokens, on a CPU: the positions that each sees, its own the last."""
        self._last: Tensor | None = None
        """[n] int64 of the first tokens, on a CPU: the place of the last position that each sees. None: its own."""
        self._segments: tuple[Segment, ...] = ()
        self._attention: AttentionSegments | None = None
        self._fixed: tuple[Tensor, Tensor] | None = None
        """[B * K] int64 places of keys and [B, 1, 1, K] 0 or -inf, in a step of fixed shapes."""

    @property
    def num_bytes(self) -> int:
        """Of all layers, as far as they were used."""
        return sum(2 * keys.nbytes for keys, _ in self._layers.values())

    def move(self, copies: Sequence[Copy]) -> None:
        """Carry out ``copies`` in their order."""
        for copy in copies:
            self.reach(max(copy.source, copy.target) + copy.length)
            target = slice(copy.target, copy.target + copy.length)
            for row in self._rows():
                if copy.source == NOTHING:
                    row[target] = 0.0
                else:
                    row[target] = row[copy.source : copy.source + copy.length]

    def keep_routes(self, places: Tensor, routes: Tensor) -> None:
        """Of tokens at ``places`` [n], ``routes`` [n, L n]: they move with the keys."""
        if self._routes is None:
            self._routes = routes.new_full((self._length(routes), routes.shape[1]), NO_RECORD)
        self._routes.index_copy_(0, places, routes)

    def routes(self, extent: Extent, num_tokens: int) -> Tensor:
        """[num_tokens, L n] in host memory: a copy of what was kept of an answer's first tokens."""
        assert self._routes is not None
        return self._routes[extent.offset : extent.offset + num_tokens].to("cpu", copy=True)

    def begin(self, chunks: Sequence[Chunk], places: Tensor) -> None:
        """Announce the next forward: ``chunks`` in the order of :func:`in_step_order`, ``places`` [n] int64 of all of
        their tokens in the cache, on the device."""
        self._places, self._attention, self._fixed = places, None, None
        self.reach(max((chunk.extent.offset + chunk.extent.size for chunk in chunks), default=0))
        singly = cached_attention.is_available(places.device)
        counts: list[int] = []
        last: list[int] = []
        segments: list[Segment] = []
        first = 0
        for chunk in chunks:
            offset, end = chunk.extent.offset, chunk.start + chunk.length
            if singly and (chunk.length <= SHORT or self.alike):
                seen = [*[chunk.whole] * chunk.whole, *range(chunk.start + chunk.whole + 1, end + 1)]
                counts += seen
                last += [offset + count - 1 for count in seen]
            else:
                segments += _segments_of(chunk, first)
            first += chunk.length
        self._counts, self._segments = torch.tensor(counts, dtype=torch.int64) if singly else None, tuple(segments)
        self._last = torch.tensor(last, dtype=torch.int64) if any(chunk.whole for chunk in chunks) else None

    def begin_fixed(self, places: Tensor, offsets: Tensor, lengths: Tensor, num_keys: int) -> None:
        """Announce a forward of B tokens of which each is its answer's next: ``places`` [B] int64 of them, ``offsets`` [B]
        of their extents, ``lengths`` [B] of what they see, at most ``num_keys``; all on the device, and read there."""
        self._places, self._counts, self._last, self._segments = places, None, None, ()
        numbers = torch.arange(num_keys, device=places.device)
        # The row of positions may end before so many keys: what is gathered in their place is masked.
        gathered = (offsets.unsqueeze(1) + numbers).clamp_max_(self._length(places) - 1).flatten()
        seen = numbers < lengths.unsqueeze(1)
        mask = torch.zeros(seen.shape, device=places.device).masked_fill_(~seen, -torch.inf)
        self._fixed = gathered, mask[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[T, groups, n, D] of ``query`` [T, groups, n, D], ``key`` and ``value`` [T, groups, D]: store the new keys and
        values and let every token see those of its answer up to itself. Padding becomes zero."""
        assert self._places is not None, "call begin() before each cached forward"
        keys, values = self._of(layer, key, value)
        count = len(self._places)
        keys.index_copy_(0, self._places, key[:count])
        values.index_copy_(0, self._places, value[:count])
        if self._fixed is not None:
            return self._gathered(query, keys, values, scale)
        if self._counts is None:
            return (self._alike if self.alike else self._segmented)(query, keys, values, scale)
        known = len(self._counts)
        mine = query[:known] if self._segments else query  # padding, too
        output = self._singly(mine, keys, values, scale)
        if not self._segments:
            return output
        whole = self._segmented(query, keys, values, scale)
        whole[:known] = output
        return whole

    def _singly(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        assert self._places is not None and self._counts is not None
        places = self._places[: len(self._counts)] if self._last is None else self._last
        return cached_attention.cached_attention(query, keys, values, places, self._counts, scale=scale)

    def _segmented(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        self._attention = self._attention or AttentionSegments(self._segments, len(query))
        output = segment_attention(query.flatten(1, 2), keys, values, self._attention, scale=scale)
        return output.view(query.shape)

    def _gathered(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        assert self._fixed is not None
        places, mask = self._fixed
        if mask.dtype != query.dtype:  # once, for all layers
            self._fixed = places, mask = places, mask.to(query.dtype)
        k, v = (x.index_select(0, places).view(len(query), -1, *x.shape[1:]).transpose(1, 2) for x in (keys, values))
        return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)

    def _alike(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        output = query.new_zeros(query.shape)
        for segment in self._segments:
            (seen,) = segment.keys
            for i in segment.queries:
                behind = segment.queries.stop - 1 - i if segment.causal else 0
                own = slice(seen.start, seen.stop - behind)
                k, v = (x[own].transpose(0, 1)[None] for x in (keys, values))
                output[i] = F.scaled_dot_product_attention(query[i][None], k, v, scale=scale)[0]
        return output

    def _of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a layer. What nobody wrote is zero: it is masked, but must be finite."""
        if layer not in self._layers:
            length = self._length(key)
            self._layers[layer] = (key.new_zeros(length, *key.shape[1:]), value.new_zeros(length, *value.shape[1:]))
        return self._layers[layer]

    def _length(self, like: Tensor) -> int:
        """Positions that the rows of a layer have: on a CUDA device all, and what is recorded there never moves."""
        return self.num_positions if like.is_cuda else self._reached

    def reach(self, end: int) -> None:
        """Have rows up to position ``end``. On a CPU they grow as they are needed."""
        if end <= self._reached:
            return
        self._reached = min(max(end, 2 * self._reached), self.num_positions)
        for number, (keys, values) in self._layers.items():
            self._layers[number] = self._longer(keys), self._longer(values)
        if self._routes is not None:
            self._routes = self._longer(self._routes)

    def _longer(self, row: Tensor) -> Tensor:
        if len(row) >= self._reached:
            return row
        longer = row.new_zeros(self._reached, *row.shape[1:])
        longer[: len(row)] = row
        return longer

    def _rows(self) -> list[Tensor]:
        """Everything that lies at the places of keys."""
        rows = [row for layer in self._layers.values() for row in layer]
        return rows if self._routes is None else [*rows, self._routes]


def _segments_of(chunk: Chunk, first: int) -> list[Segment]:
    """Those of a chunk whose tokens lie in the row of the step from ``first`` on."""
    offset, end, causal = chunk.extent.offset, first + chunk.length, first + chunk.whole
    segments = []
    if chunk.whole:
        segments.append(Segment(range(first, causal), (range(offset, offset + chunk.whole),), causal=False))
    if causal < end:
        segments.append(Segment(range(causal, end), (range(offset, offset + chunk.start + chunk.length),)))
    return segments


def in_step_order(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks as they lie in the row of a step: the short ones first."""
    return sorted(chunks, key=lambda chunk: chunk.length > SHORT)
