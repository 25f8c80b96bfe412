"""What a MoE layer must know about each token beside its hidden state, carried past Megatron's layer signature.

Megatron hands a layer only hidden states and a boolean padding mask. Routing also needs the token's identity (random
draws are keyed by it), whether it carries a label and its modality. The stack opens ``token_context(ctx)`` around every
layer call, *inside* the closure that activation recomputation replays; so the second forward of a layer sees the
context of its own micro-batch even when the pipeline schedule has run others in between.

T = tokens in this rank's sequence shard, flattened in the order of the hidden states ([S, B] -> S * B).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from torch import Tensor

from megatron_omni.models.moe.routes import RouteRecord


@dataclass(kw_only=True)
class RoutingStats:
    """Sums over the tokens that this rank routed since the last reset; keyed by layer number. Filled by the layers.

    ``selected``: [modalities, routed + null] float64 counts of (token, slot) assignments; ``tokens``: [modalities]
    counts; ``k_histogram``: [max k + 1] counts of real experts per token; ``aux_loss``: sum over micro-batches of the
    layer's loss; ``dropped``: assignments removed by capacity.
    """

    selected: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[int, Tensor] = field(default_factory=dict)
    k_histogram: dict[int, Tensor] = field(default_factory=dict)
    aux_loss: dict[int, Tensor] = field(default_factory=dict)
    dropped: dict[int, Tensor] = field(default_factory=dict)
    micro_batches: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenContext:
    """Per-token facts of one micro-batch, for this rank's sequence shard."""

    sample_ids: Tensor
    """[T] int64, -1 for padding."""
    sample_positions: Tensor
    """[T] int64."""
    modality: Tensor
    """[T] int64."""
    has_label: Tensor
    """[T] bool."""
    padding: Tensor
    """[T] bool, True at padding."""
    seed: int
    step: int
    stochastic: bool
    """True: training semantics (sampling, estimator, jitter, capacity). False: deterministic routing."""
    aux_loss_scale: float
    """Factor on each layer's auxiliary loss before it is added to the training loss (coefficient / layers /
    micro-batches)."""
    fixed_shapes: bool = False
    """Every expert of this rank computes every token, so no size depends on routing: for the few tokens of a decoding step
    that is recorded (generation/fixed_steps.py)."""
    stats: RoutingStats | None = None
    """Where statistics are added; None while recomputing or when they are not wanted."""
    routes: Tensor | None = None
    """[T, L n] uint8: slots to take in every MoE layer of the model, in place of those of the logits (routes.py)."""
    record: RouteRecord | None = None
    """Where the slots that the logits choose are told; None like ``stats``."""


_CURRENT: ContextVar[TokenContext | None] = ContextVar("token_context", default=None)


@contextmanager
def token_context(ctx: TokenContext | None) -> Iterator[None]:
    """Make ``ctx`` the current context for the layers called inside."""
    token = _CURRENT.set(ctx)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_token_context() -> TokenContext:
    """The context of the micro-batch being computed; a MoE layer called outside of one is a programming error."""
    ctx = _CURRENT.get()
    assert ctx is not None, "a MoE layer ran outside token_context(); call the model through OmniModel.forward"
    return ctx


def without_stats(ctx: TokenContext) -> TokenContext:
    """The same context for a recomputed forward, which must not count or record its tokens twice."""
    return replace(ctx, stats=None, record=None)
