"""Dynamic-capacity routing: from gate logits to selected slots and weights (paper 2.3.2, Algorithm 1, appendix A.4).

Columns of the logits z are [routed | null | shared]; the first E_d = routed + null are *dynamic* slots, of which each
token takes as many as it needs; the shared ones are always on. All in one pass over [T, E], no loop over tokens.

Selection (``select_slots``), with p = softmax(z[:, :E_d]) and without gradient:
    order   dynamic slots by z (deterministic), or by z + Gumbel noise (training: a draw without replacement from p)
    k       shortest prefix of that order whose summed p reaches ``top_p``, in 1..E_d; or a fixed ``top_k``.
            ``top_p`` = 1 takes every slot: no sum is asked, which in finite precision may reach 1 before the last slot
    cap     with ``max_routed``, real experts beyond that many leave the prefix, last drawn first
    padding selects nothing
Weights (``slot_weights``): softmax of z over the selected dynamic and all shared slots. The null slot's share is lost.
Then the estimator's scale s (gradient_estimator.py): ``paper`` multiplies the weight by s (and the caller scales row
gradients), ``grin`` multiplies the forward value alone.

``mode="release"`` is what the authors' published code computes instead (docs/model.md 2.2); see ``release_select``.

Capacity (``capacity_keep``) may remove assignments between the two: route once for the mask, which auxiliary loss and
statistics want, and again with ``keep``.

Gradient of the weights, with w~ the softmax before the scale: ``dz = w~ (dw~ - <w~, dw~>)``, dw~ = s dw (``paper``) or
dw. ``topp_route`` is one op in either mode, ``megatron_omni::topp_route`` or ``megatron_omni::release_route``
(gradients: csrc/bindings_autograd.cpp); ``topp_route_reference`` and the functions it is made of are the definition. T
tokens, E columns.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_omni.ops import extension
from megatron_omni.ops.gradient_estimator import Estimator, argmax_among_remaining, scale_forward, slot_scale

RoutingWeightMode = Literal["masked_softmax", "release"]

_RELEASE_NORM_EPS = 1e-6
_RELEASE_SCALE_LOW, _RELEASE_SCALE_RANGE = 0.3333, 0.6667
"""s = 0.3333 + 0.6667 c in the published code."""


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How slots are chosen and weighted, the same for every token; in a recipe, fields of ``model.moe``."""

    num_routed: int
    num_null: int
    top_p: float
    top_k: int | None = None
    """Slots of every token, in place of ``top_p``."""
    max_routed: int | None = None
    """Real experts that a token takes at most."""
    mode: RoutingWeightMode = "masked_softmax"
    estimator: Estimator = "none"
    release_eps: float = 0.01
    """Logits that differ by less than twice this share of the larger are near ties (``release`` alone)."""

    @property
    def num_slots(self) -> int:
        """E_d."""
        return self.num_routed + self.num_null


class Selection(NamedTuple):
    """Which dynamic slots each token takes."""

    mask: Tensor
    """[T, E_d] bool."""
    draw_rank: Tensor
    """[T, E_d] int64: place of each slot in the draw order, 0 first."""
    multiplier: Tensor | None = None
    """[T, E_d] release mode only: the slot multipliers before normalisation, with gradient."""


class Routing(NamedTuple):
    """What the dispatcher and the experts need."""

    mask: Tensor
    """[T, E_d] bool: selected dynamic slots (after capacity)."""
    weights: Tensor
    """[T, E_d]: what a slot's expert output is multiplied by, s included; 0 where not selected. Null columns are not
    used."""
    shared_weights: Tensor
    """[T, E_s]."""
    scale: Tensor
    """[T, E_d]: s of the estimator, in {1, 1/3}; 1 where there is none."""
    k: Tensor
    """[T] int64: selected dynamic slots, null included."""


def masked_softmax(z: Tensor, mask: Tensor) -> Tensor:
    """Softmax of z [T, E] over the True entries of ``mask``; 0 elsewhere, and a row without any is all 0 (not NaN)."""
    return torch.softmax(z.masked_fill(~mask, torch.finfo(z.dtype).min), dim=-1) * mask


