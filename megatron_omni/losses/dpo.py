"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) of pairs of responses.

    d   = sum_t [log pi(y_t) - log pi_ref(y_t)]                            its mean with ``length_normalized``
    m   = beta (d_chosen - d_rejected)                                     the margin; log of the odds that chosen wins
    L   = -(1 - e) log sigmoid(m) - e log sigmoid(-m) - w mean_t log pi(chosen_t)
                                                                           e label_smoothing, w sft_weight
    loss = sum of L / pairs of the GLOBAL batch

    d L / d m = -(1 - e) sigmoid(-m) + e sigmoid(m)

At the reference's own weights m = 0 and L = ln 2 for every pair, whatever e. Sums over tokens are float64: their last
bit would depend on the longest response beside them.

Shapes: P pairs, chosen before rejected.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid


class PreferenceTerms(NamedTuple):
    """What a micro-batch of pairs contributes."""

    loss: Tensor
    """Scalar float32 to differentiate: its share of the loss."""
    losses: Tensor
    """[P] float64: L, without the sft term."""
    margins: Tensor
    """[P] float64: m."""


def pair_sums(log_probs: Tensor, valid: Tensor) -> Tensor:
    """[P, 2] float64: log-probability of each response, from its tokens' [2 P, T], pair after pair."""
    return log_probs.double().masked_fill(~valid, 0.0).sum(1).view(-1, 2)


def dpo_loss(
    sums: Tensor,
    reference: Tensor,
    lengths: Tensor,
    *,
    num_pairs: int,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    sft_weight: float = 0.0,
) -> PreferenceTerms:
    """Loss of the log-probabilities ``sums`` [P, 2], those of ``reference`` [P, 2], of responses of ``lengths`` [P, 2] tokens.

    A pair of no tokens only fills a step: it counts in nothing. ``num_pairs``: of the global batch.
    """
    counted = (lengths > 0).all(1)
    tokens = lengths.clamp(min=1)
    change = sums - reference.double()
    if length_normalized:
        change = change / tokens
    margins = (beta * (change[:, 0] - change[:, 1])).masked_fill(~counted, 0.0)
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    losses = losses.masked_fill(~counted, 0.0)
    total = losses.sum()
    if sft_weight:
        total = total - sft_weight * (sums[:, 0] / tokens[:, 0]).masked_fill(~counted, 0.0).sum()
    return PreferenceTerms((total / max(num_pairs, 1)).float(), losses.detach(), margins.detach())
