"""Group sequence policy optimisation (Zheng et al. 2025, https://arxiv.org/abs/2507.18071): advantages and loss.

    A_i = (r_i - mean of the group) / std of the group            population std; groups without spread are left out
    s_i = exp(mean_t [log pi(y_it) - log pi_old(y_it)])           the ratio of a sequence, per token
    J   = sum over kept i of min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i) / kept sequences of the GLOBAL mini-batch
    loss = -J + kl_coeff mean over kept i of mean_t k_it          k = exp(d) - d - 1,  d = log pi_ref - log pi

    d s_i A_i / d theta = s_i A_i mean_t d log pi(y_it) / d theta           0 where the clip binds: A_i > 0 and
                                                                            s_i > 1 + high, or A_i < 0 and s_i < 1 - low

Token form: s_it = stop(s_i) pi(y_it) / stop(pi(y_it)), and the mean over t of min(s_it A_i, clip(s_it) A_i): the same
values and, one advantage for all tokens of a sequence, the same gradient.

The end token of a response is one of its tokens; one that was cut by length has none. The divisor is known before the
first backward, so how sequences are dealt to ranks and micro-batches changes nothing. Means over tokens are taken in
float64: their last bit would depend on the longest response beside them.

Shapes: P groups of G responses; N responses of a micro-batch, T tokens of the longest (data/responses.py).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

MIN_SPREAD = 1e-6
"""Standard deviation of the rewards of a group below which it has no spread: they differ by rounding alone."""


class Advantages(NamedTuple):
    """Of the responses of some groups."""

    values: Tensor
    """[P, G] float64, 0 where not kept; those of a group sum to 0."""
    kept: Tensor
    """[P, G] bool: has a reward, in a group with spread."""


def advantages(rewards: Tensor) -> Advantages:
    """Of ``rewards`` [P, G], NaN where there is none: such a response counts in nothing."""
    rewards = rewards.double()
    given = ~rewards.isnan()
    count = given.sum(1, keepdim=True).clamp(min=1)
    centred = (rewards - rewards.nansum(1, keepdim=True) / count).masked_fill(~given, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    kept = given & (spread > MIN_SPREAD)
    return Advantages(torch.where(kept, centred / spread, 0.0), kept)


class PolicyTerms(NamedTuple):
    """What a micro-batch contributes."""

    loss: Tensor
    """Scalar float32 to differentiate: its share of the loss."""
    ratio: Tensor
    """[N] float64: s, of kept and other sequences."""
    clipped_low: Tensor
    """[N] bool: A < 0 and s below the clip, so no gradient; of kept sequences."""
    clipped_high: Tensor
    """[N] bool: A > 0 and s above it."""
    kl: Tensor
    """[N] float64: mean over tokens of k, 0 without a reference."""


def gspo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    valid: Tensor,
    advantages: Tensor,
    kept: Tensor,
    *,
    num_sequences: int,
    clip_low: float,
    clip_high: float,
    form: Literal["sequence", "token"] = "sequence",
    kl_coeff: float = 0.0,
    reference_log_probs: Tensor | None = None,
) -> PolicyTerms:
    """Loss of ``log_probs`` [N, T], zero where not ``valid`` [N, T], as ``old_log_probs`` and ``reference_log_probs``.

    ``advantages`` and ``kept`` [N]: a sequence that is not kept takes no part, nor in ``num_sequences``, those kept of the
    global mini-batch. The reference is needed where ``kl_coeff`` is not 0.
    """
    assert reference_log_probs is not None or not kl_coeff, "kl_coeff without the reference's log-probabilities"
    wide = log_probs.double()
    ratio = _mean(wide - old_log_probs.double(), valid).exp()
    gain = ratio
    if form == "token":
        gain = _mean(ratio.detach().unsqueeze(1) * (wide - wide.detach()).exp(), valid)
    up = kept & (advantages > 0) & (ratio > 1 + clip_high)
    down = kept & (advantages < 0) & (ratio < 1 - clip_low)
    gain = torch.where(up, 1 + clip_high, torch.where(down, 1 - clip_low, gain))
    kl = torch.zeros_like(ratio)
    if reference_log_probs is not None:
        change = (reference_log_probs.double() - wide).masked_fill(~valid, 0.0)
        kl = _mean(change.exp() - change - 1, valid)
    total = torch.where(kept, gain * advantages - kl_coeff * kl, 0.0).sum()
    return PolicyTerms(-(total / max(num_sequences, 1)).float(), ratio.detach(), down, up, kl.detach())


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """[N] mean over the valid entries of each row of ``values`` [N, T]; 0 of a row without any."""
    return values.masked_fill(~valid, 0.0).sum(1) / valid.sum(1).clamp(min=1)