def _inverse_permutation(order: Tensor) -> Tensor:
    """``rank`` with ``rank[t, order[t, j]] = j``."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def top_p_count(p_in_order: Tensor, top_p: float) -> Tensor:
    """[T] int64: length of the shortest prefix of each row that sums to at least ``top_p`` (< 1), in 1..E_d.

    The last entry is never asked: sums in finite precision may stay just below 1.
    """
    return 1 + (p_in_order.cumsum(1)[:, :-1] < top_p).sum(1)


def fixed_count(num_slots: int, *, top_p: float, top_k: int | None) -> int | None:
    """Slots that every token takes: ``top_k``, or all of them where ``top_p`` is 1; None where the logits decide.

    ValueError for a ``top_k`` outside 1..``num_slots``.
    """
    if top_k is not None and not 1 <= top_k <= num_slots:
        raise ValueError(f"top_k: {top_k} is not in 1..{num_slots}")
    return num_slots if top_k is None and top_p >= 1 else top_k


def _cap_real(mask: Tensor, draw_rank: Tensor, *, num_routed: int, max_routed: int) -> Tensor:
    """Keep the ``max_routed`` selected real experts that were drawn first; null slots are not counted."""
    rank = draw_rank[:, :num_routed].masked_fill(~mask[:, :num_routed], mask.shape[1])
    drawn_before = (rank.unsqueeze(1) < rank.unsqueeze(2)).sum(2)  # selected real slots ahead of this one
    return torch.cat([mask[:, :num_routed] & (drawn_before < max_routed), mask[:, num_routed:]], dim=1)


@torch.no_grad()
def select_slots(
    z: Tensor, rule: RoutingRule, *, gumbel: Tensor | None = None, padding: Tensor | None = None
) -> Selection:
    """Selected dynamic slots for dynamic logits z [T, E_d]; ``gumbel`` [T, E_d] noise makes it a draw."""
    order = torch.sort(z if gumbel is None else z + gumbel, dim=1, descending=True, stable=True).indices
    draw_rank = _inverse_permutation(order)
    top_k = fixed_count(z.shape[1], top_p=rule.top_p, top_k=rule.top_k)
    if top_k is None:
        mask = draw_rank < top_p_count(torch.softmax(z, dim=1).gather(1, order), rule.top_p).unsqueeze(1)
    else:
        mask = draw_rank < top_k
    if rule.max_routed is not None and rule.max_routed < rule.num_routed:
        mask = _cap_real(mask, draw_rank, num_routed=rule.num_routed, max_routed=rule.max_routed)
    if padding is not None:
        mask = mask & ~padding.unsqueeze(1)
    return Selection(mask=mask, draw_rank=draw_rank)


def release_select(
    z: Tensor,
    rule: RoutingRule,
    *,
    gumbel: Tensor | None = None,
    bernoulli: Tensor | None = None,
    padding: Tensor | None = None,
) -> Selection:
    """Published code, count by sorted Top-P, identity slot by slot among near ties.

    ``gumbel`` [T, E_d, E_d]: noise of slot j in ``[:, j]``; None takes the argmax. ``bernoulli`` [T, E_d] uniform
    draws switch the ``grin`` multiplier on (forward s g_D, gradient of g_D), None leaves plain g_D.
    """
    num_tokens, num_slots = z.shape
    detached = z.detach()
    top_k = fixed_count(num_slots, top_p=rule.top_p, top_k=rule.top_k)
    if top_k is None:
        count = top_p_count(torch.softmax(detached, dim=1).sort(dim=1, descending=True).values, rule.top_p)
    else:
        count = torch.full((num_tokens,), top_k, dtype=torch.int64, device=z.device)
    taken = torch.zeros_like(z, dtype=torch.bool)
    mask = torch.zeros_like(taken)
    draw_rank = torch.full((num_tokens, num_slots), num_slots, dtype=torch.int64, device=z.device)
    real_taken = torch.zeros(num_tokens, dtype=torch.int64, device=z.device)
    multiplier = torch.zeros_like(z)
    for j in range(num_slots):
        left = detached.masked_fill(taken, -math.inf)
        z_max = left.max(dim=1, keepdim=True).values
        # 0/0 is NaN and compares False: equal logits of 0 stay in.
        far = (z_max - detached) / torch.maximum(detached.abs(), z_max.abs()) > 2 * rule.release_eps
        out = taken | far
        candidates = left.masked_fill(far, -math.inf)
        drawn = (candidates if gumbel is None else candidates + gumbel[:, j]).argmax(dim=1, keepdim=True)
        # z again, now with gradient; finfo.min where out, so that softmax gives exact zeros and no NaN gradient.
        g = torch.softmax(z.masked_fill(out, torch.finfo(z.dtype).min), dim=1)
        value = g.gather(1, drawn)
        if bernoulli is not None:
            c = (drawn == candidates.argmax(dim=1, keepdim=True)) | (bernoulli.gather(1, drawn) > 0.75)
            value = scale_forward(value, _RELEASE_SCALE_LOW + _RELEASE_SCALE_RANGE * c.to(z.dtype))
        active = count > j
        if rule.max_routed is not None:
            is_real = drawn.squeeze(1) < rule.num_routed
            active = active & ~(is_real & (real_taken >= rule.max_routed))
            real_taken = real_taken + (active & is_real)
        if padding is not None:
            active = active & ~padding
        here = torch.zeros_like(taken).scatter_(1, drawn, True)
        multiplier = torch.where(here & active.unsqueeze(1), value, multiplier)
        mask = mask | (here & active.unsqueeze(1))
        draw_rank = draw_rank.masked_fill(here, j)
        taken = taken | here
    return Selection(mask=mask, draw_rank=draw_rank, multiplier=multiplier)


@torch.no_grad()
def capacity_keep(z: Tensor, mask: Tensor, *, num_capped: int, capacity: int) -> Tensor:
    """[T, E_d] bool: assignments that survive a cap on each of the first ``num_capped`` slots, the largest dynamic
    logits first (ties: first token).

    z and mask are those of the whole micro-batch. The paper's rule caps the real experts, ``release`` every dynamic slot.
    """
    if z.shape[0] <= capacity:
        return mask
    capped = z[:, :num_capped].masked_fill(~mask[:, :num_capped], -math.inf)
    order = torch.sort(capped, dim=0, descending=True, stable=True).indices
    keep = torch.zeros_like(mask[:, :num_capped]).scatter_(0, order[:capacity], True)
    return torch.cat([mask[:, :num_capped] & keep, mask[:, num_capped:]], dim=1)


def expert_capacity(num_tokens: int, num_slots: int, *, capacity_factor: float, min_capacity: int) -> int:
    """C = max(min_capacity, ceil(T / E_d * factor)); T counts padding, E_d counts null (docs/model.md 2.5)."""
    return max(min_capacity, math.ceil(num_tokens / num_slots * capacity_factor))


def slot_weights(z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked softmax over the selected dynamic [T, E_d] and all shared slots of z [T, E]: (dynamic, shared) weights."""
    num_shared = z.shape[1] - mask.shape[1]
    full = torch.cat([mask, mask.new_ones(mask.shape[0], num_shared)], dim=1)
    weights = masked_softmax(z, full)
    return weights[:, : mask.shape[1]], weights[:, mask.shape[1] :]


