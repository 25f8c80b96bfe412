"""Whether the policy that answered is the policy that is trained: log-probabilities of the same tokens by the same weights,
from the sampler and from the training forward.

    d_t  = log pi_train(y_t) - log pi_sampler(y_t)       0 but for rounding, as far as both compute one model
    m_i  = |mean_t d_t|                                  of a response: what its ratio s_i would be off by, in nats a token

GSPO's ratio compares two training forwards, so no loss needs d. It is measured because it tells of what is wrong elsewhere:
a response with m_i above :data:`LIMIT` was drawn from another distribution than the one that learns from it, and is left
out. In bf16 m_i is some thousandths.

Shapes: N responses, T tokens of the longest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LIMIT = 0.05
"""m_i above which a response is left out."""
DROPPED_LIMIT = 0.1
"""Share of responses left out above which something is broken, and the run ends."""


class Mismatch(NamedTuple):
    """Of each response, float64."""

    sequence: Tensor
    """[N] m_i."""
    token: Tensor
    """[N] mean |d_t|."""
    largest: Tensor
    """[N] max |d_t|."""

    @property
    def dropped(self) -> Tensor:
        """[N] bool: differs too much, or is no number."""
        return ~(self.sequence <= LIMIT)


def mismatch(trained: Tensor, sampled: Tensor, valid: Tensor) -> Mismatch:
    """Of log-probabilities [N, T] at the tokens that are ``valid`` [N, T]; each response has one or more."""
    change = (trained.double() - sampled.double()).masked_fill(~valid, 0.0)
    length = valid.sum(1)
    return Mismatch(
        (change.sum(1) / length).abs(), change.abs().sum(1) / length, torch.linalg.vector_norm(change, torch.inf, dim=1)
    )