def route_selected(
    z: Tensor,
    selection: Selection,
    *,
    keep: Tensor | None = None,
    bernoulli: Tensor | None = None,
    estimator: Estimator = "none",
) -> Routing:
    """Weights, scale and count for a selection, after capacity (``keep``) if any.

    Release mode (``selection.multiplier`` present): r = multipliers, normalised, renormalised over what is kept,
    times the dynamic share S of the softmax over everything selected; its estimator acted in ``release_select``.
    """
    mask = selection.mask if keep is None else selection.mask & keep
    weights, shared = slot_weights(z, mask)
    scale = torch.ones_like(weights)
    if selection.multiplier is not None:
        r = selection.multiplier
        r = r / (r.sum(1, keepdim=True) + _RELEASE_NORM_EPS)
        if keep is not None:
            r = r * keep
            r = r / (r.sum(1, keepdim=True) + _RELEASE_NORM_EPS)
        weights = r * weights.sum(1, keepdim=True)
    elif estimator != "none" and bernoulli is not None:
        dynamic = z.detach()[:, : mask.shape[1]]
        delta = argmax_among_remaining(dynamic, selection.draw_rank)
        scale = slot_scale(delta, bernoulli.to(z.dtype), estimator=estimator)
        weights = weights * scale if estimator == "paper" else scale_forward(weights, scale)
    return Routing(mask=mask, weights=weights, shared_weights=shared, scale=scale, k=mask.sum(1))


def topp_route_reference(
    z: Tensor,
    rule: RoutingRule,
    *,
    gumbel: Tensor | None = None,
    bernoulli: Tensor | None = None,
    padding: Tensor | None = None,
    keep: Tensor | None = None,
) -> Routing:
    """:func:`topp_route` in plain torch, any device, any floating dtype."""
    dynamic = z[:, : rule.num_slots]
    if rule.mode == "masked_softmax":
        selection = select_slots(dynamic, rule, gumbel=gumbel, padding=padding)
    else:
        draws = bernoulli if rule.estimator == "grin" else None
        selection = release_select(dynamic, rule, gumbel=gumbel, bernoulli=draws, padding=padding)
    return route_selected(z, selection, keep=keep, bernoulli=bernoulli, estimator=rule.estimator)


_topp_route = extension.op("topp_route")
_release_route = extension.op("release_route")


@extension.register_fake("topp_route")
def _(z: Tensor, num_routed: int, num_null: int, *settings: Any) -> tuple[Tensor, ...]:
    num_tokens, num_slots = z.shape[0], num_routed + num_null
    weights = z.new_empty(num_tokens, num_slots)
    draw_rank = torch.empty_like(weights, dtype=torch.int64)
    shared_weights = z.new_empty(num_tokens, z.shape[1] - num_slots)
    k = z.new_empty(num_tokens, dtype=torch.int64)
    mask = torch.empty_like(weights, dtype=torch.bool)
    return weights, shared_weights, mask, torch.empty_like(weights), k, draw_rank


@extension.register_fake("topp_route_backward")
def _(
    grad_weights: Tensor | None,
    grad_shared: Tensor | None,
    weights: Tensor,
    shared_weights: Tensor,
    scale: Tensor,
    estimator: str,
) -> Tensor:
    return weights.new_empty(weights.shape[0], weights.shape[1] + shared_weights.shape[1])


@extension.register_fake("release_route")
def _(z: Tensor, num_routed: int, num_null: int, *settings: Any) -> tuple[Tensor, ...]:
    num_slots = num_routed + num_null
    weights = z.new_empty(z.shape[0], num_slots)
    shared_weights = z.new_empty(z.shape[0], z.shape[1] - num_slots)
    k = z.new_empty(z.shape[0], dtype=torch.int64)
    draw_rank = torch.empty_like(weights, dtype=torch.int64)
    mask = torch.empty_like(weights, dtype=torch.bool)
    return weights, shared_weights, mask, k, draw_rank, torch.empty_like(weights)


@extension.register_fake("release_route_backward")
def _(grad_weights: Tensor | None, grad_shared: Tensor | None, z: Tensor, *saved: Any) -> Tensor:
    return torch.empty_like(z)


def topp_route(
    z: Tensor,
    rule: RoutingRule,
    *,
    gumbel: Tensor | None = None,
    bernoulli: Tensor | None = None,
    padding: Tensor | None = None,
    keep: Tensor | None = None,
) -> Routing:
    """Routing of gate logits z [T, E] in one call; noise given = training, noise None = deterministic.

    ``padding`` [T] bool: tokens that select nothing. ``keep`` [T, E_d] bool: what capacity leaves; a selected slot that it
    denies is lost, with its weight. Shapes of the noise: ``gumbel`` [T, E_d] (release: [T, E_d, E_d]), ``bernoulli``
    [T, E_d] uniform draws, both taken in z's dtype (float32 or float64). Arguments that do not fit raise ValueError with
    the argument's name.
    """
    top_k = fixed_count(rule.num_slots, top_p=rule.top_p, top_k=rule.top_k)
    if gumbel is not None and gumbel.dtype != z.dtype:
        gumbel = gumbel.to(z.dtype)
    if bernoulli is not None and bernoulli.dtype != z.dtype:
        bernoulli = bernoulli.to(z.dtype)
    if rule.mode == "release":
        weights, shared_weights, mask, k, _, _ = _release_route(
            z, rule.num_routed, rule.num_null, rule.top_p, top_k, rule.release_eps,
            gumbel, bernoulli if rule.estimator == "grin" else None, rule.max_routed, padding, keep,
        )  # fmt: skip
        return Routing(mask=mask, weights=weights, shared_weights=shared_weights, scale=torch.ones_like(weights), k=k)
    weights, shared_weights, mask, scale, k, _ = _topp_route(
        z, rule.num_routed, rule.num_null, rule.top_p, top_k, rule.estimator,
        gumbel, bernoulli, rule.max_routed, padding, keep,
    )  # fmt: skip
    return Routing(mask=mask, weights=weights, shared_weights=shared_weights, scale=scale, k=k)
